"""Does a network compose? Sets and pairs that training never showed, four and five objects.

    python src/render_iclevr.py --out_dir data/held_out --hold_out_sets 0.1 --hold_out_pairs 0.05
    python src/train.py --recipe small --data_dir data/held_out --run_name held_out ...
    python benchmarks/composition.py --data_dir data/held_out --ckpt_path output/held_out/...

Draws the conditions of seen.json, unseen.json, unseen_pairs.json, four.json and five.json in
several ways, each with as many steps as --budget evaluations of the network for a picture allow:
what takes more of them in a step gets fewer steps. (Of data rendered with --max_objects 4 or 5,
some of four.json and five.json are in training, too.) Writes table, chart, pictures and JSON to
output/benchmarks/composition/<checkpoint>/; draws that are there already are not made again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from pydantic import Field

from common import machine

from diffusion.samplers import StepsError, check_steps
from diffusion.sampling import evaluations
from iclevr.dataset import find_data
from judging.bench import Bench, Draw, draw_splits, open_bench, settings_key, split_records
from judging.figures import grid, save_figure, save_image, save_text, split_color
from judging.intervals import Interval
from judging.metrics import SHARES, markdown, paired_difference, summarise
from network.checkpoint import PRETRAINED
from runtime.files import make_folder, read_json, write_json
from runtime.settings import (
    ROOT,
    DataConfig,
    PositiveInt,
    SamplingConfig,
    Settings,
    UserError,
    parse_args,
    run,
    to_dict,
)

FILES = "seen", "unseen", "unseen_pairs", "four", "five"
"""Conditions, each a JSON file in the data folder; those that are not there are left out."""
REPEATS, BEST_OF = 4, 2
"""How many times resampled steps are taken, and of how many pictures the best is kept."""
FEWEST = 3
"""Least denoising steps that a way of sampling is worth."""


@dataclass(frozen=True)
class CompositionConfig(Settings):
    """Accuracy on seen and unseen sets, and on four and five objects, by ways of sampling."""

    ckpt_path: Path = PRETRAINED
    """Checkpoint, of a network trained on data with sets held out; the pretrained one has seen
    all sets of up to three objects."""
    budget: Annotated[int, Field(ge=24)] = 96
    """Evaluations of the network for a picture, at most."""
    num_seeds: PositiveInt = 3
    """Draws of every condition."""
    max_conditions: PositiveInt = 48
    """Of longer files, so many conditions are drawn, evenly spread."""
    guidance_scale: float = 3.0
    """Guidance of all objects as one condition."""
    composed_scale: float = 2.0
    """Guidance where objects are asked for one by one."""
    device: str | None = None
    """cuda, cpu ... (default: the best there is)."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "composition"
    """Results go to a folder in here."""
    data: DataConfig = field(default_factory=DataConfig)


