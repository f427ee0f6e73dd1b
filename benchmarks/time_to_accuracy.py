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

from common import model_flags
from training_runs import caption, score_all, train_equally_long

from judging.figures import panels, plot_intervals, save_figure, save_text
from judging.intervals import Interval
from judging.metrics import SHARES, markdown
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
    variants = {name: f"{config.network} {flags}" for name, flags in FLAGS.items()}
    train_equally_long(
        variants, config.minutes, config.num_checkpoints, config.output_dir, config.data,
        at_once=len(FLAGS),
    )  # fmt: skip
    found = {
        f"{recipe}/{path.name}": path
        for recipe in FLAGS
        for path in checkpoints(config.output_dir / recipe)
    }
    path = config.output_dir / "time_to_accuracy.json"
    report = score_all(found, config.data, config.sampling, config.num_seeds, path)
    text = summary(report)
    save_text(text, config.output_dir / "time_to_accuracy.md")
    draw_chart(report, config.output_dir / "time_to_accuracy.png")
    print(f"{text}\n{config.output_dir}")
    return report


def points(report: dict, recipe: str) -> list[dict]:
    """The scores of a recipe, in the order of time."""
    found = [p for name, p in report["points"].items() if name.startswith(f"{recipe}/")]
    return sorted(found, key=lambda point: point["step"])


def summary(report: dict) -> str:
    """A line for each point, and when ours reaches what the original has at the end."""
    rows = (
        [recipe, f"{p['minutes']:.1f}", p["step"], *(Interval(**p[figure]) for figure in SHARES)]
        for recipe in FLAGS
        for p in points(report, recipe)
    )
    original, ours = (points(report, recipe) for recipe in FLAGS)
    goal = original[-1]["accuracy"]["mean"]
    reached = next((p["minutes"] for p in ours if p["accuracy"]["mean"] >= goal), None)
    at = "none of its checkpoints" if reached is None else f"the checkpoint of minute {reached:.0f}"
    head = ["recipe", "minutes", "steps", "accuracy", "exact sets", "nothing twice"]
    return "\n".join([
        markdown(head, rows), "",
        caption(report),
        f"the original's {goal:.3f} after {original[-1]['minutes']:.0f} minutes is reached by ours "
        f"at {at}",
        f"at the end ours has {100 * (ours[-1]['accuracy']['mean'] - goal):+.1f} points",
    ])  # fmt: skip


def draw_chart(report: dict, path: Path) -> None:
    name = "accuracy, mean of both splits"
    figure, axes_of = panels([name], "", "minutes of training")
    for recipe in FLAGS:
        x, y = zip(*((p["minutes"], p["accuracy"]) for p in points(report, recipe)), strict=True)
        plot_intervals(axes_of[name], x, y, label=recipe)
    axes_of[name].legend()
    save_figure(figure, path)


if __name__ == "__main__":
    run(main)
