"""A million training pictures: seconds to open them, and memory while training on them.

    python benchmarks/large_data.py

Makes a list of so many pictures and, in place of decoded ones, a sparse file of the cache's size
(12 GB that take no room on the disk). Opens it in processes of their own, then trains on it with
src/train.py, and looks at the memory that is not the file's own pages (Linux: RssAnon), which must
not grow. Writes table and JSON to output/benchmarks/large_data/.
"""

import contextlib
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import machine, show, spread, table

from iclevr.dataset import CHECK_EACH, keep_list, list_file
from iclevr.labels import read_train
from iclevr.scene import OBJECTS, PICTURES
from iclevr.standin import write_labels
from runtime.device import pick_device
from runtime.files import make_folder, write_json
from runtime.settings import ROOT, PositiveInt, Settings, UserError, parse_args, run

OPEN = """
import sys, time
from pathlib import Path
from iclevr.dataset import IclevrDataset
since, folder = time.perf_counter(), Path(sys.argv[1])
data = IclevrDataset(folder, folder / "iclevr", "train", 64)
data[len(data) - 1]
print(time.perf_counter() - since)
"""
TINY = "--recipe small --block_out_channels 8 8 8 8 --attention_head_dim 8 --batch_size 64"


@dataclass(frozen=True)
class LargeConfig(Settings):
    """Open and train on a million pictures."""

    pictures: PositiveInt = 10**6
    """How many there are; rounded up to whole sequences of three."""
    steps: PositiveInt = 400
    """Optimiser steps of the training, of 64 pictures."""
    rounds: PositiveInt = 5
    """How often the pictures are opened."""
    output_dir: Path = ROOT / "output" / "benchmarks" / "large_data"
    """Data, run and results go in here."""


def make_data(folder: Path, sequences: int) -> None:
    """The JSON files, and a cache that is a hole."""
    (folder / "iclevr").mkdir(parents=True, exist_ok=True)
    write_labels(folder, 0, sequences)
    names, labels = read_train(folder, OBJECTS)
    cache = folder / ".cache" / "64px-hole.npy"
    cache.parent.mkdir(exist_ok=True)
    np.lib.format.open_memmap(cache, mode="w+", dtype=np.uint8, shape=(len(names), 3, 64, 64))
    keep_list(list_file(folder, folder / "iclevr", 64, cache.parent), names, labels, cache)


def seconds_to_open(folder: Path) -> float:
    command = [sys.executable, "-c", OPEN, str(folder.resolve())]
    opened = subprocess.run(command, cwd=ROOT / "src", check=True, capture_output=True, text=True)
    return float(opened.stdout)


def memory(pid: int) -> float | None:
    """MB that a process holds itself, files it has mapped left out; None when it has ended."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            return int(found[1]) / 1024
    return None


def train(folder: Path, steps: int, output: Path) -> list[tuple[int, float]]:
    """(step, MB) while a training runs."""
    flags = f"{TINY} --max_train_steps {steps} --run_name run --log_interval 10 --wandb disabled"
    flags += f" --data_dir {shlex.quote(str(folder))} --output_dir {shlex.quote(str(output))}"
    flags += f" --preview_steps 5 --sample_interval {10**6}"
    shutil.rmtree(output / "run", ignore_errors=True)
    log = output / "run" / "metrics.jsonl"
    found = []
    process = subprocess.Popen([sys.executable, str(ROOT / "src/train.py"), *shlex.split(flags)])
    try:
        while process.poll() is None:
            time.sleep(0.2)
            lines = log.read_text().splitlines() if log.exists() else []
            if lines and (held := memory(process.pid)) is not None:
                found.append((json.loads(lines[-1])["step"], held))
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        raise UserError(f"the training ended with exit code {process.returncode}")
    return found


def main(argv: Sequence[str] | None = None) -> dict:
    config = parse_args(LargeConfig, argv)
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc, which only Linux has")
    if config.pictures <= CHECK_EACH:
        raise UserError(f"--pictures {config.pictures}: only more than {CHECK_EACH} count as many")
    make_folder(config.output_dir)
    folder = config.output_dir / "data"
    sequences = -(-config.pictures // PICTURES)
    make_data(folder, sequences)
    count = sequences * PICTURES
    opened = [seconds_to_open(folder) for _ in range(config.rounds)]
    held = train(folder, config.steps, config.output_dir)
    halfway = [mb for step, mb in held if config.steps * 0.1 <= step <= config.steps * 0.5]
    after = [mb for step, mb in held if config.steps * 0.5 < step < config.steps]
    if not halfway or not after:
        raise UserError(f"--steps {config.steps}: too few to see the memory grow")
    growth = statistics.median(after) - statistics.median(halfway)
    report = {
        "pictures": count,
        "cache_bytes": count * 3 * 64**2,
        "seconds_to_open": spread(opened),
        "memory_mb": held,
        "growth_mb": growth,
        "machine": machine(pick_device("cpu")),
    }
    write_json(config.output_dir / "large_data.json", report)
    rows = {
        "open, seconds": show(opened),
        "memory, first half of the training": show(halfway, " MB"),
        "memory, second half": show(after, " MB"),
        "growth of the median": f"{growth:+.1f} MB",
    }
    print(table("figure", {f"{count:,} pictures": rows}))
    return report


if __name__ == "__main__":
    run(main)
