"""Does --without keep an object out, and what does it cost those that were asked for?

    python benchmarks/without.py                       # the pretrained network

Three questions, each answered from the same noise with and without an unwanted object:

nothing asked for   pictures of no condition show every object now and then; how often do they when
                    it is unwanted? Every object in turn.
both splits         the conditions of test.json and new_test.json, each with an unwanted object
                    drawn from those that it does not name: are the others still there?
what came unasked   where the judge sees an object that was not asked for, the same picture is drawn
                    again without it, as a user would: is it gone, and is the scene right then?

Writes table and JSON to output/benchmarks/without/<checkpoint>/, and the pictures of the first draw
of nothing asked for: columns of objects, without and with that one unwanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import machine

from judging.bench import Bench, open_bench
from judging.evaluator import Evaluator, evaluate
from judging.figures import grid, save_image, save_text
from judging.intervals import Interval, mean_interval
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
    "unwanted": "the unwanted object there, nothing asked for",
    "accuracy": "accuracy, both splits",
    "exact": "exact sets, both splits",
    "unwanted_beside": "the unwanted object there, both splits",
    "unasked": "objects there that were not asked for, those then unwanted, both splits",
    "mended": "exact sets, where only what came unasked is unwanted, both splits",
}


@dataclass(frozen=True)
class WithoutConfig(Settings):
    """Draw with and without an unwanted object."""

    ckpt_path: Path = PRETRAINED
    """Checkpoint of src/train.py."""
    num_pictures: PositiveInt = 4
    """Pictures of a draw for each object, where nothing is asked for."""
    num_seeds: PositiveInt = 4
    """Draws of every picture."""
    num_inference_steps: PositiveInt = 12
    """DDPM steps."""
    guidance_scale: float = 2.0
    """Towards what is asked for, away from what is unwanted."""
    device: str | None = None
    """cuda, cpu ... (default: the best there is)."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "without"
    """Results go to a folder in here."""
    data: DataConfig = field(default_factory=DataConfig)


def choose_unwanted(labels: Tensor, seed: int) -> Tensor:
    """For each condition (N, K) an object that it does not name, as a one-hot row."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial((labels == 0).float(), 1, generator=generator)
    return torch.zeros_like(labels).scatter_(1, chosen, 1)


def seen(judge: Evaluator, images: Tensor) -> Tensor:
    """(N, K) bool: which objects the judge sees."""
    return judge.scores(images) >= judge.threshold


def figures_of(
    judge: Evaluator, images: dict[str, Tensor], asked: Tensor, unwanted: dict[str, Tensor]
) -> dict[str, float]:
    """The figures of one draw: pictures of "nothing", of the "splits", and of these once more,
    where what came "unasked" is unwanted; unwanted objects of each, (N, K)."""
    there = {
        name: (seen(judge, of) & unwanted[name].bool()).any(dim=1).float().mean().item()
        for name, of in images.items()
    }
    found = evaluate(judge, images["splits"], asked)
    return {
        "unwanted": there["nothing"],
        "accuracy": found.accuracy,
        "exact": found.exact.float().mean().item(),
        "unwanted_beside": there["splits"],
        "unasked": there["unasked"],
        "mended": evaluate(judge, images["unasked"], asked).exact.float().mean().item(),
    }


def draw_again(
    bench: Bench, images: Tensor, labels: Tensor, seed: int, sampling: SamplingConfig
) -> Tensor:
    """Pictures (N, 3, H, W), those anew in whose labels (N, K) something is unwanted."""
    rows = (labels < 0).any(dim=1).nonzero().flatten()
    images = images.clone()
    if len(rows):
        every = picture_seeds(seed, len(labels))
        images[rows] = bench.sample(labels[rows], [every[n] for n in rows], sampling)[0].cpu()
    return images


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse_args(WithoutConfig, argv)
    if config.guidance_scale == 0:
        raise UserError("--guidance_scale 0: heeds nothing that is unwanted; raise it")
    bench = open_bench(config.ckpt_path, config.data, config.device)
    folder = config.output_dir / f"{bench.run_name}-{bench.blob[:10]}"
    make_folder(folder)
    sampling = SamplingConfig(
        num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale
    )
    asked = torch.cat([*bench.labels.values()])
    each = torch.eye(asked.shape[1]).repeat_interleave(config.num_pictures, dim=0)
    nothing = torch.zeros_like(each)
    ways: dict[str, list[dict[str, float]]] = {"as ever": [], "--without": []}
    for seed in progress_bar(range(config.num_seeds), desc="with and without", unit="draw"):

        def draw(labels: Tensor, seed: int = seed) -> Tensor:
            return bench.sample(labels, picture_seeds(seed, len(labels)), sampling)[0].cpu()

        ever = {"nothing": draw(nothing), "splits": draw(asked)}
        ever["unasked"] = ever["splits"]
        unwanted = {
            "nothing": each,
            "splits": choose_unwanted(asked, seed),
            "unasked": (seen(bench.judge, ever["splits"]) & (asked == 0)).float(),
        }
        less = {
            "nothing": draw(-each),
            "splits": draw(asked - unwanted["splits"]),
            "unasked": draw_again(
                bench, ever["splits"], asked - unwanted["unasked"], seed, sampling
            ),
        }
        for way, images in zip(ways, (ever, less), strict=True):
            ways[way].append(figures_of(bench.judge, images, asked, unwanted))
        if seed == 0:
            first = [images["nothing"][:: config.num_pictures] for images in (ever, less)]
            save_image(grid(torch.cat(first), columns=len(first[0])), folder / "nothing_asked.png")
    report = summary(config, bench, ways)
    save_text(in_words(report), folder / "without.md")
    write_json(folder / "without.json", report)
    print(f"{in_words(report)}\n{folder}")
    return report


def summary(
    config: WithoutConfig, bench: Bench, ways: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    """Intervals over the draws, and of the differences, paired by seed."""
    values = {
        name: {way: [draw[name] for draw in draws] for way, draws in ways.items()}
        for name in FIGURES
    }
    rows = {
        name: {way: mean_interval(of[way], 0, 1) for way in ways}
        | {
            "difference": mean_interval(
                [b - a for a, b in zip(of["as ever"], of["--without"], strict=True)]
            )
        }
        for name, of in values.items()
    }
    title = (
        f"{bench.run_name}, {config.num_inference_steps} DDPM steps, guidance "
        f"{config.guidance_scale:g}, {config.num_seeds} seeds, judge: {bench.judge.name}"
    )
    return to_dict({
        "title": title,
        "checkpoint": str(config.ckpt_path),
        "machine": machine(bench.device),
        "num_pictures": config.num_pictures,
        "rows": rows,
    })  # fmt: skip


def in_words(report: dict[str, Any]) -> str:
    """The table."""
    head = ["share of the pictures or objects", "as ever", "--without", "difference"]
    lines = [
        [FIGURES[name], *(Interval(**row[key]) for key in ("as ever", "--without", "difference"))]
        for name, row in report["rows"].items()
    ]
    return f"{report['title']}\n\n{markdown(head, lines)}\n"


if __name__ == "__main__":
    run(main)
