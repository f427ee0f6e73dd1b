"""Stages of gpu_session.py: trainings of some minutes, drawn and judged."""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common import show, table
from gpu_job import CHOICES, ORIGINAL, SMALL, TOY_STEPS, Job, free_memory
from gpu_speed import measure
from training_runs import NEVER, records

import export
import test
import train
from judging.figures import plt, save_figure, save_image
from judging.intervals import Interval
from network.checkpoint import PRETRAINED
from runtime.files import read_json
from training.run_folder import latest_checkpoint

PART = 15 * 2**20
"""Bytes of one file of the network's weights."""


def train_run(job: Job, name: str, flags: str, seconds: float) -> list[dict[str, Any]]:
    """src/train.py; when time is up it is stopped, and saves. Returns its records."""
    shutil.rmtree(job.work / "runs" / name, ignore_errors=True)  # of a session before
    free_memory()
    always = f"--run_name {name} --epochs {NEVER} --save_interval {NEVER} --log_interval 10"
    flags = f"{always} --preview_steps {5 if job.toy else 25} {flags}"
    print(f"\n$ python src/train.py {flags}", flush=True)
    clock = threading.Timer(max(seconds, 1), os.kill, (os.getpid(), signal.SIGTERM))
    # Before the training listens and after it has stopped listening, the signal ends it, too.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    clock.start()
    try:
        train.main(job.argv(flags, output_dir=job.work / "runs"))
    except SystemExit:
        print(f"{name}: stopped before its last step", flush=True)
    finally:
        clock.cancel()
        signal.signal(signal.SIGTERM, before)
    return records(job.work / "runs" / name)


def epochs_between(job: Job, previews: int, seen: int) -> int:
    """Epochs from one preview to the next, for so many in a training on `seen` pictures."""
    return max(1, round(seen / read_json(job.work / "data.json")["pictures"] / previews))


def previews(found: list[dict[str, Any]]) -> str:
    """Such as ".51 after 1.2 minutes, ..."."""
    points = [r for r in found if "preview_accuracy" in r]
    cells = [f"{p['preview_accuracy']:.3f} after {p['minutes']:.1f}" for p in points]
    return "previews' accuracy over minutes in steps: " + (", ".join(cells) or "none")


def compile_or_not(
    eager: dict[str, Any], compiled: dict[str, Any] | None, seconds: float
) -> tuple[bool, float, float]:
    """What gives more pictures in the time: whether to compile, pictures/s, seconds of warm-up."""
    plain = eager["pictures_per_s"]["median"]
    if compiled:
        rate, warm_up = compiled["pictures_per_s"]["median"], compiled["warm_up_s"]
        if rate * (seconds - warm_up) > plain * seconds:
            return True, rate, warm_up
    return False, plain, 0.0


def small(job: Job) -> None:
    """Train the widened small network for the time there is, draw with it, and judge it."""
    config, since = job.settings(SMALL), time.time()
    speed = job.work / "speed.json"
    rows = read_json(speed).get("variants", {}) if speed.exists() else {}
    eager = rows.get(SMALL) or measure(job, config)
    compiled = rows.get(f"{SMALL}, compiled")
    seconds = job.left() - (0 if job.toy else 35)  # to draw, judge and export
    compiles, rate, warm_up = compile_or_not(eager, compiled, seconds)
    # What previews, loader and start take is left over: the learning rate must come to its end.
    steps = int(0.9 * rate * (seconds - warm_up - 5) / config.batch_size)
    steps = TOY_STEPS if job.toy else max(steps, 100)
    flags = f"{job.flags(SMALL)} --max_train_steps {steps} --lr_warmup_steps {steps // 50} "
    flags += f"--ema_decay {max(0.9, 1 - 10 / steps):.5f} "
    flags += f"--sample_interval {epochs_between(job, 6, steps * config.batch_size)}"
    flags += " --compile" if compiles else ""
    found = train_run(job, "small", flags, seconds)
    minutes, seen = found[-1]["minutes"], found[-1]["step"] * config.batch_size
    speeds = [r["images_per_s"] for r in found if "images_per_s" in r]
    job.note(
        f"`{flags}`: {minutes:.1f} minutes in steps, {(time.time() - since) / 60:.1f} in all, "
        f"{seen:,} pictures, {show(speeds)} a second; {previews(found)}",
        flags=flags, minutes=minutes, pictures_seen=seen, steps_planned=steps,
        records=[r for r in found if "preview_accuracy" in r],
    )  # fmt: skip
    whole, half = latest_checkpoint(job.work / "runs" / "small"), job.work / "network.pth"
    half.unlink(missing_ok=True)
    export.main(["--ckpt_path", str(whole), "--to", "half", "--out", str(half),
                 "--run_name", "standin-gpu"])  # fmt: skip
    for old in job.out.glob("network.pth.*"):  # of a session before
        old.unlink()
    weights = half.read_bytes()
    for number, start in enumerate(range(0, len(weights), PART)):
        (job.out / f"network.pth.{number}").write_bytes(weights[start : start + PART])
    draw_and_judge(job, half)


