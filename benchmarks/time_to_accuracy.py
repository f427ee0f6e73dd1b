"""Accuracy over training time: the original recipe and ours, the same network, pictures and judge.

    python benchmarks/time_to_accuracy.py --minutes 90

Both recipes train at the same time, each `python src/train.py` with half of the processor's cores,
so that what disturbs the machine disturbs both; only their steps count as time. Each learning
rate's decay ends with the budget. Then every checkpoint is scored with the same sampler. The
original recipe here drops conditions picture by picture, not batch by batch as the original did.
Writes table, chart and JSON to output/benchmarks/time_to_accuracy/; a second start goes on.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
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
from train import checkpoints, latest_checkpoint

NETWORK = (
    f"--image_size {SMALL.image_size} --patch_size {SMALL.patch_size}"
    f" --layers_per_block {SMALL.layers_per_block}"
    f" --resnet_time_scale_shift {SMALL.resnet_time_scale_shift}"
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
    """Train both recipes side by side and score them along the way."""

    minutes: PositiveFloat = 90.0
    """Training time of each recipe."""
    num_checkpoints: PositiveInt = 9
    """About so many of each recipe are written and scored, evenly spaced, in whole epochs."""
    num_seeds: PositiveInt = 4
    """Draws of both splits for each checkpoint."""
    guidance_scale: float = 5.0
    """Guidance scale of both."""
    network: str = NETWORK
    """Flags of the network, for both: --network="--image_size 32 ..."."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "time_to_accuracy"
    """Runs and results go in here."""
    data: DataConfig = field(default_factory=DataConfig)


def seconds_trained(run_dir: Path, until: float = math.inf) -> float:
    """Time spent in the steps up to `until`, from the images per second in metrics.jsonl."""
    config = read_json(run_dir / "config.json")
    seconds, step = 0.0, 0
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if "images_per_s" in values and values["step"] <= until:
            seconds += (values["step"] - step) * config["batch_size"] / values["images_per_s"]
            step = values["step"]
    return seconds


def train_all(config: TimeConfig, runs: dict[str, tuple[str, int, int]]) -> None:
    """Train all recipes side by side, or go on; Ctrl-C stops and saves all.

    Args:
        runs: recipe -> name of its run, steps, epochs between checkpoints.

    Raises:
        UserError: a training failed.
    """
    threads = max(1, (os.cpu_count() or 1) // len(runs))
    processes = {}
    for recipe, (name, steps, save_interval) in runs.items():
        latest = latest_checkpoint(config.output_dir / name)
        if latest and load_checkpoint(latest).step >= steps:
            continue  # all of its steps are done
        flags = (
            f"--run_name {name} --output_dir {shlex.quote(str(config.output_dir))}"
            f" --max_train_steps {steps} --epochs 1000000 --save_interval {save_interval}"
            f" --sample_interval 1000000 --wandb disabled {data_flags(config.data)}"
            f" {config.network} {FLAGS[recipe]} {'--resume auto' if latest else ''}"
        )
        processes[recipe] = subprocess.Popen(
            [sys.executable, str(ROOT / "src" / "train.py"), *shlex.split(flags)],
            start_new_session=True,  # Ctrl-C is this process's business
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
    try:
        for process in processes.values():
            process.wait()
    finally:
        for process in processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
    for recipe, process in processes.items():
        if process.returncode:
            raise UserError(f"{recipe}: training ended with exit code {process.returncode}")


def data_flags(data: DataConfig) -> str:
    return " ".join(
        f"--{name} {shlex.quote(str(path))}" for name, path in vars(data).items() if path
    )


def plan_runs(config: TimeConfig) -> dict[str, tuple[str, int, int]]:
    """Steps that fit into the budget, from the speed of 100; kept for a second start."""
    path = config.output_dir / "plan.json"
    settings = {k: v for k, v in to_dict(config).items() if k != "output_dir"}
    if path.exists():
        plan = read_json(path)
        if plan["settings"] != settings:
            raise UserError(f"{path}: made with other settings; choose another --output_dir")
        return {recipe: tuple(values) for recipe, values in plan["runs"].items()}
    probes = {recipe: (f"probe-{recipe}", 100, 1000000) for recipe in FLAGS}
    train_all(config, probes)
    pictures = len(read_json(find_data(config.data).data_dir / "train.json"))
    runs = {}
    for recipe, (name, probed, _) in probes.items():
        folder = config.output_dir / name
        steps = max(1, round(config.minutes * 60 * probed / seconds_trained(folder)))
        epochs = steps * read_json(folder / "config.json")["batch_size"] / pictures
        runs[recipe] = (recipe, steps, max(1, round(epochs / config.num_checkpoints)))
    write_json(path, {"settings": settings, "runs": runs})
    return runs


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
    train_all(config, plan_runs(config))
    path = config.output_dir / "time_to_accuracy.json"
    report = read_json(path) if path.exists() else {"points": {recipe: [] for recipe in FLAGS}}
    report["machine"] = machine(pick_device(None))
    for recipe in FLAGS:
        points = report["points"][recipe]
        run_dir = config.output_dir / recipe
        for checkpoint in checkpoints(run_dir):
            if all(point["checkpoint"] != checkpoint.name for point in points):
                print(f"{recipe}: {checkpoint.name}", flush=True)
                points.append({"checkpoint": checkpoint.name} | score(config, checkpoint))
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
