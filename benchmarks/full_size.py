"""The full-size network with the default command: speed, memory, accuracy over time.

    python src/render_iclevr.py                  # 18,009 pictures, where the course's are not
    python benchmarks/full_size.py               # on a GPU; --epochs 0: speed and memory alone
    python benchmarks/full_size.py --toy         # the same stages in miniature, on a CPU

Everything comes from `python src/train.py` and `python src/test.py` as a user runs them: first some
steps with and without --compile (pictures/s, share of the card's own bf16 matmul rate, peak
memory), then the training with the faster of both, with its previews' accuracy over time, then both
test splits. Writes table, chart and JSON to output/benchmarks/full_size/; a second start goes on.
"""

import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import matplotlib.pyplot as plt
import torch
from common import machine, show, spread, table
from training_runs import NEVER, Run, check_data, data_flags, records, train_all
from training_step import Matmul

import test
from config import (
    RECIPES,
    ROOT,
    DataConfig,
    NonNegativeInt,
    PositiveInt,
    Settings,
    TrainConfig,
    UserError,
    from_dict,
    parse_args,
    run,
    to_dict,
)
from device import autocast_dtype, pick_device
from figures import save_figure
from files import atomic_write, make_folder, read_json, write_json
from intervals import Interval
from model import stages
from resume import latest_checkpoint

TOY = "--recipe small --image_size 16 --patch_size 1 --num_train_timesteps 20 --preview_steps 5"
SAMPLING = "--scheduler dpmpp --num_inference_steps 12 --num_fd_samples 0 --wandb disabled"


@dataclass(frozen=True)
class FullSizeConfig(Settings):
    """Train the full-size network with the default command and measure."""

    epochs: NonNegativeInt | None = None
    """Epochs of the training (default: 500, with --toy 1); 0: only speed and memory."""
    steps: PositiveInt = 200
    """Optimiser steps of each measurement of the speed; the first fifth is warm-up."""
    num_seeds: PositiveInt = 4
    """Draws of both test splits at the end."""
    toy: bool = False
    """A small network on small pictures, to see that everything works where there is no GPU."""
    device: str | None = None
    """cuda, cuda:1, cpu ... (default: the best there is)."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "full_size"
    """Runs and results go in here."""
    data: DataConfig = field(default_factory=DataConfig)


def speed(run_dir: Path, steps: int) -> dict:
    """Pictures/s after the warm-up, the warm-up's seconds and the peak memory."""
    logged = [r for r in records(run_dir) if "images_per_s" in r]
    cold = [r for r in logged if r["step"] <= steps / 5]
    return {
        "pictures_per_s": spread([r["images_per_s"] for r in logged if r not in cold]),
        "warm_up_s": 60 * cold[-1]["minutes"] if cold else 0.0,
        "peak_memory_gib": logged[-1].get("peak_memory_gib"),
    }


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
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> dict:
    config = parse_args(FullSizeConfig, argv)
    device = pick_device(config.device)
    if device.type == "cpu" and not config.toy:
        raise UserError("no GPU: the full-size network would take months here; use --toy")
    pictures, _ = check_data(config.data)
    make_folder(config.output_dir)
    where = machine(device)
    settings = {
        "steps": config.steps, "toy": config.toy, "data": to_dict(config.data), "machine": where,
        "recipes": {name: to_dict(recipe) for name, recipe in RECIPES.items()},
    }  # fmt: skip
    plan = config.output_dir / "settings.json"
    if plan.exists() and read_json(plan) != settings:
        raise UserError(f"{plan}: made with other settings; choose another --output_dir")
    write_json(plan, settings)
    common = f"{TOY if config.toy else ''} --device {device}"

    dtype = autocast_dtype("auto", device) or torch.float32
    matmul = Matmul(device, dtype)
    rates = [matmul() for _ in range(5)]
    del matmul
    if device.type == "cuda":
        torch.cuda.empty_cache()  # its memory is the training's
    variants = {}
    for name, flag in (("eager", ""), ("compiled", "--compile")):
        flags = f"{common} {flag} --max_train_steps {config.steps} --sample_interval {NEVER}"
        flags += (
            f" --save_interval {NEVER} --epochs {NEVER} --log_interval {-(-config.steps // 10)}"
        )
        train_all({f"speed-{name}": Run(flags, config.steps)}, config.output_dir, config.data)
        run_dir = config.output_dir / f"speed-{name}"
        variants[name] = speed(run_dir, config.steps)
        recipe = from_dict(TrainConfig, read_json(run_dir / "config.json"), str(run_dir))
        flops = 3 * stages(recipe.model)[2]  # the backward pass costs twice the forward pass
        share = [
            rate * flops / statistics.median(rates)
            for rate in variants[name]["pictures_per_s"]["rounds"]
        ]
        variants[name]["share_of_matmul"] = spread(share)
        variants[name]["epoch_s"] = pictures / variants[name]["pictures_per_s"]["median"]
    faster = max(variants, key=lambda name: variants[name]["pictures_per_s"]["median"])
    report = {
        "machine": where,
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
    epochs = (1 if config.toy else 500) if config.epochs is None else config.epochs
    if epochs:
        flags = f"{common} --epochs {epochs}" + (" --compile" if faster == "compiled" else "")
        flags += " --sample_interval 1" if config.toy else ""
        steps = epochs * (pictures // recipe.batch_size)
        train_all({"run": Run(flags, steps)}, config.output_dir, config.data)
        run_dir = config.output_dir / "run"
        points = [r for r in records(run_dir) if "preview_accuracy" in r]
        report |= {"accuracy_over_time": points, "minutes": points[-1]["minutes"]}
        draw_chart(points, where["device"], config.output_dir / "full_size.png")
        flags = f"--ckpt_path {shlex.quote(str(latest_checkpoint(run_dir)))} {SAMPLING}"
        flags += f" --num_seeds {config.num_seeds} --device {device} {data_flags(config.data)}"
        flags += f" --output_dir {shlex.quote(str(config.output_dir / 'result'))}"
        tested = test.main(shlex.split(flags))
        report["test"] = {name: tested[name] for name in ("judge", "figures", "sampling")}
        columns = {
            name.replace("_", " "): {
                s: str(Interval(**f[name])) for s, f in tested["figures"].items()
            }
            for name in ("accuracy", "exact_sets")
        }
        text += [
            f"{epochs} epochs: {report['minutes']:.1f} minutes in steps; judge: {tested['judge']}",
            table("split", columns),
        ]
    write_json(config.output_dir / "full_size.json", report)
    with atomic_write(config.output_dir / "full_size.md") as temporary:
        temporary.write_text("\n\n".join([*text, ""]), encoding="utf-8")
    print("\n" + "\n\n".join(text) + f"\n\n{config.output_dir}")
    return report


if __name__ == "__main__":
    run(main)
