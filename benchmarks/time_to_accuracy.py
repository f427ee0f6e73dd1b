"""Accuracy over training time: the original recipe and ours, the same network, pictures and judge.

    python benchmarks/time_to_accuracy.py --minutes 90

Both recipes train at the same time, each `python src/train.py` with half of the processor's cores,
so that what disturbs the machine disturbs both; only their steps count as time. Each learning
rate's decay ends with the budget. Then every checkpoint is scored with the same sampler. The
original recipe here drops conditions picture by picture, not batch by batch as the original did.
Writes table, chart and JSON to output/benchmarks/time_to_accuracy/; a second start goes on.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import matplotlib.pyplot as plt
import numpy as np
from common import machine, model_flags
from training_runs import plan_runs, score, seconds_trained, train_all

from config import (
    RECIPES,
    ROOT,
    DataConfig,
    PositiveFloat,
    PositiveInt,
    SamplingConfig,
    Settings,
    UserError,
    parse_args,
    run,
    to_dict,
)
from dataset import find_data
from device import pick_device
from files import atomic_write, make_folder, read_json, write_json
from intervals import Interval
from train import checkpoints

FLAGS = {
    "original": "--recipe original --no-ema --mixed_precision no",
    "ours": "--recipe small",
}


@dataclass(frozen=True)
class TimeConfig(Settings):
    """Train both recipes side by side and score them along the way."""

    minutes: PositiveFloat = 90.0
    """Training time of each recipe."""
    num_checkpoints: PositiveInt = 9
    """About so many of each recipe are written and scored, evenly spaced, in whole epochs."""
    num_seeds: PositiveInt = 4
    """Draws of both splits for each checkpoint."""
    network: str = model_flags(RECIPES["small"].model)
    """Flags of the network, for both: --network="--image_size 32 ..."."""
    sampling: SamplingConfig = SamplingConfig(scheduler="dpmpp", num_inference_steps=12)
    output_dir: Path = ROOT / "output" / "benchmarks" / "time_to_accuracy"
    """Runs and results go in here."""
    data: DataConfig = field(default_factory=DataConfig)


def main(argv: Sequence[str] | None = None) -> dict:
    config = parse_args(TimeConfig, argv)
    find_data(config.data)  # an error ends it here
    make_folder(config.output_dir)
    variants = {name: f"{config.network} {flags}" for name, flags in FLAGS.items()}
    runs = plan_runs(
        variants, config.minutes, config.num_checkpoints, config.output_dir, config.data
    )
    train_all(runs, config.output_dir, config.data)
    path = config.output_dir / "time_to_accuracy.json"
    how = {"sampling": to_dict(config.sampling), "seeds": config.num_seeds}
    report = how | {"points": {recipe: [] for recipe in FLAGS}}
    if path.exists():
        report = read_json(path)
        if how != {key: report[key] for key in how}:
            raise UserError(f"{path}: scored with other settings; move it away first")
    report["machine"] = machine(pick_device(None))
    for recipe in FLAGS:
        points = report["points"][recipe]
        run_dir = config.output_dir / recipe
        for checkpoint in checkpoints(run_dir):
            if all(point["checkpoint"] != checkpoint.name for point in points):
                print(f"{recipe}: {checkpoint.name}", flush=True)
                figures = score(checkpoint, config.data, config.sampling, config.num_seeds)
                points.append({"checkpoint": checkpoint.name} | figures)
                points[-1]["minutes"] = seconds_trained(run_dir, points[-1]["step"]) / 60
                points.sort(key=lambda point: point["step"])
                write_json(path, report)
    text = summary(report)
    with atomic_write(config.output_dir / "time_to_accuracy.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    draw_chart(report, config.output_dir / "time_to_accuracy.png")
    print(f"{text}\n{config.output_dir}")
    return report


def summary(report: dict) -> str:
    """A line for each point, and when ours reaches what the original has at the end."""
    lines = ["| recipe | minutes | steps | accuracy | exact sets |", "|---|---:|---:|---:|---:|"]
    for recipe, points in report["points"].items():
        for p in points:
            cells = " | ".join(str(Interval(**p[f])) for f in ("accuracy", "exact_sets"))
            lines.append(f"| {recipe} | {p['minutes']:.1f} | {p['step']} | {cells} |")
    original, ours = (report["points"][recipe] for recipe in FLAGS)
    goal = original[-1]["accuracy"]["mean"]
    reached = next((p["minutes"] for p in ours if p["accuracy"]["mean"] >= goal), None)
    lines += [
        "",
        f"judge: {ours[-1]['judge']}; {report['machine']['device']}; accuracy is the mean of "
        "both splits",
        f"the original's {goal:.3f} after {original[-1]['minutes']:.0f} minutes is reached by ours "
        + (
            f"at the checkpoint of minute {reached:.0f}"
            if reached
            else "at none of its checkpoints"
        ),
        f"at the end ours has {100 * (ours[-1]['accuracy']['mean'] - goal):+.1f} points",
    ]
    return "\n".join(lines)


def draw_chart(report: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for recipe, points in report["points"].items():
        x = [p["minutes"] for p in points]
        mean, low, high = (np.array([p["accuracy"][k] for p in points], dtype=float)
                           for k in ("mean", "low", "high"))  # fmt: skip
        axes.plot(x, mean, "o-", label=recipe, markersize=4)
        axes.fill_between(x, low, high, alpha=0.15)
    axes.set(xlabel="minutes of training", ylabel="accuracy, mean of both splits\n(95% interval)")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


if __name__ == "__main__":
    run(main)
