"""Trainings as a user runs them, in processes of their own: for the benchmarks that train."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from common import machine

from iclevr.dataset import find_data
from iclevr.labels import read_objects, read_train
from judging.bench import draw_splits, open_bench, split_records
from judging.evaluator import load_evaluator
from judging.intervals import mean_interval
from judging.metrics import SHARES, split_means
from runtime.files import make_folder, read_json, write_json
from runtime.settings import ROOT, DataConfig, SamplingConfig, UserError, to_dict
from training.recipes import RECIPES
from training.run_folder import latest_whole_checkpoint

PROBED_STEPS = 100
NEVER = 1000000


class Run(NamedTuple):
    """A training: flags of src/train.py, and the optimiser steps after which it is done."""

    flags: str
    steps: int


def data_flags(data: DataConfig) -> str:
    return " ".join(
        f"--{name} {shlex.quote(str(path))}" for name, path in vars(data).items() if path
    )


def check_data(data: DataConfig) -> tuple[int, str]:
    """The number of training pictures and the hash of the judge.

    Raises:
        UserError: pictures or judge are missing, before anything has been trained.
    """
    paths = find_data(data)
    objects = read_objects(paths.data_dir)
    judge = load_evaluator(paths.evaluator, objects)
    return len(read_train(paths.data_dir, objects)[0]), judge.blob


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, with "minutes": time spent in steps so far, previews not counted."""
    seconds, found = 0.0, []
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        seconds += values.get("seconds", 0.0)
        found.append(values | {"minutes": seconds / 60})
    return found


def minutes_trained(run_dir: Path, until: float = math.inf) -> float:
    """Minutes spent in the steps up to `until`."""
    return max((r["minutes"] for r in records(run_dir) if r["step"] <= until), default=0.0)


def train_all(runs: dict[str, Run], output_dir: Path, data: DataConfig, at_once: int = 1) -> None:
    """Train every run to its end, or go on with it; Ctrl-C and SIGTERM stop and save all.

    Those that train at once share the cores, so that what disturbs the machine disturbs all.

    Args:
        runs: name -> what to train.
        output_dir: folder of the runs.
        at_once: how many train at a time.

    Raises:
        UserError: some trainings failed; the others are done.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = str(max(1, cores // at_once))
    waiting, running, failed = list(runs), {}, []

    def start(name: str) -> subprocess.Popen | None:
        latest = latest_whole_checkpoint(output_dir / name)
        if latest and latest.checkpoint.step >= runs[name].steps:
            return None  # all of its steps are done
        command = f"{runs[name].flags} --run_name {name} --wandb disabled {data_flags(data)}"
        command += f" --output_dir {shlex.quote(str(output_dir))}"
        command += " --resume auto" if latest else ""
        print(f"\n$ python src/train.py {command}", flush=True)
        return subprocess.Popen(
            [sys.executable, str(ROOT / "src" / "train.py"), *shlex.split(command)],
            start_new_session=True,  # signals are this process's business
            env=os.environ | {"OMP_NUM_THREADS": threads},
        )

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                if process := start(name):
                    running[name] = process
            time.sleep(0.2)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        failed.append(f"{name} ({process.returncode})")
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()
    if failed:
        raise UserError(f"trainings that failed (exit code): {', '.join(failed)}")


def train_equally_long(
    variants: dict[str, str],
    minutes: float,
    num_checkpoints: int,
    output_dir: Path,
    data: DataConfig,
    at_once: int,
) -> None:
    """Train every variant for so many minutes, their steps by the speed of the first 100.

    The plan is kept in plan.json, by which a second start goes on.

    Args:
        variants: name -> flags.
        num_checkpoints: about so many of each run, evenly spaced, in whole epochs.

    Raises:
        UserError: the folder holds the plan of other settings, or a training failed.
    """
    pictures, _ = check_data(data)
    make_folder(output_dir)
    path = output_dir / "plan.json"
    settings = {
        "variants": variants, "minutes": minutes, "num_checkpoints": num_checkpoints,
        "data": data_flags(data), "at_once": at_once,
        "recipes": {name: to_dict(recipe) for name, recipe in RECIPES.items()},
    }  # fmt: skip
    if not path.exists():
        rare = f"--sample_interval {NEVER} --epochs {NEVER}"
        probe = f"{rare} --save_interval {NEVER} --max_train_steps {PROBED_STEPS}"
        probes = {f"probe-{n}": Run(f"{v} {probe}", PROBED_STEPS) for n, v in variants.items()}
        train_all(probes, output_dir, data, at_once)
        runs = {}
        for name, flags in variants.items():
            folder = output_dir / f"probe-{name}"
            steps = max(1, round(minutes * PROBED_STEPS / minutes_trained(folder)))
            epochs = steps * read_json(folder / "config.json")["batch_size"] / pictures
            interval = max(1, round(epochs / num_checkpoints))
            more = f"{rare} --save_interval {interval} --max_train_steps {steps}"
            runs[name] = Run(f"{flags} {more}", steps)
        write_json(path, {"settings": settings, "runs": runs})
    plan = read_json(path)
    if plan["settings"] != settings:
        raise UserError(f"{path}: made with other settings; choose another --output_dir")
    train_all({n: Run(*run) for n, run in plan["runs"].items()}, output_dir, data, at_once)


def score_all(
    checkpoints: dict[str, Path],
    data: DataConfig,
    sampling: SamplingConfig,
    num_seeds: int,
    path: Path,
    notes: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Draw and score both splits with each checkpoint: means of both, intervals over seeds.

    Args:
        checkpoints: name -> file.
        path: JSON that keeps the scores for a second start.
        notes: name -> what else to keep there.

    Returns:
        the content of `path`: {"points": {name: {figures of `SHARES`: intervals, "draws":
        each seed's values, "step", "minutes" and "pictures" of its training}}, "judge" ...}.

    Raises:
        UserError: `path` holds scores of other settings or another judge.
    """
    _, judge = check_data(data)
    how = {"sampling": to_dict(sampling), "seeds": num_seeds, "judge_hash": judge}
    how["figures"] = [*SHARES]
    report = how | {"points": {}}
    if path.exists():
        report = read_json(path)
        if how != {key: report.get(key) for key in how}:
            raise UserError(f"{path}: scored with other settings; move it away first")
    for name, checkpoint in checkpoints.items():
        if name in report["points"]:
            continue
        print(f"score {name}", flush=True)
        bench = open_bench(checkpoint, data, None)
        draws = [split_records(draw_splits(bench, sampling, seed)) for seed in range(num_seeds)]
        values = {figure: split_means(draws, figure).mean(axis=1) for figure in SHARES}
        step = bench.checkpoint.step
        report["points"][name] = {
            **{figure: vars(mean_interval(of, 0, 1)) for figure, of in values.items()},
            "draws": {figure: of.tolist() for figure, of in values.items()},
            "step": step,
            "minutes": minutes_trained(checkpoint.parents[1], step),
            "pictures": step * bench.checkpoint.config.batch_size,
            **(notes or {}).get(name, {}),
        }
        report |= {"judge": bench.judge.name, "machine": machine(bench.device)}
        write_json(path, report)
    return report


def caption(report: dict[str, Any]) -> str:
    """How the figures of `score_all` came about."""
    return (
        f"judge: {report['judge']}; {report['machine']['device']}; mean of both splits; one "
        f"training each, 95% intervals over {report['seeds']} draws"
    )
