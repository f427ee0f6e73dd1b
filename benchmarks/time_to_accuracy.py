"""Accuracy over training time: the original recipe and ours, the same network, pictures and judge.

    python benchmarks/time_to_accuracy.py --minutes 90

Both recipes train at the same time, each `python src/train.py` with half of the processor's cores,
so that what disturbs the machine disturbs both; only their steps count as time. Each learning
rate's decay ends with the budget. Then every checkpoint is scored with the same sampler. The
original recipe here drops conditions picture by picture, not batch by batch as the original did.
Writes table, chart and JSON to output/benchmarks/time_to_accuracy/; a second start goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from common import model_flags
from training_runs import minutes_trained, plan_runs, score_all, train_all

from judging.figures import save_figure
from judging.intervals import Interval
from runtime.files import atomic_write, make_folder
from runtime.settings import (
    ROOT,
    DataConfig,
    PositiveFloat,
    PositiveInt,
    SamplingConfig,
    Settings,
    parse_args,
    run,
)
from training.recipes import RECIPES
from training.run_folder import checkpoints

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
    sampling: SamplingConfig = SamplingConfig(
        scheduler="ddpm", num_inference_steps=50, guidance_scale=3.0
    )
    """Of both; enough steps that neither recipe suffers from their number."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "time_to_accuracy"
    """Runs and results go in here."""
    data: DataConfig = field(default_factory=DataConfig)


def main(argv: Sequence[str] | None = None) -> dict:
    config = parse_args(TimeConfig, argv)
    make_folder(config.output_dir)
    variants = {name: f"{config.network} {flags}" for name, flags in FLAGS.items()}
    runs = plan_runs(
        variants, config.minutes, config.num_checkpoints, config.output_dir, config.data,
        at_once=len(FLAGS),
    )  # fmt: skip
    train_all(runs, config.output_dir, config.data, at_once=len(FLAGS))
    found = {
        f"{recipe}/{path.name}": path
        for recipe in FLAGS
        for path in checkpoints(config.output_dir / recipe)
    }

    def describe(name: str, step: int) -> dict:
        return {"minutes": minutes_trained(found[name].parents[1], step)}

    path = config.output_dir / "time_to_accuracy.json"
    report = score_all(found, config.data, config.sampling, config.num_seeds, path, describe)
    text = summary(report)
    with atomic_write(config.output_dir / "time_to_accuracy.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    draw_chart(report, config.output_dir / "time_to_accuracy.png")
    print(f"{text}\n{config.output_dir}")
    return report


def points(report: dict, recipe: str) -> list[dict]:
    """The scores of a recipe, in the order of time."""
    found = [p for name, p in report["points"].items() if name.startswith(f"{recipe}/")]
    return sorted(found, key=lambda point: point["step"])


def summary(report: dict) -> str:
    """A line for each point, and when ours reaches what the original has at the end."""
    lines = ["| recipe | minutes | steps | accuracy | exact sets |", "|---|---:|---:|---:|---:|"]
    for recipe in FLAGS:
        for p in points(report, recipe):
            cells = " | ".join(str(Interval(**p[f])) for f in ("accuracy", "exact_sets"))
            lines.append(f"| {recipe} | {p['minutes']:.1f} | {p['step']} | {cells} |")
    original, ours = (points(report, recipe) for recipe in FLAGS)
    goal = original[-1]["accuracy"]["mean"]
    reached = next((p["minutes"] for p in ours if p["accuracy"]["mean"] >= goal), None)
    lines += [
        "",
        f"judge: {report['judge']}; {report['machine']['device']}, half of the cores each; mean of "
        f"both splits; one training each, 95% intervals over {report['seeds']} draws",
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
    for recipe in FLAGS:
        found = points(report, recipe)
        x = [p["minutes"] for p in found]
        mean, low, high = (np.array([p["accuracy"][k] for p in found], dtype=float)
                           for k in ("mean", "low", "high"))  # fmt: skip
        axes.plot(x, mean, "o-", label=recipe, markersize=4)
        axes.fill_between(x, low, high, alpha=0.15)
    axes.set(xlabel="minutes of training", ylabel="accuracy, mean of both splits\n(95% interval)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    run(main)
