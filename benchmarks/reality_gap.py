"""Score pictures on disk: how a judge sees pictures that it was not made from.

    python benchmarks/reality_gap.py --pictures DIR [DIR ...] --conditions DIR \\
        [--evaluator FILE ...] [--scores FILE]

Every DIR of pictures holds test/0.png ... and new_test/0.png ..., as src/test.py writes them to
images/; DIR of the conditions objects.json, test.json and new_test.json. With the scores that
somebody else's judge gave the same folders, judge and judge are compared:

    {"<name of the folder>": {"test": 0.87, "new_test": 0.94, "score": "<one of SCORES>",
                              "guided_by_evaluator": false}, ...}

Prints tables, and writes them with JSON, and a chart of the comparison, to
output/benchmarks/reality_gap/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import matplotlib.pyplot as plt
import numpy as np
import torch
from pydantic import Field
from scipy import stats
from torch import Tensor

from common import table as columns_table

from iclevr.dataset import SHIPPED_EVALUATOR, normalize
from iclevr.image_cache import read_image
from iclevr.labels import SPLITS, condition_files, read_conditions, read_objects
from judging.evaluator import IMAGE_SIZE, Evaluation, Evaluator, evaluate, load_evaluator
from judging.figures import save_figure, save_text
from judging.intervals import Interval, mean_interval
from judging.metrics import record, summarise, table
from runtime.files import make_folder, read_json, write_json
from runtime.settings import ROOT, Settings, UserError, from_dict, parse_args, run, to_dict

Share = Annotated[float, Field(ge=0, le=1)]
Score = Literal[
    "objects right over all objects", "mean over pictures of the share of objects right"
]
SCORES = get_args(Score)
"""The course's, and what others have made of it."""


@dataclass(frozen=True)
class GapConfig(Settings):
    """Score pictures on disk, and compare the scores with another judge's."""

    pictures: tuple[Path, ...]
    """Folders, each with test/ and new_test/."""
    conditions: Path
    """Folder of objects.json, test.json and new_test.json."""
    evaluator: tuple[Path, ...] = (SHIPPED_EVALUATOR,)
    """Judges to try."""
    scores: Path | None = None
    """JSON file of what another judge gave these folders."""
    out_dir: Path = ROOT / "output" / "benchmarks" / "reality_gap"
    """Where tables, chart and JSON go."""


@dataclass(frozen=True)
class Scores(Settings):
    """What another judge gave the pictures of a folder."""

    test: Share
    new_test: Share
    score: Score = SCORES[0]
    guided_by_evaluator: bool = False
    """Whether the pictures were drawn with that judge's help."""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_args(GapConfig, argv)
    objects = read_objects(config.conditions)
    files = condition_files(config.conditions)
    labels = {split: read_conditions(path, objects)[1] for split, path in files.items()}
    official = read_scores(config.scores, config.pictures) if config.scores else {}
    judges = [load_evaluator(path, objects) for path in config.evaluator]
    sets = {path.name: read_pictures(path, labels) for path in config.pictures}
    make_folder(config.out_dir, "--out_dir")
    report: dict[str, Any] = {}
    for judge in judges:
        found = {
            name: {split: evaluate(judge, images[split], labels[split]) for split in SPLITS}
            for name, images in sets.items()
        }
        figures = {
            name: {split: summarise([record(e)]) for split, e in by_split.items()}
            for name, by_split in found.items()
        }
        of_judge = report[str(judge.path)] = {"judge": judge.name, "figures": to_dict(figures)}
        text = f"{judge.name}, threshold {judge.threshold:.3f}, {judge.path}\n\n"
        text += "\n\n".join(f"{name}\n\n{table(splits)}" for name, splits in figures.items())
        if official:
            of_judge["comparison"], compared = compare(official, found)
            draw_chart(judge, official, found, config.out_dir / f"{judge.path.stem}.png")
            text += f"\n\n{compared}"
        print(f"judge: {text}\n")
        save_text(text, config.out_dir / f"{judge.path.stem}.md")
    write_json(config.out_dir / "reality_gap.json", report)


