"""What each choice of a recipe is worth: one change at a time, equal training time.

    python benchmarks/ablations.py --minutes 10
    python benchmarks/ablations.py --minutes 7 --recipe tiny

Every variant is `python src/train.py --recipe small` (or `tiny`) with one thing changed, mostly
back to what the recipe before it has. All of them train for the same time, two at once with half
of the cores each, and are scored with the same sampler and noise. Differences to the recipe as it
is are paired by seed. Writes table and JSON to output/benchmarks/ablations/<recipe>/; a second
start goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from training_runs import caption, score_all, train_equally_long

from judging.figures import save_text
from judging.intervals import Interval, mean_interval
from judging.metrics import markdown
from runtime.settings import (
    ROOT,
    DataConfig,
    PositiveFloat,
    PositiveInt,
    SamplingConfig,
    Settings,
    UserError,
    parse_args,
    run,
)
from training.run_folder import latest_checkpoint

BASE = "as-it-is"
OF_SMALL = {
    BASE: ("", "the recipe as it is"),
    "adamw": ("--optimizer adamw --lr 1e-3", "AdamW at its best rate of those tried, not Muon"),
    "no-shift": (
        "--log_snr_shift 0 --timestep_power 3",
        "no shift towards noise (Hoogeboom et al. 2023), noisy timesteps favoured instead",
    ),
    "shift-2.8": ("--log_snr_shift -2.8", "a smaller shift"),
    "shift-5.5": ("--log_snr_shift -5.5", "a larger shift"),
    "batch-16": ("--batch_size 16", "batches of 16, not 32"),
    "added-embedding": (
        "--resnet_time_scale_shift default",
        "embeddings added, not scale and shift (Dhariwal & Nichol 2021)",
    ),
    "plain-init": ("--no-zero_init", "PyTorch's initial weights"),
    "epsilon": ("--prediction_type epsilon", "predicts eps, not v (Salimans & Ho 2022)"),
    "unscaled": (
        "--scaling_factor 1 --shift_factor 0 --log_snr_shift 0",
        "pictures not scaled to unit variance (Rombach et al. 2022), and no shift",
    ),
    "independent-timesteps": (
        "--no-stratified_timesteps",
        "timesteps drawn independently, not spread over a batch",
    ),
    "min-snr": ("--min_snr_gamma 5", "Min-SNR weights, gamma 5 (Hang et al. 2023)"),
    "patch-4": ("--patch_size 4", "patches of 4x4 pixels (Luhman & Luhman 2022), not 2x2"),
    "attention-16": (
        "--down_block_types DownBlock2D AttnDownBlock2D AttnDownBlock2D AttnDownBlock2D "
        "--up_block_types AttnUpBlock2D AttnUpBlock2D AttnUpBlock2D UpBlock2D",
        "attention at 16x16 positions too",
    ),
    "batch-64": ("--batch_size 64", "batches of 64"),
    "lr-3e-3": ("--lr 3e-3", "twice the learning rate"),
    "aligned": (
        "--align_to output/teacher.pth",
        "features aligned to a classifier's (REPA, Yu et al. 2024), see README",
    ),
    "wider-coarse": ("--block_out_channels 32 64 128 192", "192 channels at 4x4 positions"),
    "embeddings-512": ("--time_embedding_dim 512", "embeddings of 512 channels, not 128"),
    "no-average": ("--no-ema", "no average of the weights"),
    "longer-average": ("--ema_decay 0.9995", "an average over four times as many steps"),
    "float32": ("--mixed_precision no", "float32, not bfloat16"),
}
"""Name -> flag that is changed, and what it changes."""

OF_TINY = {
    BASE: ("", "the recipe as it is"),
    "v": ("--prediction_type v_prediction", "predicts v (Salimans & Ho 2022), not x_0"),
    "all-scenes-alike": ("--objects_power 0", "full scenes come no more often than others"),
    "full-scenes-less": ("--objects_power 1", "full scenes come in proportion to their objects"),
    "even-timesteps": ("--timestep_interval 0 1", "no noise levels come more often than others"),
    "plain-levels": ("--no-equal_levels", "noise levels count as their losses are large"),
    "batch-32": ("--batch_size 32 --lr 1.5e-3", "batches of 32 at their rate"),
    "batch-128": ("--batch_size 128 --lr 3e-3 --lr_warmup_steps 30", "batches of 128 at theirs"),
    "lr-3e-3": ("--lr 3e-3", "a larger learning rate"),
    "attention-16": (
        "--down_block_types AttnDownBlock2D AttnDownBlock2D AttnDownBlock2D "
        "--up_block_types AttnUpBlock2D AttnUpBlock2D AttnUpBlock2D",
        "attention at 16x16 positions too",
    ),
}
VARIANTS: dict[str, dict[str, tuple[str, str]]] = {"small": OF_SMALL, "tiny": OF_TINY}


@dataclass(frozen=True)
class AblationConfig(Settings):
    """Train a recipe with one change at a time, for the same time, and score."""

    recipe: Literal["small", "tiny"] = "small"
    """Whose choices."""
    minutes: PositiveFloat = 10.0
    """Training time of each variant."""
    at_once: PositiveInt = 2
    """Trainings at a time; the cores are shared between them."""
    variants: tuple[str, ...] = ()
    """Which to train, default: all; the recipe as it is always comes along."""
    num_seeds: PositiveInt = 8
    """Draws of both splits."""
    sampling: SamplingConfig = SamplingConfig(
        scheduler="dpmpp", num_inference_steps=20, guidance_scale=3.0
    )
    """Of all."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "ablations"
    """Runs and results go in here."""
    data: DataConfig = field(default_factory=DataConfig)


def main(argv: Sequence[str] | None = None) -> dict:
    config = parse_args(AblationConfig, argv)
    variants = VARIANTS[config.recipe]
    for name in config.variants:
        if name not in variants:
            raise UserError(
                f"--variants {name}: unknown for --recipe {config.recipe}; there are "
                f"{', '.join(variants)}"
            )
    names = [BASE, *(name for name in config.variants or variants if name != BASE)]
    flags = {name: f"--recipe {config.recipe} {variants[name][0]}" for name in names}
    folder = config.output_dir / config.recipe
    train_equally_long(flags, config.minutes, 1, folder, config.data, config.at_once)
    found = {name: latest_checkpoint(folder / name) for name in names}
    path = folder / "ablations.json"
    notes = {name: {"flags": flags[name]} for name in names}
    report = score_all(found, config.data, config.sampling, config.num_seeds, path, notes)
    text = summary(report, variants)
    save_text(text, folder / "ablations.md")
    print(f"{text}\n{folder}")
    return report


def summary(report: dict, variants: dict[str, tuple[str, str]]) -> str:
    """A line for each variant, with its difference to the recipe as it is."""
    head = ["change", "flag", "minutes", "pictures seen", "accuracy", "difference", "exact sets"]
    rows = []
    base = np.array(report["points"][BASE]["draws"]["accuracy"])
    for name, point in report["points"].items():
        flag, what = variants[name]
        difference = mean_interval(np.array(point["draws"]["accuracy"]) - base)
        rows.append([
            what, flag and f"`{flag}`", f"{point['minutes']:.1f}", f"{point['pictures']:,}",
            Interval(**point["accuracy"]), "-" if name == BASE else difference,
            Interval(**point["exact_sets"]),
        ])  # fmt: skip
    return f"{markdown(head, rows, num_texts=2)}\n\n{caption(report)}"


if __name__ == "__main__":
    run(main)
