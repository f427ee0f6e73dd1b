"""Accuracy, exact sets and Frechet distance against the cost of sampling.

    python benchmarks/sampling_steps.py                      # the pretrained network
    python benchmarks/sampling_steps.py --ckpt_path output/demo/checkpoints/model_epoch_8.pth

Every sampler draws both test splits from the same noise; the cost is counted in evaluations of the
network per picture (a guided step takes two). Also timed, in turns: one picture at a time with 100
DDPM steps in float32, as the original did, against the cheapest short run that is as good as the
best long one: the 95% intervals of its paired differences in accuracy and exact sets reach 0.
Writes table, chart and JSON to output/benchmarks/sampling_steps/<checkpoint>/; draws that are there
already are not made again.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from common import (
    interleave,
    machine,
    ratios,
    shares,
    show,
    spread,
)

from diffusion.sampling import evaluations, sample
from diffusion.schedule import check_steps
from judging.bench import (
    Bench,
    Draw,
    draw_frechet,
    draw_splits,
    open_bench,
    settings_key,
    with_reference,
)
from judging.figures import save_figure
from judging.intervals import Interval, mean_interval
from judging.metrics import record
from judging.realism import frechet_floor
from network.checkpoint import PRETRAINED
from runtime.files import atomic_write, make_folder, read_json, write_json
from runtime.seeds import picture_seeds
from runtime.settings import (
    ROOT,
    DataConfig,
    FdSamples,
    PositiveInt,
    Precision,
    SamplingConfig,
    Settings,
    UserError,
    parse_args,
    run,
    to_dict,
)

STEPS = {
    "ddpm": (500, 100, 50, 20, 12, 10),
    "ddim": (500, 100, 50, 20, 10),
    "dpmpp": (20, 16, 12, 10, 8, 6),
    "unipc": (20, 16, 12, 10, 8, 6),
}
LONG = 100
"""Runs of at least so many steps are what the short ones are held to."""
SOLVERS = ("dpmpp", "unipc")
"""These are also guided in intervals only."""


@dataclass(frozen=True)
class StepsConfig(Settings):
    """Compare samplers by their number of network evaluations."""

    ckpt_path: Path = PRETRAINED
    """Checkpoint of src/train.py, trained with timesteps that the samplers' steps divide."""
    num_seeds: PositiveInt = 4
    """Draws of both splits."""
    num_fd_samples: FdSamples = 512
    """Pictures of each sampler's Frechet distance (one draw); 0: none."""
    guidance_scale: float = 3.0
    """Guidance scale of all samplers."""
    guidance_intervals: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.2, 1.0), (0.4, 1.0))
    """Intervals of t / T in which the solvers are guided; every other sampler is always."""
    rounds: PositiveInt = 3
    """Rounds of the timing."""
    timed_pictures: PositiveInt = 2
    """Pictures that the one-at-a-time loop draws in a round."""
    mixed_precision: Precision = "auto"
    """Number format, but for the one-at-a-time loop (float32)."""
    device: str | None = None
    """cuda, cpu ... (default: the best there is)."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "sampling_steps"
    """Results go to a folder in here."""
    data: DataConfig = field(default_factory=DataConfig)


def samplers(config: StepsConfig, bench: Bench) -> dict[str, SamplingConfig]:
    """Name -> how to sample, from many evaluations to few; what can't work is left out."""
    found = {}
    for name, counts in STEPS.items():
        for steps in counts:
            for interval in config.guidance_intervals if name in SOLVERS else ((0.0, 1.0),):
                sampling = SamplingConfig(
                    scheduler=name, num_inference_steps=steps, guidance_interval=interval,
                    guidance_scale=config.guidance_scale, mixed_precision=config.mixed_precision,
                )  # fmt: skip
                try:
                    check_steps(bench.checkpoint.config.noise, sampling)
                except UserError as error:
                    print(f"{name} {steps}: left out: {error}", file=sys.stderr)
                    continue
                label = f"{name} {steps}"
                label += (
                    "" if interval == (0, 1) else f", guided in {interval[0]:g}-{interval[1]:g}"
                )
                found[label] = sampling
    return found


