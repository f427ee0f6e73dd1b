"""Accuracy, exact sets and Frechet distance against the cost of sampling.

    python benchmarks/sampling_steps.py                      # the pretrained network
    python benchmarks/sampling_steps.py --ckpt_path output/demo/checkpoints/model_epoch_8.pth

Every sampler draws both test splits from the same noise; the cost is counted in evaluations of the
network per picture (a guided step takes two). Also timed, in turns: one picture at a time with 100
DDPM steps in float32, as the original did, against the cheapest short run that is as good as the
best long one: the 95% intervals of its paired differences in accuracy and exact
sets, with what stands there twice and without, reach 0.
Writes table, chart and JSON to output/benchmarks/sampling_steps/<checkpoint>/; draws that are there
already are not made again.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from common import interleave, machine, ratios, show, spread

from diffusion.samplers import check_steps
from diffusion.sampling import evaluations
from judging.bench import (
    Bench,
    Draw,
    draw_frechet,
    draw_splits,
    open_bench,
    settings_key,
    split_records,
    with_reference,
)
from judging.figures import panels, plot_intervals, save_figure, save_text
from judging.intervals import Interval, mean_interval
from judging.metrics import SHARES, markdown, split_means
from judging.realism import frechet_floor
from network.checkpoint import PRETRAINED
from runtime.files import make_folder, read_json, write_json
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
RESAMPLED = {
    "ddpm 6, each step 2 times": {"num_inference_steps": 6, "resample": 2},
    "ddpm 12, each step 2 times": {"num_inference_steps": 12, "resample": 2},
    "ddpm 12, each step 3 times": {"num_inference_steps": 12, "resample": 3},
    "ddpm 12, 4 times in 0.3-0.8": {
        "num_inference_steps": 12, "resample": 4, "resample_interval": (0.3, 0.8),
    },
    "ddpm 12, each step 4 times": {"num_inference_steps": 12, "resample": 4},
    "ddpm 20, 3 times in 0.3-0.8": {
        "num_inference_steps": 20, "resample": 3, "resample_interval": (0.3, 0.8),
    },
    "ddpm 12, best of 4": {"num_inference_steps": 12, "best_of": 4},
}  # fmt: skip
"""Steps taken again, and the best of several by the network itself."""
ORIGINAL = SamplingConfig(num_inference_steps=100, batch_size=1, mixed_precision="no")
"""As the original draws, but for the guidance scale."""


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
    max_evaluations: PositiveInt = 1000
    """Samplers that take more evaluations of the network for a picture are left out."""
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
                throughout = interval == (0, 1)
                where = "" if throughout else ", guided in {:g}-{:g}".format(*interval)
                found[f"{name} {steps}{where}"] = sampling
    for name, how in RESAMPLED.items():
        sampling = SamplingConfig(
            guidance_scale=config.guidance_scale, mixed_precision=config.mixed_precision, **how
        )
        try:
            check_steps(bench.checkpoint.config.noise, sampling)
        except UserError as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        found[name] = sampling
    labels = torch.cat([*bench.labels.values()])
    cost = {
        name: evaluations(bench.checkpoint.config.noise, how, labels) for name, how in found.items()
    }
    return {name: how for name, how in found.items() if cost[name] <= config.max_evaluations}


def is_long(name: str) -> bool:
    """Whether "ddpm 500" and the like is a long run."""
    return int(name.split(",")[0].split()[1]) >= LONG


def draw_all(
    config: StepsConfig, bench: Bench, chosen: dict[str, SamplingConfig], folder: Path
) -> dict[str, list[Draw]]:
    """Draws of each sampler, kept in files of their own."""
    draws: dict[str, list[Draw]] = {}
    for number, (name, sampling) in enumerate(chosen.items(), start=1):
        draws[name] = []
        for seed in range(config.num_seeds):
            count = config.num_fd_samples if seed == 0 and bench.reference else 0
            path = folder / "draws" / f"{name.replace(' ', '_')}-seed{seed}-fd{count}.json"
            if not path.exists():
                print(f"{number} of {len(chosen)}: {name}, seed {seed}", flush=True)
                found = split_records(draw_splits(bench, sampling, seed))
                distance = draw_frechet(bench, sampling, seed, count) if count else None
                write_json(path, vars(Draw(found, distance)))
            draws[name].append(Draw(**read_json(path)))
    return draws


def summarise(draws: dict[str, list[Draw]]) -> dict:
    """Intervals over seeds; and against the best long run, paired by seed."""
    values = {
        figure: {n: split_means([d.records for d in draws[n]], figure).mean(axis=1) for n in draws}
        for figure in SHARES
    }
    best = max(filter(is_long, draws), key=lambda name: values["accuracy"][name].mean())
    rows: dict[str, dict] = {name: {} for name in draws}
    for name, row in rows.items():
        for figure, of in values.items():
            row[figure] = mean_interval(of[name], 0, 1)
            row[f"{figure}_minus_best_long"] = mean_interval(of[name] - of[best])
        distances = [draw.frechet for draw in draws[name] if draw.frechet is not None]
        if distances:
            row["frechet_distance"] = mean_interval(distances, lowest=0)
    return to_dict({"best_long": best, "rows": rows})


def as_good(row: dict) -> bool:
    """Whether the intervals of the differences to the best long run reach 0."""
    differences = [row[f"{figure}_minus_best_long"] for figure in SHARES]
    return all((d["mean"] if d["high"] is None else d["high"]) >= 0 for d in differences)


def draw_chart(report: dict, path: Path) -> None:
    """Panels over the evaluations: a line for each scheduler guided throughout, else marks."""
    series: dict[str, list[dict]] = {}
    for name, row in report["rows"].items():
        kind = name.split()[0] + ("" if row["guided_throughout"] else ", guided in an interval")
        if name in RESAMPLED:
            kind = "best of several" if "best of" in name else "ddpm, steps taken again"
        series.setdefault(kind, []).append(row)
    rows = report["rows"].values()
    shown = [f for f in (*SHARES, "frechet_distance") if all(f in row for row in rows)]
    figure, axes_of = panels(shown, report["title"], "evaluations of the network for one picture")
    for name, axes in axes_of.items():
        for number, (kind, these) in enumerate(series.items()):
            x, y = ([row[key] for row in these] for key in ("evaluations", name))
            style = "o-" if kind in STEPS else "D"
            plot_intervals(axes, x, y, style, band=False, color=f"C{number}", label=kind)
        axes.set(xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes_of["accuracy"].legend(fontsize=8)
    save_figure(figure, path)


def timing(config: StepsConfig, bench: Bench, fast: SamplingConfig) -> list[list[float]]:
    """Seconds per picture, in turns: as the original draws, and `fast` in batches."""
    original = replace(ORIGINAL, guidance_scale=fast.guidance_scale)
    labels = bench.labels["test"]

    def seconds(sampling: SamplingConfig, count: int) -> float:
        since = time.perf_counter()
        bench.sample(labels[:count], picture_seeds(0, count), sampling, progress=False)
        return (time.perf_counter() - since) / count

    seconds(fast, len(labels))  # warm up
    variants = {
        "one at a time": lambda: seconds(original, config.timed_pictures),
        "fast": lambda: seconds(fast, len(labels)),
    }
    return list(interleave(variants, config.rounds).values())


def in_words(report: dict, original: list[float], fast: list[float]) -> str:
    """The table, and what it says."""
    figures = ("accuracy", "exact_sets", "exact_once", "accuracy_minus_best_long",
               "exact_once_minus_best_long", "frechet_distance")  # fmt: skip
    head = ["sampler", "evaluations", "accuracy", "exact sets", "nothing twice",
            "accuracy minus best long run", "nothing twice minus best",
            "Frechet distance"]  # fmt: skip
    rows = (
        [name, row["evaluations"], *(Interval(**row[f]) if f in row else "-" for f in figures)]
        for name, row in report["rows"].items()
    )
    best = f"best long run: {report['best_long']}"
    if floor := report.get("frechet_distance_of_training_pictures"):
        count = report["num_fd_samples"]
        best += f"; Frechet distance of {count} training pictures: {floor:.1f}"
    _, timed = report["seconds_per_picture"]
    as_good = report["cheapest_as_good"] is not None
    found = "cheapest not shown to be worse" if as_good else "all short runs are worse; timed"
    return "\n".join([
        f"{report['title']}; {report['machine']['device']}", "", markdown(head, rows), "", best,
        f"{found}: {timed}",
        f"seconds per picture: one at a time, 100 DDPM steps, float32: {show(original)}; "
        f"{timed}: {show(fast)}; ratio {show(ratios(original, fast))}",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict:
    config = parse_args(StepsConfig, argv)
    bench = open_bench(config.ckpt_path, config.data, config.device)
    noise = bench.checkpoint.config.noise
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
        raise UserError(
            f"{config.ckpt_path}: its timesteps, or --max_evaluations {config.max_evaluations}, "
            "leave no long runs, or no short ones"
        )
    check_steps(noise, ORIGINAL)  # before all the drawing

    report = summarise(draw_all(config, bench, chosen, folder))
    for name, row in report["rows"].items():
        row["evaluations"] = evaluations(noise, chosen[name], torch.cat([*bench.labels.values()]))
        row["guided_throughout"] = chosen[name].guidance_interval == (0, 1)
    short = [name for name in chosen if not is_long(name)]
    equal = [name for name in short if as_good(report["rows"][name])]
    cheapest = min(equal or short, key=lambda name: report["rows"][name]["evaluations"])
    original, fast = timing(config, bench, chosen[cheapest])
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
        "sampling": to_dict(chosen),
    }
    if bench.reference:
        floor = frechet_floor(bench.reference, config.num_fd_samples, 0)
        report["frechet_distance_of_training_pictures"] = floor
    text = in_words(report, original, fast)
    write_json(folder / "sampling_steps.json", report)
    save_text(text, folder / "sampling_steps.md")
    draw_chart(report, folder / "sampling_steps.png")
    print(f"{text}\n{folder}")
    return report


if __name__ == "__main__":
    run(main)
