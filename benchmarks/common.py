"""What the benchmarks share: the machine, interleaved rounds, medians with their range, tables.

Every benchmark imports from here first: this module puts src/ on the path.
"""

import contextlib
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from judging import metrics
from judging.bench import Draw
from runtime.provenance import machine as machine  # for all benchmarks
from runtime.settings import ModelConfig, UserError


def model_flags(model: ModelConfig) -> str:
    """The flags of a network, such as "--image_size 64 --patch_size 2": what is not the default."""
    flags = []
    for name, value in vars(model).items():
        if value != getattr(ModelConfig(), name):
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            flags += [f"--{name}", *map(str, values)]
    return " ".join(flags)


def shares(draws: Sequence[Draw], figure: str) -> np.ndarray:
    """(draws,): mean of all splits, of a figure of `SHARES`."""
    key = metrics.SHARES[figure]
    values = []
    for draw in draws:
        whole = {s: sum(r["total"]) if key == "correct" else len(r[key])
                 for s, r in draw.records.items()}  # fmt: skip
        values.append(np.mean([sum(r[key]) / whole[s] for s, r in draw.records.items()]))
    return np.array(values)


def describe(where: dict[str, Any]) -> str:
    """`machine` on one line."""
    return ", ".join(f"{key} {value}" for key, value in where.items())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleave(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run A, B, C, A, B, C ...: what disturbs the machine for a while disturbs all of them."""
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, measure in variants.items():
            print(f"round {number + 1} of {rounds}: {name}", flush=True)
            figures[name].append(measure())
    return figures


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """first / second, round by round."""
    return [a / b for a, b in zip(first, second, strict=True)]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, range and every round, JSON-able."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": list(values),
    }


def show(values: Sequence[float], unit: str = "") -> str:
    """Such as "1,204 [1,150, 1,230]": median and range."""
    figures = [f(values) for f in (statistics.median, min, max)]
    cells = [f"{x:,.0f}{unit}" if x >= 100 else f"{x:.3g}{unit}" for x in figures]
    return "{} [{}, {}]".format(*cells)


def table(first: str, columns: dict[str, dict[str, str]]) -> str:
    """Markdown: rows named in a column `first`, and a column for every entry of `columns`."""
    return metrics.table(columns).replace("figure", first, 1)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright; closed in the end."""
    program = shutil.which("chromium")
    if program is None:
        raise UserError("chromium: not found; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()