def is_long(name: str) -> bool:
    """Whether "ddpm 500" and the like is a long run."""
    return int(name.split(",")[0].split()[1]) >= LONG


def summarise(names: Sequence[str], draws: dict[str, list[Draw]]) -> dict[str, dict]:
    """Intervals over seeds; and against the best long run, paired by seed."""
    best = max(filter(is_long, names), key=lambda n: shares(draws[n], "accuracy").mean())
    rows = {}
    for name in names:
        row: dict = {}
        for figure in ("accuracy", "exact_sets"):
            values = shares(draws[name], figure)
            row[figure] = vars(mean_interval(values, 0, 1))
            difference = values - shares(draws[best], figure)
            row[f"{figure}_minus_best_long"] = vars(mean_interval(difference))
        distances = [draw.frechet for draw in draws[name] if draw.frechet is not None]
        if distances:
            row["frechet_distance"] = vars(mean_interval(distances, lowest=0))
        rows[name] = row
    return {"best_long": best, "rows": rows}


def as_good(difference: dict) -> bool:
    """Whether the interval of a difference reaches 0."""
    return (difference["mean"] if difference["high"] is None else difference["high"]) >= 0


def draw_chart(report: dict, path: Path) -> None:
    """Three panels over the evaluations, a line for each scheduler guided all the way."""
    figures = ("accuracy", "exact_sets", "frechet_distance")
    shown = [f for f in figures if all(f in row for row in report["rows"].values())]
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(8, 3 * len(shown)), sharex=True, layout="constrained", squeeze=False
    )
    for axes, name in zip(panels[:, 0], shown, strict=True):
        for scheduler in STEPS:
            rows = [r for n, r in report["rows"].items() if n.split()[0] == scheduler]
            for guided, marker in ((True, "o-"), (False, "x")):
                these = [r for r in rows if r["guided_throughout"] is guided]
                if not these:
                    continue
                x = [r["evaluations"] for r in these]
                mean = np.array([r[name]["mean"] for r in these])
                low, high = (
                    np.array([r[name]["mean"] if r[name][k] is None else r[name][k] for r in these])
                    for k in ("low", "high")
                )
                label = scheduler + ("" if guided else ", guided in an interval")
                color = f"C{list(STEPS).index(scheduler)}"
                axes.errorbar(x, mean, (mean - low, high - mean), fmt=marker, color=color,
                              label=label, markersize=4, capsize=2, linewidth=1)  # fmt: skip
        axes.set(xscale="log", ylabel=f"{name.replace('_', ' ')}\n(95% interval)")
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    panels[0, 0].set(title=report["title"])
    panels[-1, 0].set(xlabel="evaluations of the network for one picture")
    save_figure(figure, path)


def one_at_a_time(sampling: SamplingConfig) -> SamplingConfig:
    """The original's loop, at the same guidance scale."""
    return SamplingConfig(
        scheduler="ddpm", num_inference_steps=100, batch_size=1, mixed_precision="no",
        guidance_scale=sampling.guidance_scale,
    )  # fmt: skip


def timing(config: StepsConfig, bench: Bench, fast: SamplingConfig) -> dict[str, list[float]]:
    """Seconds per picture, in turns: one at a time with 100 DDPM steps, and `fast` in batches."""
    noise = bench.checkpoint.config.noise
    original = one_at_a_time(fast)
    labels = bench.labels["test"]

    def seconds(sampling: SamplingConfig, count: int) -> float:
        since = time.perf_counter()
        sample(bench.model, noise, labels[:count], picture_seeds(0, count), sampling,
               progress=False)  # fmt: skip
        return (time.perf_counter() - since) / count

    seconds(fast, len(labels))  # warm up
    return interleave(
        {
            "one at a time, ddpm 100, float32": lambda: seconds(original, config.timed_pictures),
            "fast": lambda: seconds(fast, len(labels)),
        },
        config.rounds,
    )


