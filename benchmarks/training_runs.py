"""Trainings of equal time, side by side: what time_to_accuracy.py and ablations.py share."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from sampling_steps import share_interval, shares

from checkpoint import load_checkpoint
from config import ROOT, DataConfig, SamplingConfig, UserError
from dataset import find_data
from files import read_json, write_json
from guidance_scale import Draw
from metrics import record
from scoring import draw_splits, open_bench
from train import latest_checkpoint

PROBED_STEPS = 100


def data_flags(data: DataConfig) -> str:
    return " ".join(
        f"--{name} {shlex.quote(str(path))}" for name, path in vars(data).items() if path
    )


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


def train_all(
    runs: dict[str, tuple[str, int, int]], output_dir: Path, data: DataConfig, at_once: int = 2
) -> None:
    """Train runs side by side, or go on with them; Ctrl-C stops and saves all.

    Each is a `python src/train.py` of its own; those that run at once share the cores, so that
    what disturbs the machine disturbs all of them.

    Args:
        runs: name -> its flags, optimiser steps, epochs between checkpoints.
        output_dir: folder of the runs.
        at_once: how many train at a time.

    Raises:
        UserError: a training failed.
    """
    threads = max(1, (os.cpu_count() or 1) // at_once)
    waiting = []
    for name, (flags, steps, save_interval) in runs.items():
        latest = latest_checkpoint(output_dir / name)
        if latest and load_checkpoint(latest).step >= steps:
            continue  # all of its steps are done
        command = (
            f"{flags} --run_name {name} --output_dir {shlex.quote(str(output_dir))}"
            f" --max_train_steps {steps} --epochs 1000000 --save_interval {save_interval}"
            f" --sample_interval 1000000 --wandb disabled {data_flags(data)}"
            f" {'--resume auto' if latest else ''}"
        )
        waiting.append((name, [str(ROOT / "src" / "train.py"), *shlex.split(command)]))
    running: dict[str, subprocess.Popen] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, command = waiting.pop(0)
                running[name] = subprocess.Popen(
                    [sys.executable, *command],
                    start_new_session=True,  # Ctrl-C is this process's business
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                )
            time.sleep(0.2)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        raise UserError(f"{name}: training ended with code {process.returncode}")
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()


def plan_runs(
    variants: dict[str, str],
    minutes: float,
    num_checkpoints: int,
    output_dir: Path,
    data: DataConfig,
    at_once: int = 2,
) -> dict[str, tuple[str, int, int]]:
    """Steps that fit into the budget, from the speed of the first 100; for `train_all`.

    Kept in plan.json for a second start.

    Args:
        variants: name -> flags.
        num_checkpoints: about so many of each run, evenly spaced, in whole epochs.

    Raises:
        UserError: the folder holds the plan of other settings.
    """
    path = output_dir / "plan.json"
    settings = {
        "variants": variants, "minutes": minutes, "num_checkpoints": num_checkpoints,
        "data": data_flags(data), "at_once": at_once,
    }  # fmt: skip
    if path.exists():
        plan = read_json(path)
        if plan["settings"] != settings:
            raise UserError(f"{path}: made with other settings; choose another --output_dir")
        return {name: tuple(values) for name, values in plan["runs"].items()}
    probes = {f"probe-{name}": (flags, PROBED_STEPS, 1000000) for name, flags in variants.items()}
    train_all(probes, output_dir, data, at_once)
    pictures = len(read_json(find_data(data).data_dir / "train.json"))
    runs = {}
    for name, flags in variants.items():
        folder = output_dir / f"probe-{name}"
        steps = max(1, round(minutes * 60 * PROBED_STEPS / seconds_trained(folder)))
        epochs = steps * read_json(folder / "config.json")["batch_size"] / pictures
        runs[name] = (flags, steps, max(1, round(epochs / num_checkpoints)))
    write_json(path, {"settings": settings, "runs": runs})
    return runs


def score(path: Path, data: DataConfig, sampling: SamplingConfig, num_seeds: int) -> dict[str, Any]:
    """Draw both splits with a checkpoint: mean of both, with the interval over seeds.

    Returns:
        the intervals, each seed's value ("draws"), judge and step.
    """
    bench = open_bench(path, data, None)
    draws = []
    for seed in range(num_seeds):
        splits = draw_splits(bench, sampling, seed)
        draws.append(Draw({split: record(result) for split, (_, result) in splits.items()}))
    values = {figure: shares(draws, figure) for figure in ("accuracy", "exact_sets")}
    return {figure: vars(share_interval(of_seeds)) for figure, of_seeds in values.items()} | {
        "draws": {figure: of_seeds.tolist() for figure, of_seeds in values.items()},
        "judge": bench.judge.name,
        "step": bench.checkpoint.step,
    }