def read_scores(path: Path, folders: Sequence[Path]) -> dict[str, Scores]:
    """The other judge's scores of these folders.

    Raises:
        UserError: no such file, folders without a score, or scores that are none.
    """
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise UserError(f"{path}: expected a dict of folder name -> scores")
    if missing := [folder.name for folder in folders if folder.name not in entries]:
        raise UserError(f"{path}: has no scores for {', '.join(missing)}; add them")
    names = [folder.name for folder in folders]
    names = [folder.name for folder in folders]
    return {name: from_dict(Scores, entries[name], f"{path}: {name}") for name in names}


def read_pictures(folder: Path, labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split -> (N, 3, H, W) in [-1, 1], in the order of the conditions."""
    pictures = {}
    for split, conditions in labels.items():
        files = [folder / split / f"{number}.png" for number in range(len(conditions))]
        images = [torch.tensor(read_image(file, IMAGE_SIZE)) for file in files]
        pictures[split] = normalize(torch.stack(images))
    return pictures


def ours(evaluation: Evaluation, score: Score) -> float:
    """This judge's score, of the other's kind."""
    if score == SCORES[0]:
        return evaluation.accuracy
    return (evaluation.correct / evaluation.total).mean().item()


def compare(
    official: dict[str, Scores], found: dict[str, dict[str, Evaluation]]
) -> tuple[dict[str, Any], str]:
    """This judge's scores beside the other's: JSON-able figures, and the same as text.

    The interval is Student's t over the sets, of each its mean difference over the splits: the
    splits of one network are no independent measurements.
    """
    theirs = np.array([[getattr(scores, s) for s in SPLITS] for scores in official.values()])
    mine = np.array(
        [[ours(found[name][s], scores.score) for s in SPLITS]
         for name, scores in official.items()]
    )  # fmt: skip
    difference = mine - theirs
    columns = {}
    for number, split in enumerate(SPLITS):
        for title, values in (("the other judge", theirs), ("this judge", mine)):
            rows = {n: f"{values[row, number]:.3f}" for row, n in enumerate(official)}
            columns[f"{split}, {title}"] = rows
    compared = columns_table("set", columns)
    figures: dict[str, Any] = {"difference": vars(mean_interval(difference.mean(axis=1)))}
    text = f"mean difference {Interval(**figures['difference'])}"
    if len(official) > 1:
        figures["spread"] = float(difference.std(ddof=1))
        text += f", standard deviation of a difference {figures['spread']:.3f}"
    if np.ptp(theirs) and np.ptp(mine):
        figures["correlation"] = float(stats.pearsonr(mine.ravel(), theirs.ravel()).statistic)
        text += f", correlation {figures['correlation']:.2f} over {difference.size} scores"
    figures |= {
        name: {"theirs": theirs[row].tolist(), "ours": mine[row].tolist()}
        for row, name in enumerate(official)
    }
    return figures, f"{compared}\n\n{text}"


def draw_chart(
    judge: Evaluator,
    official: dict[str, Scores],
    found: dict[str, dict[str, Evaluation]],
    path: Path,
) -> None:
    """One point for each set and split: the other judge's score, this one's."""
    figure, axes = plt.subplots(figsize=(5.2, 5), layout="constrained")
    for split, marker in zip(SPLITS, "os", strict=True):
        for name, scores in official.items():
            x, y = getattr(scores, split), ours(found[name][split], scores.score)
            first = split if name == next(iter(official)) else None
            fill = "none" if scores.guided_by_evaluator else "full"
            axes.plot(x, y, f"C{'os'.index(marker)}{marker}", fillstyle=fill, label=first)
            axes.annotate(name, (x, y), (4, -8), textcoords="offset points", fontsize=6)
    low = min(axes.get_xlim()[0], axes.get_ylim()[0])
    axes.plot((low, 1), (low, 1), color="gray", linewidth=0.8, label="both the same")
    axes.set(
        xlabel="the other judge", ylabel=judge.name, title="share of the objects that are right"
    )
    axes.set_aspect("equal")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    run(main)
