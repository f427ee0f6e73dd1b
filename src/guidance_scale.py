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

from pydantic import Field

from judging.bench import (
    Bench,
    BenchConfig,
    Draw,
    Draws,
    draw_frechet,
    draw_missing,
    draw_splits,
    open_bench,
    origin,
    settings_key,
    settle,
    split_records,
)
from judging.drawing import file_names
from judging.figures import save_figure, save_text
from judging.intervals import Interval
from judging.metrics import COUNTS, markdown
from judging.realism import frechet_floor
from judging.sweep import cells, summarise_sweep, sweep_chart, verdict
from runtime import processes
from runtime.files import atomic_write, make_folder, write_json
from runtime.provenance import provenance
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


def draw_once(bench: Bench, sampling: SamplingConfig, seed: int, num_fd_samples: int) -> Draw:
    """Draw and score all conditions, and the pictures of the Frechet distance."""
    draw = Draw(split_records(draw_splits(bench, sampling, seed, progress=False)))
    if num_fd_samples:
        draw.frechet = draw_frechet(bench, sampling, seed, num_fd_samples, progress=False)
    return draw


def sum_up(
    config: SweepConfig, bench: Bench, alike: SamplingConfig, draws: Draws, seeds: list[int]
) -> dict[str, Any]:
    """The content of sweep.json; `alike` is what all scales have in common."""
    scales, count = guidance_scales(config), config.num_fd_samples
    summary = summarise_sweep(draws, scales, seeds)
    floor = frechet_floor(bench.reference, count, config.seed) if count else None
    return {
        "checkpoint": str(config.ckpt_path),
        "settings": settings_key(count, bench, alike),
        "judge": bench.judge_name(alike),
        "threshold": bench.judge.threshold,
        "num_fd_samples": count,
        "frechet_distance_of_training_pictures": floor,
        "sampling": to_dict(config.sampling),
        "seeds": seeds,
        "verdict": verdict(summary),
        **summary,
        **origin(bench, [draws[scale, seed] for scale in scales for seed in seeds]),
    }


def write_tables(
    rows: dict[float, dict[str, Interval]], title: str, text: str, folder: Path
) -> None:
    """sweep.csv for programs, sweep.md for people, of scale -> `cells`."""
    names = list(next(iter(rows.values())))
    with (
        atomic_write(folder / "sweep.csv") as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        columns = [name.replace(" ", "_") + end for name in names for end in ("", "_low", "_high")]
        writer.writerow(["guidance_scale", *columns, "about"])
        for scale, shown in rows.items():
            values = [v for i in shown.values() for v in (i.mean, i.low, i.high)]
            numbers = ["" if v is None else f"{v:.4f}" for v in values]
            writer.writerow([scale, *numbers, title])
    names = [name for name in names if not name.endswith(COUNTS)]
    lines = ([f"{scale:g}", *(shown[n] for n in names)] for scale, shown in rows.items())
    table = markdown(["guidance scale", *names], lines, num_texts=0)
    save_text(f"{title}\n\n{table}\n\n{text}", folder / "sweep.md")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the content of sweep.json; of several processes, the first one."""
    config = parse_args(SweepConfig, argv)
    scales = guidance_scales(config)
    seeds = list(range(config.seed, config.seed + config.num_seeds))
    bench = open_bench(
        config.ckpt_path, config.data, config.device, config.judge, conditions=config.conditions
    )
    config, bench = settle(config, bench, scales)
    sampler = config.sampling
    alike = SamplingConfig(**vars(sampler), guidance_scale=0.0)  # of all scales of this sweep
    key = settings_key(config.num_fd_samples, bench, alike)
    name = f"{sampler.scheduler}{sampler.num_inference_steps}-{key}"
    name += f"-{file_names(config.conditions)}" if config.conditions else ""
    name += "-guided_by_the_judge" if sampler.classifier_guidance_scale else ""
    folder = config.output_dir / bench.run_name / "guidance_scale" / name
    make_folder(folder)
    tracker = Tracker(
        config.wandb, config.wandb_project, f"{bench.run_name}-guidance-{name}", folder,
        to_dict(config),
    )  # fmt: skip

    count = config.num_fd_samples
    draws = draw_missing(
        folder / "draws.jsonl",
        [(scale, seed) for scale in scales for seed in seeds],
        lambda scale, seed: draw_once(bench, replace(alike, guidance_scale=scale), seed, count),
        provenance(__file__, argv, bench.device),
    )
    if not processes.is_main():
        return {}

    report = sum_up(config, bench, alike, draws, seeds)
    write_json(folder / "sweep.json", report)
    title = f"{bench.run_name}: {sampler.scheduler}, {sampler.num_inference_steps} steps, "
    title += f"judge: {report['judge']}"
    rows = {row["guidance_scale"]: cells(row) for row in report["rows"]}
    write_tables(rows, title, report["verdict"], folder)
    save_figure(sweep_chart(report, title), folder / "sweep.png")

    data = [[scale, *(shown.mean for shown in row.values())] for scale, row in rows.items()]
    columns = ["guidance_scale", *rows[scales[0]]]
    tracker.log({"guidance_sweep": {"columns": columns, "data": data}})
    tracker.log_picture("guidance_chart", folder / "sweep.png")
    tracker.finish()
    print((folder / "sweep.md").read_text(encoding="utf-8") + str(folder))
    return report


if __name__ == "__main__":
    run(main, if_stopped="stopped; the same command goes on from here")
