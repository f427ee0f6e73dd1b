"""Does --without keep an object out, and what does it cost those that were asked for?

    python benchmarks/without.py                       # the pretrained network

Of the conditions of test.json and new_test.json, in both ways:

an unwanted object  drawn from those that a condition does not name, for every picture: are the
                    others still there? Both ways from the same noise.
what came unasked   where the judge sees objects that were not asked for, the picture is drawn again
                    without them, as a user would; beside it from other noise, which may do as well.

Writes table and JSON to output/benchmarks/without/<checkpoint>/, and the pictures in which
something came unasked in the first draw: as drawn, from other noise, without it.
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
    "accuracy": "accuracy, an object unwanted that was not asked for",
    "exact": "exact sets, likewise",
    "unasked": "pictures with what came unasked, drawn again",
    "mended": "exact sets then",
}
WAYS = "plain", "--without"


@dataclass(frozen=True)
class WithoutConfig(Settings):
    """Draw with and without an unwanted object."""

    ckpt_path: Path = PRETRAINED
    """Checkpoint of src/train.py."""
    num_seeds: PositiveInt = 4
    """Draws of both splits."""
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
    judge: Evaluator, images: Tensor, again: Tensor, asked: Tensor, unasked: Tensor
) -> dict[str, float]:
    """The figures of one way: pictures of the conditions, and these with those `again` in which
    something came that nobody asked for, `unasked` (N, K) bool."""
    found, mended = evaluate(judge, images, asked), evaluate(judge, again, asked)
    return {
        "accuracy": found.accuracy,
        "exact": found.exact.float().mean().item(),
        "unasked": (seen(judge, again) & unasked).any(dim=1).float().mean().item(),
        "mended": mended.exact.float().mean().item(),
    }


def draw(bench: Bench, labels: Tensor, seed: int, sampling: SamplingConfig) -> Tensor:
    """(N, 3, S, S) on the CPU, of labels (N, K)."""
    return bench.sample(labels, picture_seeds(seed, len(labels)), sampling)[0].cpu()


def both_ways(
    bench: Bench, asked: Tensor, seed: int, sampling: SamplingConfig, other_seed: int
) -> tuple[list[dict[str, float]], Tensor]:
    """One draw: the figures of both `WAYS`, and the pictures in which something came unasked: as
    drawn, from the noise of `other_seed`, without it, (3n, 3, S, S)."""
    plain = draw(bench, asked, seed, sampling)
    unasked = seen(bench.judge, plain) & (asked == 0)
    rows = unasked.any(dim=1)[:, None, None, None]
    noise = torch.where(rows, draw(bench, asked, other_seed, sampling), plain)
    # The same pictures as `plain` where nothing is unwanted, up to rounding.
    mended = torch.where(rows, draw(bench, asked - unasked.float(), seed, sampling), plain)
    less = draw(bench, asked - choose_unwanted(asked, seed), seed, sampling)
    figures = [
        figures_of(bench.judge, plain, noise, asked, unasked),
        figures_of(bench.judge, less, mended, asked, unasked),
    ]
    return figures, torch.cat([of[rows.flatten()] for of in (plain, noise, mended)])


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
    draws = []
    for seed in progress_bar(range(config.num_seeds), desc="with and without", unit="draw"):
        other_seed = config.num_seeds + seed
        figures, shown = both_ways(bench, asked, seed, sampling, other_seed)
        draws.append(figures)
        if seed == 0 and len(shown):
            save_image(grid(shown, columns=len(shown) // 3), folder / "unasked.png")
    ways = dict(zip(WAYS, zip(*draws, strict=True), strict=True))
    report = summary(config, bench, ways)
    save_text(in_words(report), folder / "without.md")
    write_json(folder / "without.json", report)
    print(f"{in_words(report)}\n{folder}")
    return report


def summary(
    config: WithoutConfig, bench: Bench, ways: dict[str, Sequence[dict[str, float]]]
) -> dict[str, Any]:
    """Intervals over the draws, and of the differences, paired by seed."""
    values = {
        name: {way: [draw[name] for draw in draws] for way, draws in ways.items()}
        for name in FIGURES
    }
    rows = {
        name: {way: mean_interval(of[way], 0, 1) for way in ways}
        | {"difference": mean_interval([b - a for a, b in zip(*of.values(), strict=True)])}
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
        "rows": rows,
    })  # fmt: skip


def in_words(report: dict[str, Any]) -> str:
    """The table."""
    head = ["share of the objects or pictures", *WAYS, "difference"]
    lines = [
        [FIGURES[name], *(Interval(**row[key]) for key in (*WAYS, "difference"))]
        for name, row in report["rows"].items()
    ]
    return f"{report['title']}\n\n{markdown(head, lines)}\n"


if __name__ == "__main__":
    run(main)
