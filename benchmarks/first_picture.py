"""How long somebody waits for a picture in the browser, from the click on.

    python benchmarks/first_picture.py

Opens src/app.py in Chromium for one visitor after another, each of whom draws once. Prints a table,
writes output/benchmarks/first_picture.json. Needs Chromium and requirements-dev.txt.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common import browser, describe, machine, show, spread, table

import app
from network.checkpoint import PRETRAINED
from runtime.files import write_json
from runtime.settings import ROOT, PositiveInt, Settings, parse_args, run

SHOWN = {
    "first step": "#pictures .card img",
    "first picture, judged": "#pictures .card.right, #pictures .card.wrong",
    "all four, to download": "#pictures .card:nth-child(4) .files",
}
"""What is waited for, and how the page has it."""


@dataclass(frozen=True)
class WaitConfig(Settings):
    """Measure the seconds from a click to pictures in the browser."""

    ckpt_path: Path = PRETRAINED
    """Checkpoint of src/train.py."""
    visitors: PositiveInt = 5
    """Each opens the page afresh."""
    out: Path = ROOT / "output" / "benchmarks" / "first_picture.json"
    """Where the figures go."""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_args(WaitConfig, argv)
    seconds: dict[str, list[float]] = {name: [] for name in SHOWN}
    with browser() as chromium:
        page, url = app.serve(["--ckpt_path", str(config.ckpt_path)])
        for _ in range(config.visitors):
            visit = chromium.new_page()
            visit.goto(url)
            visit.wait_for_selector("#picker [aria-pressed=true]")
            since = time.perf_counter()
            visit.click("#draw")
            for name, selector in SHOWN.items():
                visit.wait_for_selector(selector)
                seconds[name].append(time.perf_counter() - since)
            visit.close()
        page.close()
    where = machine(torch.device("cpu"))
    print(table("shown", {"seconds": {name: show(times) for name, times in seconds.items()}}))
    print(describe(where))
    figures = {name: spread(times) for name, times in seconds.items()}
    write_json(config.out, {"machine": where, "seconds": figures})


if __name__ == "__main__":
    run(main)