def fewer(labels: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many rows, evenly spread: files are ordered by the number of objects."""
    return labels[np.linspace(0, len(labels) - 1, min(most, len(labels))).round().astype(int)]


def ways(
    config: CompositionConfig, bench: Bench, labels: torch.Tensor
) -> dict[str, SamplingConfig]:
    """Name -> how to sample these conditions within the budget."""
    noise = bench.checkpoint.config.noise
    plain = SamplingConfig(guidance_scale=config.guidance_scale)

    def longest(**how: Any) -> SamplingConfig:
        for steps in range(config.budget, FEWEST - 1, -1):
            found = replace(plain, num_inference_steps=steps, **how)
            try:
                check_steps(noise, found)
            except StepsError:
                continue
            if evaluations(noise, found, labels) <= config.budget:
                return found
        raise UserError(
            f"--budget {config.budget}: too little for {FEWEST} steps of {how}; use more"
        )

    composed = config.composed_scale
    return {
        "joint": longest(),
        "objects": longest(compose="objects", guidance_scale=composed),
        "both": longest(compose="both", guidance_scale=composed),
        f"each step {REPEATS} times": longest(resample=REPEATS),
        f"best of {BEST_OF}": longest(best_of=BEST_OF),
    }


def draw(
    config: CompositionConfig, bench: Bench, file: str, way: str, sampling: SamplingConfig,
    folder: Path,
) -> list[Draw]:  # fmt: skip
    """A draw for each seed, kept in files of their own; pictures of the first."""
    bench = replace(bench, labels={file: fewer(bench.labels[file], config.max_conditions)})
    draws = []
    for seed in range(config.num_seeds):
        path = folder / "draws" / f"{file}-{way.replace(' ', '_')}-seed{seed}.json"
        key = settings_key(0, bench, sampling)
        if not path.exists() or read_json(path)["more"].get("settings") != key:
            print(f"{file}, {way}, seed {seed}", flush=True)
            splits = draw_splits(bench, sampling, seed)
            if seed == 0:
                save_image(grid(splits[file][0], columns=12), path.with_suffix(".png"))
            write_json(path, vars(Draw(split_records(splits), more={"settings": key})))
        draws.append(Draw(**read_json(path)))
    return draws


def chart(report: dict[str, Any], path: Path) -> None:
    """Accuracy and exact sets of all ways, side by side for each file of conditions."""
    rows, size = report["rows"], (5.5 * len(SHARES), 3.6)
    figure, panels = plt.subplots(1, len(SHARES), figsize=size, sharey=True, layout="constrained")
    for axes, name in zip(panels, SHARES, strict=True):
        for number, way in enumerate(next(iter(rows.values()))):
            for place, of_file in enumerate(rows.values()):
                interval = of_file[way][name]
                x = place + 0.14 * (number - 2)
                ends = [interval[end] if interval[end] is not None else interval["mean"]
                        for end in ("low", "high")]  # fmt: skip
                axes.plot([x, x], ends, color=split_color(number))
                axes.plot(x, interval["mean"], "o", color=split_color(number), markersize=4,
                          label=None if place else way)  # fmt: skip
        axes.set_xticks(range(len(rows)), [file.replace("_", " ") for file in rows])
        axes.set(title=f"{name.replace('_', ' ')} (95% interval)", ylim=(0, 1))
        axes.grid(alpha=0.3, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(fontsize=8)
    figure.suptitle(report["title"], fontsize=9)
    save_figure(figure, path)


def in_words(report: dict[str, Any]) -> str:
    """The table: a row for every file and way."""
    head = ["conditions", "sampling", "steps", "evaluations", "accuracy", "exact sets",
            "exact, nothing twice", "accuracy minus joint"]  # fmt: skip
    lines = []
    for file, of_file in report["rows"].items():
        for way, row in of_file.items():
            cells = (Interval(**row[figure]) for figure in SHARES)
            less = "" if way == "joint" else Interval(**row["minus_joint"]["accuracy"])
            about = [f"{file} ({row['conditions']})", way, row["steps"]]
            lines.append([*about, f"{row['evaluations']:.0f}", *cells, less])
    return f"{report['title']}\n\n{markdown(head, lines, num_texts=2)}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse_args(CompositionConfig, argv)
    data_dir = find_data(config.data).data_dir
    files = [data_dir / f"{file}.json" for file in FILES]
    files = [path for path in files if path.exists()]
    if not files:
        raise UserError(
            f"{data_dir}: none of {', '.join(FILES)}.json; render some: python "
            "src/render_iclevr.py --out_dir data/held_out --hold_out_sets 0.1 --hold_out_pairs 0.05"
        )
    bench = open_bench(config.ckpt_path, config.data, config.device, conditions=files)
    folder = config.output_dir / f"{bench.run_name}-{bench.blob[:10]}"
    make_folder(folder)
    noise, rows = bench.checkpoint.config.noise, {}
    for file, labels in bench.labels.items():
        labels = fewer(labels, config.max_conditions)
        how = ways(config, bench, labels)
        draws = {way: draw(config, bench, file, way, how[way], folder) for way in how}
        records = {way: [d.records[file] for d in these] for way, these in draws.items()}
        rows[file] = {
            way: summarise(these)
            | {
                "conditions": len(labels),
                "steps": how[way].num_inference_steps,
                "evaluations": evaluations(noise, how[way], labels),
                "minus_joint": {f: paired_difference(these, records["joint"], f) for f in SHARES},
                "sampling": how[way],
            }
            for way, these in records.items()
        }
    report = to_dict({
        "title": f"{bench.run_name}, step {bench.checkpoint.step}, DDPM, guidance "
        f"{config.guidance_scale:g} (composed {config.composed_scale:g}), "
        f"{config.num_seeds} seeds, judge: {bench.judge.name}",
        "checkpoint": str(config.ckpt_path),
        "machine": machine(bench.device),
        "rows": rows,
    })  # fmt: skip
    write_json(folder / "composition.json", report)
    save_text(in_words(report), folder / "composition.md")
    chart(report, folder / "composition.png")
    print(f"{in_words(report)}\n\n{folder}")
    return report


if __name__ == "__main__":
    run(main)
