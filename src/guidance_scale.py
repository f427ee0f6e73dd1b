"""Sweep the guidance scale: accuracy, exact sets and Frechet distance, from the same noise.

    python src/guidance_scale.py --ckpt_path output/ddpm-cfg-v1/checkpoints/model_epoch_500.pth

Writes output/result/<run>/guidance_scale/<settings>/: sweep.csv, sweep.md, sweep.png, sweep.json,
and draws.jsonl, from which an interrupted sweep goes on.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
from pydantic import Field
from tqdm import tqdm

from diffusion.schedule import check_steps
from iclevr.dataset import SPLITS
from judging.bench import (
    BenchConfig,
    Draw,
    Draws,
    append_draw,
    draw_frechet,
    draw_splits,
    fd_samples,
    open_bench,
    read_draws,
    settings_key,
    with_reference,
)
from judging.figures import save_figure
from judging.intervals import Interval, mean_interval
from judging.metrics import COUNTS, SHARES, record, summarise
from judging.realism import frechet_floor
from runtime import processes
from runtime.files import atomic_write, check_folder, make_folder, write_json
from runtime.settings import (
    PositiveFloat,
    SamplerConfig,
    SamplingConfig,
    UserError,
    parse_args,
    run,
    to_dict,
)
from runtime.tracking import Tracker

COLUMNS = (*SPLITS, "mean")
MAX_SCALES = 1000


@dataclass(frozen=True)
class SweepConfig(BenchConfig):
    """Accuracy over the guidance scale."""

    scale_min: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """First guidance scale."""
    scale_max: Annotated[float, Field(ge=-100, le=100)] = 10.0
    """Last guidance scale."""
    scale_step: PositiveFloat = 0.5
    """Distance between scales."""
    num_seeds: Annotated[int, Field(ge=1, le=1000)] = 4
    """Draws for each scale; every scale starts from the same noise."""
    sampling: SamplerConfig = field(default_factory=lambda: SamplerConfig(scheduler="ddim"))


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


def picture_shares(draws: Draws, scale: float, seeds: list[int], figure: str) -> np.ndarray:
    """(pictures of all seeds,): each one's share, so that their mean is the mean of both splits.

    The mean weighs both splits alike.
    """
    per_seed = []
    for seed in seeds:
        records = draws[scale, seed].records
        shares = []
        for split in SPLITS:
            values = np.array(records[split][SHARES[figure]], dtype=float)
            whole = sum(records[split]["total"]) if figure == "accuracy" else len(values)
            shares.append(values / whole)
        per_seed.append(np.concatenate(shares))
    return np.concatenate(per_seed) * len(per_seed[0]) / len(SPLITS)


def indistinguishable(values: dict[float, np.ndarray], best: float) -> list[float] | None:
    """Scales that can't be told from the best one; None: a single draw tells none apart.

    The same picture is drawn from the same noise for every scale, so the differences are paired:
    a scale is told apart if the 95% t interval of its differences, value by value, excludes 0.
    The scales are not corrected for their number: of 20 equal ones, one may look worse.
    """
    if len(values[best]) < 2:  # one draw of something that is no mean over pictures
        return None
    result = []
    for scale, these in values.items():
        difference = mean_interval(values[best] - these)
        low, high = difference.low, difference.high
        alike = difference.mean == 0 if low is None else low <= 0 <= high
        if scale != best and alike:
            result.append(scale)
    return result


def summarise_sweep(draws: Draws, scales: list[float], seeds: list[int]) -> dict[str, Any]:
    """Rows of the table, and for each criterion the best scale and its equals.

    Intervals are Student's t over the seeds; for one seed, Wilson's for a split, and t over the
    pictures for the mean of the splits.
    """
    rows: list[dict[str, Any]] = [{"guidance_scale": scale} for scale in scales]
    for row in rows:
        of_scale = [draws[row["guidance_scale"], seed] for seed in seeds]
        for split in SPLITS:
            figures = summarise([draw.records[split] for draw in of_scale])
            row[split] = {name: vars(interval) for name, interval in figures.items()}
        row["mean"] = {}
    best = {}
    for figure in SHARES:
        shares = {scale: picture_shares(draws, scale, seeds, figure) for scale in scales}
        for row in rows:
            values = shares[row["guidance_scale"]].reshape(len(seeds), -1)
            interval = mean_interval(values.mean(axis=1) if len(seeds) > 1 else values[0], 0, 1)
            row["mean"][figure] = vars(interval)
        top = max(scales, key=lambda scale: float(shares[scale].mean()))
        best[figure] = {"scale": top, "equals": indistinguishable(shares, top)}
    if all(draws[scale, seed].frechet is not None for scale in scales for seed in seeds):
        frechet = {s: np.array([draws[s, seed].frechet for seed in seeds]) for s in scales}
        for row in rows:
            row["frechet_distance"] = vars(mean_interval(frechet[row["guidance_scale"]], lowest=0))
        top = min(scales, key=lambda scale: float(frechet[scale].mean()))
        best["frechet_distance"] = {"scale": top, "equals": indistinguishable(frechet, top)}
    return {"rows": rows, "best": best}


def verdict(summary: dict[str, Any]) -> str:
    """The result in words, a line for each criterion."""
    lines = []
    for figure, best in summary["best"].items():
        row = next(r for r in summary["rows"] if r["guidance_scale"] == best["scale"])
        value = row["frechet_distance"] if figure == "frechet_distance" else row["mean"][figure]
        text = f"best by {figure.replace('_', ' ')}: guidance scale {best['scale']:g}"
        text += f" ({value['mean']:.4f})"
        how = "paired t, 95%"
        if len(summary["rows"]) == 1:
            text += ", the only one drawn"
        elif best["equals"] is None:
            text += "; from a single draw no scale can be told from another"
        elif best["equals"]:
            equals = ", ".join(f"{e:g}" for e in best["equals"])
            text += f"; not distinguishable from it ({how}): {equals}"
        else:
            text += f"; every other scale is distinguishably worse ({how})"
        lines.append(text)
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> dict[str, Interval]:
    """What the tables show of a row: column -> interval."""
    shown = {
        f"{column} {figure.replace('_', ' ')}": Interval(**row[column][figure])
        for figure in SHARES
        for column in COLUMNS
    }
    for name in COUNTS:
        values = [row[split][name] for split in SPLITS]
        shown |= {f"{s} {name}": Interval(**v) for s, v in zip(SPLITS, values, strict=True)}
    if "frechet_distance" in row:
        shown["Frechet distance"] = Interval(**row["frechet_distance"])
    return shown


def write_tables(summary: dict[str, Any], title: str, text: str, folder: Path) -> None:
    """sweep.csv for programs, sweep.md for people."""
    rows = {row["guidance_scale"]: cells(row) for row in summary["rows"]}
    with atomic_write(folder / "sweep.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        ends = ("", "_low", "_high")
        names = [name.replace(" ", "_") for name in next(iter(rows.values()))]
        columns = [f"{name}{end}" for name in names for end in ends]
        writer.writerow(["guidance_scale", *columns, "about"])
        for scale, shown in rows.items():
            values = [v for i in shown.values() for v in (i.mean, i.low, i.high)]
            numbers = ["" if v is None else f"{v:.4f}" for v in values]
            writer.writerow([scale, *numbers, title])
    shown = [name for name in next(iter(rows.values())) if not name.endswith(COUNTS)]
    lines = [f"| guidance scale | {' | '.join(shown)} |", "|---:|" + "---:|" * len(shown)]
    for scale, row in rows.items():
        lines.append(f"| {scale:g} | {' | '.join(str(row[name]) for name in shown)} |")
    with atomic_write(folder / "sweep.md") as temporary:
        temporary.write_text("\n".join([title, "", *lines, "", text, ""]), encoding="utf-8")


def draw_chart(summary: dict[str, Any], title: str, path: Path, floor: float | None) -> None:
    """Accuracy, exact sets and Frechet distance over the scale, with intervals; best marked."""
    rows, best = summary["rows"], summary["best"]
    scales = [row["guidance_scale"] for row in rows]
    figure, panels = plt.subplots(
        len(best), 1, figsize=(8, 3 * len(best)), sharex=True, layout="constrained", squeeze=False
    )
    for axes, (name, top) in zip(panels[:, 0], best.items(), strict=True):
        curves = (
            {column: [row[column][name] for row in rows] for column in COLUMNS}
            if name in SHARES
            else {"all": [row[name] for row in rows]}
        )
        for (column, values), color in zip(
            curves.items(),
            ("tab:blue", "tab:orange", "black") if len(curves) > 1 else ("black",),
            strict=True,
        ):
            mean = [value["mean"] for value in values]
            low, high = (
                [value["mean"] if value[key] is None else value[key] for value in values]
                for key in ("low", "high")
            )
            label = column if len(curves) > 1 else None
            axes.plot(scales, mean, "o-", color=color, label=label, markersize=4)
            axes.fill_between(scales, low, high, color=color, alpha=0.12)
        at = scales.index(top["scale"])
        axes.plot(scales[at], mean[at], "*", color="tab:red", markersize=15,
                  label=f"best: {top['scale']:g}")  # fmt: skip
        if name == "frechet_distance" and floor is not None:
            axes.axhline(floor, color="gray", linestyle="--", label="as many training pictures")
        axes.set(ylabel=f"{name.replace('_', ' ')}\n(95% interval)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0, 0].set(title=title)
    panels[-1, 0].set(xlabel="guidance scale")
    save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the content of sweep.json; of several processes, the first one."""
    config = parse_args(SweepConfig, argv)
    scales = guidance_scales(config)
    seeds = list(range(config.seed, config.seed + config.num_seeds))
    bench = open_bench(config.ckpt_path, config.data, config.device, config.judge)
    steps = check_steps(bench.checkpoint.config.noise, config.sampling)
    check_folder(config.output_dir)
    config = replace(config, num_fd_samples=fd_samples(config, bench))
    if config.num_fd_samples:
        bench = with_reference(bench)
    sampling = SamplingConfig(**vars(replace(config.sampling, num_inference_steps=steps)))
    alike = replace(sampling, guidance_scale=0.0)  # of all scales of this sweep
    key = settings_key(config.num_fd_samples, bench, alike)
    name = f"{sampling.scheduler}{steps}-{key}"
    name += "-guided_by_the_judge" if sampling.classifier_guidance_scale else ""
    folder = config.output_dir / bench.run_name / "guidance_scale" / name
    make_folder(folder)
    draws = processes.from_main(read_draws(folder / "draws.jsonl"))
    todo = [(scale, seed) for scale in scales for seed in seeds if (scale, seed) not in draws]
    if len(todo) < len(scales) * len(seeds):
        print(f"{len(scales) * len(seeds) - len(todo)} draws are there already: {folder}")

    tracker = Tracker(
        config.wandb,
        config.wandb_project,
        f"{bench.run_name}-guidance-{name}",
        folder,
        to_dict(config),
    )
    for scale, seed in tqdm(
        todo, desc="sweep", unit="draw", disable=not (todo and processes.is_main())
    ):
        splits = draw_splits(bench, replace(sampling, guidance_scale=scale), seed, progress=False)
        draw = Draw({split: record(result) for split, (_, result) in splits.items()})
        if bench.reference is not None:
            draw.frechet = draw_frechet(
                bench, replace(sampling, guidance_scale=scale), seed, config.num_fd_samples, False
            )
        draws[scale, seed] = draw
        if processes.is_main():
            append_draw(folder / "draws.jsonl", scale, seed, draw)
    if not processes.is_main():
        return {}

    summary = summarise_sweep(draws, scales, seeds)
    floor = None
    if bench.reference is not None:
        floor = frechet_floor(bench.reference, config.num_fd_samples, config.seed)
    text = verdict(summary)
    report = {
        "checkpoint": str(config.ckpt_path),
        "settings": key,
        "judge": bench.judge_name(sampling),
        "threshold": bench.judge.threshold,
        "num_fd_samples": config.num_fd_samples if bench.reference else 0,
        "frechet_distance_of_training_pictures": floor,
        "sampling": {k: v for k, v in to_dict(sampling).items() if k != "guidance_scale"},
        "seeds": seeds,
        "verdict": text,
        **summary,
    }
    write_json(folder / "sweep.json", report)
    judge = bench.judge_name(sampling)
    title = f"{bench.run_name}: {sampling.scheduler}, {steps} steps, judge: {judge}"
    write_tables(summary, title, text, folder)
    draw_chart(summary, title, folder / "sweep.png", floor)

    shown = [(row["guidance_scale"], cells(row)) for row in summary["rows"]]
    rows = [[scale, *(interval.mean for interval in row.values())] for scale, row in shown]
    columns = ["guidance_scale", *shown[0][1]]
    tracker.log({"guidance_sweep": {"columns": columns, "data": rows}})
    tracker.log_picture("guidance_chart", folder / "sweep.png")
    tracker.finish()
    print((folder / "sweep.md").read_text(encoding="utf-8"))
    print(folder)
    return report


if __name__ == "__main__":
    run(main, if_stopped="stopped; the same command goes on from here")
