"""Sweep the guidance scale: accuracy on both splits for every scale, from the same noise.

    python src/guidance_scale.py --ckpt_path output/ddpm-cfg-v1/checkpoints/model_epoch_500.pth

Writes output/result/<run>/guidance_scale/<settings>/: sweep.csv, sweep.md, sweep.png, sweep.json,
and draws.jsonl, from which an interrupted sweep goes on.
"""

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
from pydantic import Field
from tqdm import tqdm

from config import (
    ROOT,
    DataConfig,
    PositiveFloat,
    SamplerConfig,
    SamplingConfig,
    Seed,
    Settings,
    UserError,
    WandbMode,
    parse_args,
    run,
    to_dict,
)
from dataset import SPLITS
from device import autocast_dtype
from diffusion import check_steps
from evaluator import git_blob_hash
from files import atomic_write, make_folder, write_json
from intervals import accuracy_interval, clip, mean_interval
from scoring import Bench, draw_splits, open_bench
from tracking import Tracker

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402

COLUMNS = (*SPLITS, "mean")
MAX_SCALES = 1000


@dataclass(frozen=True)
class SweepConfig(Settings):
    """Accuracy over the guidance scale."""

    ckpt_path: Path
    """Checkpoint of src/train.py."""
    scale_min: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """First guidance scale."""
    scale_max: Annotated[float, Field(ge=-100, le=100)] = 10.0
    """Last guidance scale."""
    scale_step: PositiveFloat = 0.5
    """Distance between scales."""
    num_seeds: Annotated[int, Field(ge=1, le=1000)] = 4
    """Draws for each scale; every scale starts from the same noise."""
    seed: Seed = 0
    """Seed of the first draw; the others follow."""
    output_dir: Path = ROOT / "output" / "result"
    """Results go to a folder in here, named after the run."""
    device: str | None = None
    """cuda, cpu ... (default: the best there is)."""
    wandb: WandbMode = "auto"
    """auto: online when logged in to Weights & Biases, else offline."""
    wandb_project: str = "iclevr-ddpm"
    """Project name at Weights & Biases."""
    sampling: SamplerConfig = field(default_factory=lambda: SamplerConfig(scheduler="ddim"))
    data: DataConfig = field(default_factory=DataConfig)


def guidance_scales(config: SweepConfig) -> list[float]:
    """scale_min, scale_min + scale_step, ... up to scale_max.

    Raises:
        UserError: the range is empty or absurdly fine.
    """
    count = (config.scale_max - config.scale_min) / config.scale_step + 1e-9
    if count < 0:
        raise UserError(
            f"--scale_max {config.scale_max:g}: is below --scale_min {config.scale_min:g}"
        )
    if count >= MAX_SCALES:
        raise UserError(f"--scale_step {config.scale_step:g}: gives more than {MAX_SCALES} scales")
    return [round(config.scale_min + i * config.scale_step, 6) for i in range(int(count) + 1)]


