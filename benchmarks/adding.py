"""How well is an object added to a picture, and is what stood there still there?

    python src/render_iclevr.py --num_sequences 200
    python benchmarks/adding.py                        # the pretrained network

Takes pictures with one and with two objects from the data's sequences, adds the object that the
sequence itself adds next, in several ways, and asks the judge. Outside the disc that is drawn anew
nothing changes, by construction. Writes table, pictures and JSON to
output/benchmarks/adding/<checkpoint>/.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from common import machine

from diffusion.insertion import add_objects
from diffusion.sampling import evaluations
from iclevr.dataset import IclevrDataset
from judging.bench import Bench, open_bench
from judging.figures import pairs, save_image, save_text
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

WAYS = {
    "each step once": SamplingConfig(num_inference_steps=12),
    "each step 2 times": SamplingConfig(num_inference_steps=12, resample=2),
    "each step 4 times": SamplingConfig(num_inference_steps=12, resample=4),
    "50 steps, once": SamplingConfig(num_inference_steps=50),
}
"""DDPM; the last two take about as many evaluations."""
FIGURES = {
    "new": "new object there",
    "old": "old objects all there",
    "exact": "exactly both, nothing else",
}


@dataclass(frozen=True)
class AddingConfig(Settings):
    """Add objects to training pictures."""

    ckpt_path: Path = PRETRAINED
    """Checkpoint of src/train.py."""
    num_pictures: PositiveInt = 32
    """Pictures with one object, and as many with two."""
    num_seeds: PositiveInt = 4
    """Draws of every picture."""
    guidance_scale: float = 2.0
    """Towards the scene with the object, of all ways."""
    device: str | None = None
    """cuda, cpu ... (default: the best there is)."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "adding"
    """Results go to a folder in here."""
    data: DataConfig = field(default_factory=DataConfig)


def tasks(config: AddingConfig, bench: Bench) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, S, S) in [-1, 1], what they show and what they shall show (N, K)."""
    paths = bench.paths
    data = IclevrDataset(
        paths.data_dir, paths.image_dir, "train", bench.model.image_size, paths.cache_dir
    )
    chosen: list[int] = []
    for count in (1, 2):
        found = [
            i for i in range(len(data) - 1)
            if data.labels[i].sum() == count and (data.labels[i + 1] - data.labels[i]).min() >= 0
            and data.labels[i + 1].sum() == count + 1
        ]  # fmt: skip
        chosen += found[: config.num_pictures]
    if not chosen:
        raise UserError(f"{paths.data_dir}: no sequence in which an object is added")
    images = torch.stack([data[i][0] for i in chosen])
    return images, data.labels[chosen], data.labels[[i + 1 for i in chosen]]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse_args(AddingConfig, argv)
    bench = open_bench(config.ckpt_path, config.data, config.device)
    images, before, after = tasks(config, bench)
    folder = config.output_dir / f"{bench.run_name}-{bench.blob[:10]}"
    make_folder(folder)
    noise, rows = bench.checkpoint.config.noise, {}

    def judged(pictures: torch.Tensor) -> torch.Tensor:
        return (bench.judge.scores(pictures) >= bench.judge.threshold).float()

    there = judged(images)
    ceiling = (there * before).sum(1) == before.sum(1)
    for way, sampling in WAYS.items():
        sampling = replace(sampling, guidance_scale=config.guidance_scale)
        draws: dict[str, list[float]] = {name: [] for name in FIGURES}
        for seed in progress_bar(range(config.num_seeds), desc=way, unit="draw"):
            seeds = picture_seeds(seed, len(images))
            drawn, _ = add_objects(bench.model, noise, images, before, after, seeds, sampling)
            seen = judged(drawn)
            found = {
                "new": (seen * (after - before)).sum(1) == 1,
                "old": (seen * before).sum(1) == before.sum(1),
                "exact": (seen == after).all(1),
            }
            for name, right in found.items():
                draws[name].append(right.float().mean().item())
            if seed == 0:
                save_image(pairs(images[::4], drawn[::4]), folder / f"{way.replace(' ', '_')}.png")
        rows[way] = {name: mean_interval(values, 0, 1) for name, values in draws.items()}
        rows[way]["evaluations"] = evaluations(noise, sampling, after)
    report = to_dict({
        "title": f"{bench.run_name}, {len(images)} pictures, guidance "
        f"{config.guidance_scale:g}, {config.num_seeds} seeds, judge: {bench.judge.name}",
        "checkpoint": str(config.ckpt_path),
        "machine": machine(bench.device),
        "old_objects_seen_in_the_pictures_themselves": proportion_interval(
            int(ceiling.sum()), len(ceiling)
        ),
        "rows": rows,
    })  # fmt: skip
    head = ["sampling", "evaluations", *FIGURES.values()]
    lines = [
        [way, f"{row['evaluations']:.0f}", *(Interval(**row[name]) for name in FIGURES)]
        for way, row in report["rows"].items()
    ]
    floor = Interval(**report["old_objects_seen_in_the_pictures_themselves"])
    text = (
        f"{report['title']}\n\n{markdown(head, lines)}\n\n"
        f"old objects all seen in the pictures themselves: {floor}"
    )
    write_json(folder / "adding.json", report)
    save_text(text, folder / "adding.md")
    print(f"{text}\n\n{folder}")
    return report


if __name__ == "__main__":
    run(main)
