"""The full-size network with the default command: speed, memory, accuracy over time.

    python src/render_iclevr.py                  # 18,009 pictures, where the course's are not
    python benchmarks/full_size.py               # on a GPU; --epochs 0: speed and memory alone
    python benchmarks/full_size.py --toy         # the same stages in miniature, on a CPU

Everything comes from `python src/train.py` and `python src/test.py` as a user runs them: first some
steps with and without --compile (pictures/s, share of the card's own bf16 matmul rate, peak
memory), then the training with the faster of both, with its previews' accuracy over time, then both
test splits. Writes table, chart and JSON to output/benchmarks/full_size/; a second start goes on.
"""

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import matplotlib.pyplot as plt
import torch
from common import machine, show, spread, table
from training_step import Matmul

import test
from config import (
    RECIPES,
    ROOT,
    DataConfig,
    NonNegativeInt,
    PositiveInt,
    Settings,
    UserError,
    from_dict,
    parse_args,
    run,
    to_dict,
)
from dataset import find_data, read_objects, read_train
from device import autocast_dtype, pick_device
from files import atomic_write, make_folder, read_json, write_json
from intervals import Interval
from model import stages
from train import latest_checkpoint

TOY = "--recipe small --image_size 16 --patch_size 1 --num_train_timesteps 20 --preview_steps 5"
SAMPLING = "--scheduler dpmpp --num_inference_steps 12 --num_fd_samples 0 --wandb disabled"


@dataclass(frozen=True)
class FullSizeConfig(Settings):
    """Train the full-size network with the default command and measure."""

    epochs: NonNegativeInt = 500
    """Epochs of the training; 0: only speed and memory."""
    steps: PositiveInt = 200
    """Optimiser steps of each measurement of the speed; the first fifth is warm-up."""
    num_seeds: PositiveInt = 4
    """Draws of both test splits at the end."""
    toy: bool = False
    """A small network and few steps, to see that everything works where there is no GPU."""
    device: str | None = None
    """cuda, cuda:1, cpu ... (default: the best there is)."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "full_size"
    """Runs and results go in here."""
    data: DataConfig = field(default_factory=DataConfig)


def lines(run_dir: Path, key: str) -> list[dict]:
    """The records of metrics.jsonl that hold `key`."""
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [values for line in text.splitlines() if key in (values := json.loads(line))]


def train(config: FullSizeConfig, name: str, flags: str) -> Path:
    """`python src/train.py` in a process of its own, or go on with it; the run's folder.

    Raises:
        UserError: it failed.
    """
    run_dir = config.output_dir / name
    if latest_checkpoint(run_dir):
        if (run_dir / "done").exists():
            return run_dir
        flags += " --resume auto"
    elif config.toy:
        flags += f" {TOY}"
    data = " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in vars(config.data).items() if v)
    where = f"--run_name {name} --output_dir {shlex.quote(str(config.output_dir))} {data}"
    device = f"--device {config.device}" if config.device else ""
    command = f"{ROOT / 'src' / 'train.py'} {flags} {where} {device} --wandb disabled"
    print(f"\n$ python src/train.py {flags}", flush=True)
    code = subprocess.run([sys.executable, *shlex.split(command)]).returncode
    if code:
        raise UserError(f"src/train.py {flags}: ended with exit code {code}")
    (run_dir / "done").touch()
    return run_dir


def speed(run_dir: Path, config: FullSizeConfig) -> dict:
    """Pictures/s after the warm-up, the warm-up's seconds and the peak memory."""
    logged = lines(run_dir, "images_per_s")
    batch_size = read_json(run_dir / "config.json")["batch_size"]
    warm = [r["images_per_s"] for r in logged if r["step"] > config.steps / 5]
    cold, done = 0.0, 0
    for record in logged:
        if record["step"] <= config.steps / 5:
            cold += (record["step"] - done) * batch_size / record["images_per_s"]
            done = record["step"]
    return {
        "pictures_per_s": spread(warm),
        "warm_up_s": cold,
        "peak_memory_gib": logged[-1].get("peak_memory_gib"),
    }


def accuracy_over_time(run_dir: Path) -> list[dict]:
    """Minutes of training (previews not counted) and accuracy of every preview."""
    batch_size = read_json(run_dir / "config.json")["batch_size"]
    seconds, done, points = 0.0, 0, []
    for record in lines(run_dir, "step"):
        if "images_per_s" in record:
            seconds += (record["step"] - done) * batch_size / record["images_per_s"]
            done = record["step"]
        if "preview_accuracy" in record:
            names = ("step", "epoch", "preview_accuracy", "preview_exact_sets")
            points.append({"minutes": seconds / 60} | {name: record[name] for name in names})
    return points