def main(argv: Sequence[str] | None = None) -> dict:
    config = parse_args(StepsConfig, argv)
    bench = open_bench(config.ckpt_path, config.data, config.device)
    if config.num_fd_samples:
        bench = with_reference(bench)
    sampling = SamplingConfig(
        guidance_scale=config.guidance_scale, mixed_precision=config.mixed_precision
    )
    key = settings_key(config.num_fd_samples, bench, sampling)
    folder = config.output_dir / f"{bench.run_name}-guidance{config.guidance_scale:g}-{key}"
    make_folder(folder)
    chosen = samplers(config, bench)
    if len({is_long(name) for name in chosen}) < 2:
        raise UserError(f"{config.ckpt_path}: its timesteps suit no long runs, or no short ones")
    check_steps(bench.checkpoint.config.noise, one_at_a_time(sampling))  # before all the drawing
    draws: dict[str, list[Draw]] = {}
    for number, (name, sampling) in enumerate(chosen.items(), start=1):
        draws[name] = []
        for seed in range(config.num_seeds):
            count = config.num_fd_samples if seed == 0 and bench.reference else 0
            path = folder / "draws" / f"{name.replace(' ', '_')}-seed{seed}-fd{count}.json"
            if not path.exists():
                print(f"{number} of {len(chosen)}: {name}, seed {seed}", flush=True)
                splits = draw_splits(bench, sampling, seed)
                distance = draw_frechet(bench, sampling, seed, count) if count else None
                records = {split: record(result) for split, (_, result) in splits.items()}
                write_json(path, vars(Draw(records, distance)))
            draws[name].append(Draw(**read_json(path)))

    report = summarise(list(chosen), draws)
    for name, row in report["rows"].items():
        row["evaluations"] = evaluations(bench.checkpoint.config.noise, chosen[name])
        row["guided_throughout"] = chosen[name].guidance_interval == (0, 1)
    equal = [
        name
        for name, row in report["rows"].items()
        if not is_long(name)
        and all(as_good(row[f"{figure}_minus_best_long"]) for figure in ("accuracy", "exact_sets"))
    ]  # fmt: skip
    cheapest = min(equal or [n for n in chosen if not is_long(n)],
                   key=lambda n: report["rows"][n]["evaluations"])  # fmt: skip
    seconds = timing(config, bench, chosen[cheapest])
    original, fast = seconds.values()
    report |= {
        "title": f"{bench.run_name}, guidance {config.guidance_scale:g}, judge: {bench.judge.name}",
        "checkpoint": str(config.ckpt_path),
        "judge": bench.judge.name,
        "machine": machine(bench.device),
        "seeds": config.num_seeds,
        "num_fd_samples": config.num_fd_samples,
        "cheapest_as_good": cheapest if equal else None,
        "seconds_per_picture": {"one at a time": spread(original), cheapest: spread(fast)},
        "ratio": spread(ratios(original, fast)),
        "sampling": {name: to_dict(sampling) for name, sampling in chosen.items()},
    }
    columns = ("accuracy", "exact_sets", "accuracy_minus_best_long", "frechet_distance")
    lines = [
        f"{report['title']}; {report['machine']['device']}", "",
        "| sampler | evaluations | accuracy | exact sets | accuracy minus best long run | "
        "Frechet distance |", "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, row in report["rows"].items():
        cells = [str(Interval(**row[f])) if f in row else "-" for f in columns]
        lines.append(f"| {name} | {row['evaluations']} | {' | '.join(cells)} |")
    lines += ["", f"best long run: {report['best_long']}"]
    if bench.reference:
        report["frechet_distance_of_training_pictures"] = frechet_floor(
            bench.reference, config.num_fd_samples, 0
        )
        lines[-1] += (f"; Frechet distance of {config.num_fd_samples} training pictures: "
                      f"{report['frechet_distance_of_training_pictures']:.1f}")  # fmt: skip
    found = "cheapest within its interval" if equal else "no short run within its interval; timed"
    lines += [
        f"{found}: {cheapest}",
        f"seconds per picture: one at a time, 100 DDPM steps, float32: {show(original)}; "
        f"{cheapest}: {show(fast)}; ratio {show(ratios(original, fast))}",
    ]
    write_json(folder / "sampling_steps.json", report)
    with atomic_write(folder / "sampling_steps.md") as temporary:
        temporary.write_text("\n".join([*lines, ""]), encoding="utf-8")
    draw_chart(report, folder / "sampling_steps.png")
    print("\n".join(lines) + f"\n{folder}")
    return report


if __name__ == "__main__":
    run(main)
