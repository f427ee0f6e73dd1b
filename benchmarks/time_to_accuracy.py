"""Accuracy over training time: the original recipe and ours, the same network, pictures and judge.

    python benchmarks/time_to_accuracy.py --minutes 90

Both recipes train in turns, in slices of --slice_minutes, each as its own `python src/train.py`
that is stopped (SIGTERM) and resumed; only its steps count as time. The checkpoint at the end of
each slice is then scored with the same sampler. Each learning rate's decay ends with the budget.
The original recipe here drops conditions picture by picture, not batch by batch as the original
did. Writes table, chart and JSON to output/benchmarks/time_to_accuracy/; a second start goes on.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import matplotlib.pyplot as plt
import numpy as np
from common import SMALL, machine
from sampling_steps import share_interval, shares

from checkpoint import load_checkpoint
from config import (
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
from guidance_scale import Draw
from intervals import Interval
from metrics import record
from scoring import draw_splits, open_bench
from train import latest_checkpoint

NETWORK = (
    f"--image_size {SMALL.image_size} --layers_per_block {SMALL.layers_per_block}"
    f" --block_out_channels {' '.join(map(str, SMALL.block_out_channels))}"
    f" --down_block_types {' '.join(SMALL.down_block_types)}"
    f" --up_block_types {' '.join(SMALL.up_block_types)}"
    f" --norm_num_groups {SMALL.norm_num_groups} --attention_head_dim {SMALL.attention_head_dim}"
)
FLAGS = {
    "original": "--recipe original --no-ema --mixed_precision no",
    "ours": "--recipe small",
}


@dataclass(frozen=True)
class TimeConfig(Settings):
    """Train both recipes in turns and score them along the way."""

    minutes: PositiveFloat = 90.0
    """Training time of each recipe."""
    slice_minutes: PositiveFloat = 10.0
    """Time between two checkpoints."""
    num_seeds: PositiveInt = 4
    """Draws of both splits for each checkpoint."""
    guidance_scale: float = 5.0
    """Guidance scale of both."""
    network: str = NETWORK
    """Flags of the network, for both: --network="--image_size 32 ..."."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "time_to_accuracy"
    """Runs and results go in here."""
    data: DataConfig = field(default_factory=DataConfig)


def seconds_trained(run_dir: Path) -> float:
    """Time spent in steps so far, from the images per second in metrics.jsonl."""
    config = read_json(run_dir / "config.json")
    seconds, step = 0.0, 0
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if "images_per_s" in values:
            seconds += (values["step"] - step) * config["batch_size"] / values["images_per_s"]
            step = values["step"]
    return seconds


def train_slice(flags: str, run_dir: Path, steps: int, seconds: float) -> None:
    """Train until `seconds` of steps have gone by, then stop and save.

    Raises:
        UserError: training failed.
    """
    latest = latest_checkpoint(run_dir)
    if latest and load_checkpoint(latest).step >= steps:
        return  # all of its steps are done
    resume = "--resume auto" if latest else ""
    metrics, done = run_dir / "metrics.jsonl", 0.0
    if resume:
        done = seconds_trained(run_dir)
    script = str(ROOT / "src" / "train.py")
    process = subprocess.Popen(
        [sys.executable, script, *shlex.split(f"{flags} {resume}")],
        start_new_session=True,  # Ctrl-C is this process's business
    )
    size = metrics.stat().st_size if metrics.exists() else 0
    try:
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= size):
            time.sleep(0.2)  # until the first steps are done
        while process.poll() is None and seconds_trained(run_dir) - done < seconds:
            time.sleep(0.5)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code not in (0, 128 + signal.SIGTERM):
        raise UserError(f"src/train.py {flags}: ended with exit code {code}")


def flags_of(config: TimeConfig, recipe: str, name: str, steps: int) -> str:
    data = " ".join(
        f"--{name} {shlex.quote(str(path))}"
        for name, path in vars(config.data).items()
        if path is not None
    )
    return (
        f"--run_name {name} --output_dir {shlex.quote(str(config.output_dir))} {data}"
        f" --max_train_steps {steps} --epochs 1000000 --save_interval 1000000"
        f" --sample_interval 1000000 --wandb disabled {config.network} {FLAGS[recipe]}"
    )


def plan_steps(config: TimeConfig) -> dict[str, int]:
    """Steps that fit into the budget, from 100 of each recipe; kept for a second start."""
    path = config.output_dir / "plan.json"
    settings = {k: v for k, v in to_dict(config).items() if k != "output_dir"}
    if path.exists():
        plan = read_json(path)
        if plan["settings"] != settings:
            raise UserError(f"{path}: made with other settings; choose another --output_dir")
        return plan["steps"]
    steps = {}
    for recipe in FLAGS:
        name = f"probe-{recipe}"
        flags = flags_of(config, recipe, name, 100)
        train_slice(flags, config.output_dir / name, 100, 1e9)
        seconds = seconds_trained(config.output_dir / name)
        steps[recipe] = round(config.minutes * 60 * 100 / seconds)
    write_json(path, {"settings": settings, "steps": steps})
    return steps


def score(config: TimeConfig, path: Path) -> dict:
    """Both splits, every seed."""
    bench = open_bench(path, config.data, None)
    sampling = SamplingConfig(
        scheduler="ddim", num_inference_steps=50, guidance_scale=config.guidance_scale
    )
    draws = []
    for seed in range(config.num_seeds):
        splits = draw_splits(bench, sampling, seed)
        draws.append(Draw({split: record(result) for split, (_, result) in splits.items()}))
    return {
        figure: vars(share_interval(shares(draws, figure))) for figure in ("accuracy", "exact_sets")
    } | {"judge": bench.judge.name, "step": bench.checkpoint.step}


def main(argv: Sequence[str] | None = None) -> dict:
    config = parse_args(TimeConfig, argv)
    find_data(config.data)  # an error ends it here
    make_folder(config.output_dir)
    steps = plan_steps(config)
    path = config.output_dir / "time_to_accuracy.json"
    report = read_json(path) if path.exists() else {"points": {recipe: [] for recipe in FLAGS}}
    slices = round(config.minutes / config.slice_minutes)
    for number in range(1, slices + 1):
        for recipe in FLAGS:
            points = report["points"][recipe]
            if len(points) >= number:
                continue
            run_dir = config.output_dir / recipe
            done = seconds_trained(run_dir) if latest_checkpoint(run_dir) else 0.0
            left = number * config.slice_minutes * 60 - done
            if left > 1:
                print(f"\n{recipe}, slice {number} of {slices}", flush=True)
                train_slice(
                    flags_of(config, recipe, recipe, steps[recipe]), run_dir, steps[recipe], left
                )
            checkpoint = latest_checkpoint(run_dir)
            minutes = seconds_trained(run_dir) / 60
            points.append({"minutes": minutes} | score(config, checkpoint))
            report["machine"] = machine(pick_device(None))
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