def draw_chart(points: list[dict], title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    minutes = [point["minutes"] for point in points]
    for name in ("preview_accuracy", "preview_exact_sets"):
        label = name.removeprefix("preview_").replace("_", " ")
        axes.plot(minutes, [point[name] for point in points], "o-", markersize=4, label=label)
    axes.set(xlabel="minutes of training", ylabel="previews: test conditions, one draw")
    axes.set(title=title, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict:
    config = parse_args(FullSizeConfig, argv)
    device = pick_device(config.device)
    if device.type == "cpu" and not config.toy:
        raise UserError("no GPU: the full-size network would take months here; use --toy")
    paths = find_data(config.data)
    pictures = len(read_train(paths.data_dir, read_objects(paths.data_dir))[0])
    make_folder(config.output_dir)
    settings = {k: v for k, v in to_dict(config).items() if k in ("steps", "toy", "data", "epochs")}
    plan = config.output_dir / "settings.json"
    if plan.exists() and read_json(plan) != settings:
        raise UserError(f"{plan}: made with other settings; choose another --output_dir")
    write_json(plan, settings)

    dtype = autocast_dtype("auto", device) or torch.float32
    matmul = Matmul(device, dtype)
    rates = [matmul() for _ in range(5)]
    del matmul  # its memory is the training's
    variants = {}
    for name, flags in (("eager", ""), ("compiled", "--compile")):
        flags = f"--max_train_steps {config.steps} --sample_interval 1000000 {flags}".strip()
        run_dir = train(config, f"speed-{name}", flags)
        variants[name] = speed(run_dir, config)
        stored = read_json(run_dir / "config.json")
        recipe = from_dict(type(RECIPES["original"]), stored, str(run_dir))
        flops = 3 * stages(recipe.model)[2]  # the backward pass costs twice the forward pass
        share = [
            rate * flops / statistics.median(rates)
            for rate in variants[name]["pictures_per_s"]["rounds"]
        ]
        variants[name]["share_of_matmul"] = spread(share)
        variants[name]["epoch_s"] = pictures / variants[name]["pictures_per_s"]["median"]
    faster = max(variants, key=lambda name: variants[name]["pictures_per_s"]["median"])
    report = {
        "machine": machine(device),
        "settings": to_dict(config),
        "parameters": stages(recipe.model)[1],
        "training_flops_per_picture": flops,
        "matmul_flops_per_s": spread(rates),
        "variants": variants,
    }
    text = [
        f"{report['machine']['device']}, torch {report['machine']['torch']}, "
        f"{report['parameters'] / 1e6:.1f} M parameters, batch {recipe.batch_size}, {pictures:,} "
        f"pictures; matmul in {str(dtype).removeprefix('torch.')}: "
        f"{show([rate / 1e12 for rate in rates])} TFLOP/s",
        table(
            "",
            {
                "pictures/s": {n: show(v["pictures_per_s"]["rounds"]) for n, v in variants.items()},
                "share of matmul rate": {
                    n: show([100 * s for s in v["share_of_matmul"]["rounds"]], "%")
                    for n, v in variants.items()
                },
                "an epoch": {n: f"{v['epoch_s']:.1f} s" for n, v in variants.items()},
                "peak memory": {
                    n: "-" if v["peak_memory_gib"] is None else f"{v['peak_memory_gib']:.1f} GiB"
                    for n, v in variants.items()
                },
                "warm-up": {n: f"{v['warm_up_s']:.0f} s" for n, v in variants.items()},
            },
        ),
    ]
    if config.epochs:
        flags = f"--epochs {config.epochs}" + (" --compile" if faster == "compiled" else "")
        run_dir = train(config, "run", flags)
        points = accuracy_over_time(run_dir)
        report |= {"accuracy_over_time": points, "minutes": points[-1]["minutes"]}
        draw_chart(points, report["machine"]["device"], config.output_dir / "full_size.png")
        flags = f"--ckpt_path {shlex.quote(str(latest_checkpoint(run_dir)))} {SAMPLING}"
        flags += f" --num_seeds {config.num_seeds} --output_dir "
        flags += shlex.quote(str(config.output_dir / "result"))
        flags += "".join(f" --{k} {shlex.quote(str(v))}" for k, v in vars(config.data).items() if v)
        tested = test.main(shlex.split(flags))
        report["test"] = {name: tested[name] for name in ("judge", "figures", "sampling")}
        accuracy = {s: str(Interval(**f["accuracy"])) for s, f in tested["figures"].items()}
        exact = {s: str(Interval(**f["exact_sets"])) for s, f in tested["figures"].items()}
        text += [
            f"{config.epochs} epochs: {report['minutes']:.1f} minutes; judge: {tested['judge']}",
            table("split", {"accuracy": accuracy, "exact sets": exact}),
        ]
    write_json(config.output_dir / "full_size.json", report)
    with atomic_write(config.output_dir / "full_size.md") as temporary:
        temporary.write_text("\n\n".join([*text, ""]), encoding="utf-8")
    print("\n" + "\n\n".join(text) + f"\n\n{config.output_dir}")
    return report


if __name__ == "__main__":
    run(main)