def sweep_key(config: SweepConfig, bench: Bench, sampling: SamplingConfig) -> str:
    """Hash of all that a draw depends on; draws of other settings are never mixed in."""
    device = next(bench.model.parameters()).device
    parts = {
        "checkpoint": git_blob_hash(config.ckpt_path),
        "judge": git_blob_hash(bench.judge.path),
        "labels": {split: labels.tolist() for split, labels in bench.labels.items()},
        "sampling": to_dict(replace(sampling, guidance_scale=0.0, batch_size=1)),
        "arithmetic": f"{device.type} {autocast_dtype(sampling.mixed_precision, device)}",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


Draws = dict[tuple[float, int], dict[str, list[int]]]
"""(scale, seed) -> split -> detected objects of each picture."""


def read_draws(path: Path) -> Draws:
    """Draws made before; a line cut short by a kill is left out, and drawn again."""
    draws = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                draws[record["scale"], record["seed"]] = record["correct"]
            except (ValueError, TypeError, KeyError):
                continue
    return draws


def append_draw(path: Path, scale: float, seed: int, correct: dict[str, list[int]]) -> None:
    """Add one line; the leading newline ends a line that a kill has cut short."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"scale": scale, "seed": seed, "correct": correct}))
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None


def picture_shares(
    draws: Draws, scale: float, seeds: list[int], totals: dict[str, int]
) -> np.ndarray:
    """(pictures of all seeds,): each one's share, so that their mean is the mean accuracy.

    The mean accuracy weighs both splits alike.
    """
    per_seed = [
        np.concatenate([np.array(draws[scale, seed][split]) / totals[split] for split in SPLITS])
        for seed in seeds
    ]
    return np.concatenate(per_seed) * len(per_seed[0]) / len(SPLITS)


def indistinguishable(shares: dict[float, np.ndarray], best: float) -> list[float]:
    """Scales whose mean accuracy can't be told from the best one's.

    The same picture is drawn from the same noise for every scale, so the differences are paired:
    a scale is told apart if the 95% t interval of its differences, picture by picture, excludes
    0. The scales are not corrected for their number: of 20 equal ones, one may look worse.
    """
    result = []
    for scale, values in shares.items():
        difference = mean_interval(shares[best] - values)
        if scale != best and difference.low <= 0 <= difference.high:
            result.append(scale)
    return result


def summarise(
    draws: Draws, scales: list[float], seeds: list[int], totals: dict[str, int]
) -> dict[str, Any]:
    """Rows of the table, the best scale by the mean of both splits, and its equals.

    Intervals are Student's t over the seeds; for one seed, Wilson's for a split, and t over the
    pictures for the mean.
    """
    rows = []
    shares = {scale: picture_shares(draws, scale, seeds, totals) for scale in scales}
    for scale in scales:
        row: dict[str, Any] = {"guidance_scale": scale}
        for split in SPLITS:
            correct = [sum(draws[scale, seed][split]) for seed in seeds]
            row[split] = vars(accuracy_interval(correct, totals[split]))
        per_seed = shares[scale].reshape(len(seeds), -1)
        interval = mean_interval(per_seed.mean(axis=1) if len(seeds) > 1 else per_seed[0])
        row["mean"] = vars(clip(interval))
        rows.append(row)
    best = max(scales, key=lambda scale: float(shares[scale].mean()))
    return {
        "rows": rows,
        "best": best,
        "not_distinguishable_from_best": indistinguishable(shares, best),
    }


def verdict(summary: dict[str, Any]) -> str:
    """The result in words."""
    equals = summary["not_distinguishable_from_best"]
    row = next(r for r in summary["rows"] if r["guidance_scale"] == summary["best"])
    text = f"best mean accuracy {row['mean']['mean']:.4f} at guidance scale {summary['best']:g}"
    if len(summary["rows"]) == 1:
        return f"{text}, the only one drawn"
    how = "paired t, 95%, over all pictures"
    if equals:
        return f"{text}; not distinguishable from it ({how}): {', '.join(f'{e:g}' for e in equals)}"
    return f"{text}; every other scale is distinguishably worse ({how})"


def write_tables(summary: dict[str, Any], text: str, folder: Path) -> None:
    """sweep.csv for programs, sweep.md for people."""
    with atomic_write(folder / "sweep.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["guidance_scale", *(f"{c}{end}" for c in COLUMNS for end in ("", "_low", "_high"))]
        )
        for row in summary["rows"]:
            values = [row[c][key] for c in COLUMNS for key in ("mean", "low", "high")]
            writer.writerow([row["guidance_scale"], *(f"{value:.4f}" for value in values)])
    lines = [f"| guidance scale | {' | '.join(COLUMNS)} |", "|---:|---:|---:|---:|"]
    for row in summary["rows"]:
        cells = [
            f"{row[c]['mean']:.4f} [{row[c]['low']:.4f}, {row[c]['high']:.4f}]" for c in COLUMNS
        ]
        mark = "**" if row["guidance_scale"] == summary["best"] else ""
        lines.append(f"| {mark}{row['guidance_scale']:g}{mark} | {' | '.join(cells)} |")
    with atomic_write(folder / "sweep.md") as temporary:
        temporary.write_text("\n".join([*lines, "", text, ""]), encoding="utf-8")


def draw_chart(summary: dict[str, Any], title: str, path: Path) -> None:
    """Both splits and their mean over the scale, with intervals; the best is marked."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    scales = [row["guidance_scale"] for row in summary["rows"]]
    for column, color in zip(COLUMNS, ("tab:blue", "tab:orange", "black"), strict=True):
        low, mean, high = (
            [row[column][key] for row in summary["rows"]] for key in ("low", "mean", "high")
        )
        axes.plot(scales, mean, "o-", color=color, label=column, markersize=4)
        axes.fill_between(scales, low, high, color=color, alpha=0.12)
        if column == "mean":
            best = scales.index(summary["best"])
            axes.plot(scales[best], mean[best], "*", color="tab:red", markersize=16,
                      label=f"best mean: {summary['best']:g}")  # fmt: skip
    axes.set(xlabel="guidance scale", ylabel="accuracy (95% interval)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the content of sweep.json."""
    config = parse_args(SweepConfig, argv)
    scales = guidance_scales(config)
    seeds = list(range(config.seed, config.seed + config.num_seeds))
    bench = open_bench(config.ckpt_path, config.data, config.device)
    steps = check_steps(bench.checkpoint.config.noise, config.sampling)
    sampling = SamplingConfig(**vars(replace(config.sampling, num_inference_steps=steps)))
    name = f"{sampling.scheduler}{steps}-{sweep_key(config, bench, sampling)}"
    folder = config.output_dir / bench.run_name / "guidance_scale" / name
    make_folder(folder)
    draws = read_draws(folder / "draws.jsonl")
    todo = [(scale, seed) for scale in scales for seed in seeds if (scale, seed) not in draws]
    if len(todo) < len(scales) * len(seeds):
        print(f"{len(scales) * len(seeds) - len(todo)} draws are there already: {folder}")

    tracker = Tracker(
        config.wandb, config.wandb_project, f"{bench.run_name}-guidance", folder, to_dict(config)
    )
    for scale, seed in tqdm(todo, desc="sweep", unit="draw"):
        splits = draw_splits(bench, replace(sampling, guidance_scale=scale), seed, progress=False)
        draws[scale, seed] = {split: r.correct.tolist() for split, (_, r) in splits.items()}
        append_draw(folder / "draws.jsonl", scale, seed, draws[scale, seed])

    totals = {split: int(bench.labels[split].sum()) for split in SPLITS}
    summary = summarise(draws, scales, seeds, totals)
    text = verdict(summary)
    report = {
        "checkpoint": str(config.ckpt_path),
        "judge": bench.judge.name,
        "sampling": {k: v for k, v in to_dict(sampling).items() if k != "guidance_scale"},
        "seeds": seeds,
        "verdict": text,
        **summary,
    }
    write_json(folder / "sweep.json", report)
    write_tables(summary, text, folder)
    title = f"{bench.run_name}: {sampling.scheduler}, {steps} steps, judge: {bench.judge.name}"
    draw_chart(summary, title, folder / "sweep.png")

    rows = [[r["guidance_scale"], *(r[c]["mean"] for c in COLUMNS)] for r in summary["rows"]]
    tracker.log({"guidance_sweep": {"columns": ["guidance_scale", *COLUMNS], "data": rows}})
    tracker.log_picture("guidance_chart", folder / "sweep.png")
    tracker.finish()
    print((folder / "sweep.md").read_text(encoding="utf-8"))
    print(folder)
    return report


if __name__ == "__main__":
    run(main)