def draw_and_judge(job: Job, network: Path) -> None:
    """Both splits, several draws, beside the network that comes with the repository."""
    columns: dict[str, dict[str, str]] = {}
    seeds, steps = (1, 5) if job.toy else (8, 12)
    todo = {f"this network, DDPM {steps}": (network, steps),
            f"the shipped one, DDPM {steps}": (PRETRAINED, steps),
            "this network, DDPM 20": (network, 20)}  # fmt: skip
    judged = {}
    for label, (path, count) in todo.items():
        if job.left() < 6 or (job.toy and count > steps):
            print(f"no time for {label}", flush=True)
            continue
        flags = f"--scheduler ddpm --num_inference_steps {count} --num_seeds {seeds} "
        flags += "--num_fd_samples 0"
        report = test.main(job.argv(flags, ckpt_path=path, output_dir=job.work / "result"))
        judged[label] = {"figures": report["figures"], "judge": report["judge"]}
        for split, figures in report["figures"].items():
            for figure in ("accuracy", "exact_sets"):
                column = columns.setdefault(f"{split} {figure.replace('_', ' ')}", {})
                column[label] = str(Interval(**figures[figure]))
        if len(judged) == 1:
            (folder,) = (job.work / "result" / "standin-gpu").glob(f"*-{report['settings']}")
            grids = [Image.open(folder / f"{split}_grid.png") for split in report["figures"]]
            save_image(Image.fromarray(np.concatenate(grids)), job.out / "pictures.png")
        job.note(judged=judged)
    job.note(f"{table('network, sampling', columns)}\n\n{seeds} seeds, guidance 3, unguided by the "
             "judge (the stand-in's)")  # fmt: skip


def recipes(job: Job) -> None:
    """Both recipes on the full-size network, equally long: accuracy of previews over time."""
    rates = {
        name: measure(job, job.settings(name))["pictures_per_s"]["median"]
        for name in (ORIGINAL, CHOICES)
    }
    each = job.left() / 2 - (0 if job.toy else 3)
    runs: dict[str, list[dict[str, Any]]] = {}
    for number, (name, rate) in enumerate(rates.items()):
        batch = job.settings(name).batch_size
        # Ten seconds for start, previews and a checkpoint of some gigabytes.
        steps = TOY_STEPS if job.toy else max(50, int(rate * (each - 12) / batch))
        flags = f"{job.flags(name)} --max_train_steps {steps} "
        flags += f"--sample_interval {epochs_between(job, 5, steps * batch)}"
        found = train_run(job, f"full-{number}", flags, each)
        runs[name] = [r for r in found if "preview_accuracy" in r]
        job.note(
            f"{name}, {found[-1]['step']} steps, {rate:,.0f} pictures/s: {previews(found)}",
            **{name: {"flags": flags, "pictures_per_s": rate, "previews": runs[name]}},
        )
        draw_chart(job, runs)


def draw_chart(job: Job, runs: dict[str, list[dict[str, Any]]]) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, points in runs.items():
        x, y = ([p[key] for p in points] for key in ("minutes", "preview_accuracy"))
        axes.plot(x, y, "o-", markersize=4, label=name)
    axes.set(xlabel="minutes in steps", ylabel="previews' accuracy, one draw", ylim=(0, 1))
    axes.set(title=f"full-size network, {job.report['machine']['device']}")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, job.out / "recipes.png")
