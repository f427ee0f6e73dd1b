"""What src/test.py reports: accuracies.json, figures.md and accuracies.md."""

import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from diffusion.sampling import evaluations
from iclevr.labels import decode_labels
from judging.bench import Bench, BenchConfig, Draw, origin, settings_key
from judging.intervals import Interval, mean_interval
from judging.metrics import SHARES, markdown, paired_difference, summarise, table
from runtime.files import read_json
from runtime.settings import UserError, to_dict
from runtime.tracking import Tracker


def sum_up(bench: Bench, config: BenchConfig, draws: list[Draw]) -> dict[str, Any]:
    """The content of accuracies.json, with its intervals."""
    of_judge = {split: [draw.records[split] for draw in draws] for split in bench.labels}
    figures = {split: summarise(records) for split, records in of_judge.items()}
    objects, first = bench.checkpoint.objects, draws[0].more
    everything = torch.cat([*bench.labels.values()])
    report = {
        "checkpoint": str(config.ckpt_path),
        "settings": settings_key(config.num_fd_samples, bench, config.sampling),
        "judge": bench.judge_name(config.sampling),
        "threshold": bench.judge.threshold,
        "sampling": to_dict(config.sampling),
        "evaluations": evaluations(bench.checkpoint.config.noise, config.sampling, everything),
        "seed": config.seed,
        "num_seeds": len(draws),
        "records": of_judge,
        "accuracy": {split: found["accuracy"] for split, found in figures.items()},
        "figures": figures,
        "objects": sorted(objects, key=objects.__getitem__),
        "asked": {
            split: [decode_labels(row, objects) for row in labels]
            for split, labels in bench.labels.items()
        },
        "seen": first.get("seen"),  # in the pictures on disk, which are the first draw's
        "confusion": sum(torch.tensor(draw.more["confusion"]) for draw in draws).tolist(),
    } | origin(bench, draws)
    if config.num_fd_samples:
        floors = [draw.more["floor"] for draw in draws]
        report |= {
            "num_fd_samples": config.num_fd_samples,
            "frechet_distance": mean_interval([draw.frechet for draw in draws], lowest=0),
            "frechet_distance_of_training_pictures": mean_interval(floors, lowest=0),
        }
    if rms := first["nearest_rms"]:
        report |= {"nearest_rms": rms, "nearest_median": statistics.median(rms)}
        report["nearest_least"] = min(rms)
    if bench.judge is not bench.guide:
        of_guide = {split: [draw.more["other"][split] for draw in draws] for split in of_judge}
        report["other_judge"] = {
            "judge": bench.judge_name(config.sampling, bench.guide),
            "figures": {split: summarise(records) for split, records in of_guide.items()},
            "difference": {
                split: {f: paired_difference(of_guide[split], of_judge[split], f) for f in SHARES}
                for split in of_judge
            },
        }
    return report


def in_words(report: dict[str, Any], bench: Bench) -> str:
    """The text of figures.md."""
    title = f"judge: {report['judge']}, threshold {report['threshold']:.2f}"
    text = [title, table(report["figures"])]
    if "frechet_distance" in report:
        text.append(
            f"Frechet distance, {report['num_fd_samples']} pictures: "
            f"{report['frechet_distance']}; of as many training pictures: "
            f"{report['frechet_distance_of_training_pictures']}"
        )
    if "nearest_rms" in report:
        text.append(
            f"nearest training picture (nearest.png): median difference "
            f"{report['nearest_median']:.1f} of 255 levels, least {report['nearest_least']:.1f}"
        )
    if other := report.get("other_judge"):
        text.append(f"by {other['judge']} (--evaluator):\n\n{table(other['figures'])}")
        for split, by in other["difference"].items():
            names = f"{bench.guide.name} minus {bench.judge.name}"
            text.append(f"{split} accuracy: {names}: {by['accuracy']}")
    return "\n\n".join(text)


def comparison(run_folder: Path) -> str:
    """A line for every way of sampling that this run was tested with.

    Tests of other conditions than the course's have other columns: they get a table of their own.
    """
    rows_of: dict[tuple[str, ...], list[list[object]]] = {}  # by names, and what was asked for
    for path in sorted(run_folder.glob("*/accuracies.json")):
        try:
            report = read_json(path)
            distance = "-"
            if "frechet_distance" in report:
                distance = f"{Interval(**report['frechet_distance'])} ({report['num_fd_samples']})"
            figures = report["figures"]
            columns = [(figure, split) for figure in SHARES for split in figures]
            cells = [Interval(**figures[split][figure]) for figure, split in columns]
            names = [f"{split} {figure.replace('_', ' ')}" for figure, split in columns]
            names = (*names, str(report.get("asked")))
            about = [report[key] for key in ("step", "num_seeds", "judge")]
        except (UserError, KeyError, TypeError):
            what = f"{path} is damaged or of an older version; left out of the table"
            print(f"warning: {what}", file=sys.stderr)
            continue
        rows_of.setdefault(names, []).append([path.parent.name, *about, *cells, distance])
    first, last = ["sampling", "step", "seeds", "judge"], "Frechet distance (pictures)"
    tables = [markdown([*first, *names, last], rows, 4) for (*names, _), rows in rows_of.items()]
    return "\n\n".join(tables)


def log_results(tracker: Tracker, found: dict[str, Any], folder: Path) -> None:
    """Figures and pictures, to Weights & Biases."""
    values = {
        f"{s}_{f}": i.mean for s, of_split in found["figures"].items() for f, i in of_split.items()
    }
    if "frechet_distance" in found:
        values["frechet_distance"] = found["frechet_distance"].mean
    tracker.log(values)
    for picture in sorted(folder.glob("*.png")):
        tracker.log_picture(picture.stem, picture)
    tracker.finish()
