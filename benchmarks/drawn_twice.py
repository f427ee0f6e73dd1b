"""How often is an object drawn twice? The judge says what is there, not how often.

    python benchmarks/drawn_twice.py                   # the pretrained network

A judge of the course's kind scores every object as there or not there, so a scene with two cyan
cylinders where one was asked for counts as exact. src/judging/counting.py counts by color, and
src/test.py reports it; here several ways of sampling are set side by side, on conditions without
gray objects, which can't be counted. Training pictures, which show no object twice, are counted for
comparison where they are there.

Draws the conditions by every combination of --num_inference_steps, --guidance_scales and
--resamples; of --max_evaluations at most.
Writes table and JSON to output/benchmarks/drawn_twice/<checkpoint>/, and the pictures of the first
draw, those with a blob too many first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from common import machine

from diffusion.sampling import evaluations
from iclevr.dataset import IclevrDataset
from iclevr.labels import decode_labels
from judging.bench import Bench, open_bench
from judging.counting import color_of, too_many
from judging.evaluator import evaluate
from judging.figures import grid, save_image, save_text
from judging.intervals import Interval, mean_interval, proportion_interval
from judging.metrics import markdown
from network.checkpoint import PRETRAINED
from runtime.files import make_folder, write_json
from runtime.output import progress_bar
from runtime.seeds import picture_seeds
from runtime.settings import (
    ROOT,
    DataConfig,
    PositiveInt,
    SamplingConfig,
    Settings,
    UserError,
    parse_args,
    run,
    to_dict,
)

FIGURES = {
    "accuracy": "accuracy",
    "exact": "exact sets, by the judge",
    "twice": "an object twice",
    "right": "exact sets, nothing twice",
}


@dataclass(frozen=True)
class DrawnTwiceConfig(Settings):
    """Count objects that were drawn twice."""

    ckpt_path: Path = PRETRAINED
    """Checkpoint of src/train.py."""
    conditions: Annotated[tuple[Path, ...], Field(min_length=1)] | None = None
    """Files with lists of lists of objects, in place of test.json and new_test.json."""
    guidance_scales: Annotated[tuple[float, ...], Field(min_length=1)] = (3.0, 2.0)
    """Guidance scales to compare."""
    resamples: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 3)
    """How many times each step is taken."""
    num_inference_steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (12,)
    """DDPM steps."""
    max_evaluations: PositiveInt = 1000
    """Combinations that take more evaluations of the network for a picture are left out."""
    num_seeds: PositiveInt = 4
    """Draws of every picture."""
    device: str | None = None
    """cuda, cpu ... (default: the best there is)."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "drawn_twice"
    """Results go to a folder in here."""
    data: DataConfig = field(default_factory=DataConfig)


def counted(bench: Bench, labels: Tensor, images: Tensor) -> tuple[dict[str, float], Tensor]:
    """The figures of one draw, and which pictures (N,) have a blob too many."""
    found = evaluate(bench.judge, images, labels)
    twice = found.too_many > 0
    shares = {"exact": found.exact, "twice": twice, "right": found.once}
    means = {name: values.float().mean().item() for name, values in shares.items()}
    return {"accuracy": found.accuracy, **means}, twice


def in_training(bench: Bench, most: int = 1000) -> Interval | None:
    """Share of training pictures with a blob too many; None: there are none here."""
    paths = bench.paths
    if paths.image_dir is None or not paths.image_dir.is_dir():
        return None
    data = IclevrDataset(
        paths.data_dir, paths.image_dir, "train", bench.model.image_size, paths.cache_dir
    )
    these = range(0, len(data), max(1, len(data) // most))
    images = torch.stack([data[i][0] for i in these])
    twice = too_many(images, data.labels[[*these]], data.objects) > 0
    return proportion_interval(int(twice.sum()), len(twice))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse_args(DrawnTwiceConfig, argv)
    bench = open_bench(config.ckpt_path, config.data, config.device, conditions=config.conditions)
    folder = config.output_dir / f"{bench.run_name}-{bench.blob[:10]}"
    make_folder(folder)
    labels = torch.cat([*bench.labels.values()])
    names = decode_labels(torch.ones(labels.shape[1]), bench.judge.objects)  # in their order
    uncounted = [color_of(name) is None for name in names]
    labels = labels[labels[:, uncounted].sum(dim=1) == 0]
    if not len(labels):
        raise UserError("--conditions: all hold gray objects, which can't be counted; add others")
    rows, noise = {}, bench.checkpoint.config.noise
    ways = product(config.num_inference_steps, config.guidance_scales, config.resamples)
    for steps, scale, resample in ways:
        sampling = SamplingConfig(
            num_inference_steps=steps, guidance_scale=scale, resample=resample
        )
        cost = evaluations(noise, sampling, labels)
        if cost > config.max_evaluations:
            continue
        way = f"{steps} steps, guidance {scale:g}, each step {resample} times"
        draws = []
        for seed in progress_bar(range(config.num_seeds), desc=way, unit="draw"):
            images, _ = bench.sample(labels, picture_seeds(seed, len(labels)), sampling)
            figures, twice = counted(bench, labels, images.cpu())
            draws.append(figures)
            if seed == 0:
                order = sorted(range(len(twice)), key=lambda n: not twice[n])
                save_image(
                    grid(images[order]), folder / f"{way.replace(', ', '-').replace(' ', '_')}.png"
                )
        rows[way] = {name: mean_interval([draw[name] for draw in draws], 0, 1) for name in FIGURES}
        rows[way]["evaluations"] = cost
    if not rows:
        raise UserError(f"--max_evaluations {config.max_evaluations}: leaves nothing to compare")
    head = ["sampling", "evaluations", *FIGURES.values()]
    lines = [
        [way, f"{row['evaluations']:.0f}", *(row[name] for name in FIGURES)]
        for way, row in rows.items()
    ]
    training = in_training(bench)
    title = (
        f"{bench.run_name}, {len(labels)} conditions without gray, {config.num_seeds} seeds, "
        f"judge: {bench.judge.name}"
    )
    text = f"{title}\n\n{markdown(head, lines)}\n"
    if training:
        text += f"\nan object twice in training pictures: {training}\n"
    save_text(text, folder / "drawn_twice.md")
    print(f"{text}\n{folder}")
    report = to_dict({
        "title": title,
        "checkpoint": str(config.ckpt_path),
        "machine": machine(bench.device),
        "training_pictures": training,
        "rows": rows,
    })  # fmt: skip
    write_json(folder / "drawn_twice.json", report)
    return report


if __name__ == "__main__":
    run(main)
