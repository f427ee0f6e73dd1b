"""What each choice of the small recipe is worth: one change at a time, equal training time.

    python benchmarks/ablations.py --minutes 10

Every variant is `python src/train.py --recipe small` with one flag changed, mostly back to what the
original recipe has. All of them train for the same time, two at once with half of the cores each,
and are scored with the same sampler and noise. Differences to the recipe as it is are paired by
seed. Writes table and JSON to output/benchmarks/ablations/; a second start goes on.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
from common import machine
from sampling_steps import share_interval
from training_runs import plan_runs, score, seconds_trained, train_all

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
from intervals import Interval, mean_interval
from train import latest_checkpoint

BASE = "small"
VARIANTS = {
    BASE: ("", "the recipe as it is"),
    "added-embedding": (
        "--resnet_time_scale_shift default",
        "embeddings added, not scale and shift (Dhariwal & Nichol 2021)",
    ),
    "patch-4": ("--patch_size 4", "patches of 4x4 pixels (Luhman & Luhman 2022)"),
    "pixels-32": ("--image_size 32 --patch_size 1", "32x32 pictures, no patches"),
    "epsilon": (
        "--prediction_type epsilon",
        "predicts eps, not v (Salimans & Ho 2022)",
    ),
    "unscaled": (
        "--scaling_factor 1 --shift_factor 0",
        "pictures not scaled to unit variance (Rombach et al. 2022)",
    ),
    "plain-init": ("--no-zero_init", "PyTorch's initial weights"),
    "uniform-timesteps": ("--timestep_power 1", "timesteps drawn uniformly"),
    "min-snr": ("--min_snr_gamma 5", "Min-SNR weights, gamma 5 (Hang et al. 2023)"),
    "batch-64": ("--batch_size 64", "batches of 64, not 16"),
    "lr-1e-4": ("--lr 1e-4", "learning rate 1e-4, not 1e-3"),
    "beta2-0.999": ("--adam_beta2 0.999", "AdamW's beta2 .999, not .99"),
    "no-average": ("--no-ema", "no average of the weights"),
    "float32": ("--mixed_precision no", "float32, not bfloat16"),
}
"""Name -> flag that is changed, and what it changes."""


@dataclass(frozen=True)
class AblationConfig(Settings):
    """Train the small recipe with one change at a time, for the same time, and score."""

    minutes: PositiveFloat = 10.0
    """Training time of each variant."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which to train; the recipe as it is always comes along."""
    num_seeds: PositiveInt = 8
    """Draws of both splits."""
    sampling: SamplingConfig = SamplingConfig(scheduler="dpmpp", num_inference_steps=12)
    output_dir: Path = ROOT / "output" / "benchmarks" / "ablations"
    """Runs and results go in here."""
    data: DataConfig = field(default_factory=DataConfig)


def main(argv: Sequence[str] | None = None) -> dict:
    config = parse_args(AblationConfig, argv)
    for name in config.variants:
        if name not in VARIANTS:
            raise UserError(f"--variants {name}: unknown; there are {', '.join(VARIANTS)}")
    find_data(config.data)  # an error ends it here
    make_folder(config.output_dir)
    names = [BASE, *(name for name in config.variants if name != BASE)]
    flags = {name: f"--recipe small {VARIANTS[name][0]}" for name in names}
    runs = plan_runs(flags, config.minutes, 1, config.output_dir, config.data)
    train_all(runs, config.output_dir, config.data)
    path = config.output_dir / "ablations.json"
    how = {"sampling": to_dict(config.sampling), "seeds": config.num_seeds}
    report = how | {"rows": {}}
    if path.exists():
        report = read_json(path)
        if how != {key: report[key] for key in how}:
            raise UserError(f"{path}: scored with other settings; move it away first")
    report["machine"] = machine(pick_device(None))
    for name in names:
        if name not in report["rows"]:
            print(name, flush=True)
            run_dir = config.output_dir / name
            checkpoint = latest_checkpoint(run_dir)
            row = score(checkpoint, config.data, config.sampling, config.num_seeds)
            row |= {"minutes": seconds_trained(run_dir) / 60, "flags": flags[name]}
            row["pictures"] = row["step"] * read_json(run_dir / "config.json")["batch_size"]
            report["rows"][name] = row
            write_json(path, report)
    text = summary(report)
    with atomic_write(config.output_dir / "ablations.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(f"{text}\n{config.output_dir}")
    return report


def summary(report: dict) -> str:
    """A line for each variant, with its difference to the recipe as it is."""
    lines = [
        "| change | flag | pictures seen | accuracy | difference | exact sets |",
        "|---|---|---:|---:|---:|---:|",
    ]
    base = np.array(report["rows"][BASE]["draws"]["accuracy"])
    for name, row in report["rows"].items():
        difference = "-"
        if name != BASE:
            paired = np.array(row["draws"]["accuracy"]) - base
            equal = len(set(paired.tolist())) == 1
            interval = Interval(float(paired[0]), None, None) if equal else mean_interval(paired)
            difference = str(interval)
        flag, what = VARIANTS[name]
        cells = " | ".join(
            [f"{row['pictures']:,}", str(Interval(**row["accuracy"])), difference,
             str(share_interval(np.array(row["draws"]["exact_sets"])))]
        )  # fmt: skip
        lines.append(f"| {what} | {f'`{flag}`' if flag else ''} | {cells} |")
    minutes = report["rows"][BASE]["minutes"]
    lines += [
        "",
        f"{minutes:.0f} minutes of training each; judge: {report['rows'][BASE]['judge']}; "
        f"{report['machine']['device']}; mean of both splits, {report['seeds']} seeds, "
        "95% interval",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
