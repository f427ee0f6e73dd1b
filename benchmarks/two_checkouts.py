"""src/train.py of this checkout beside another one's, in turns.

    git worktree add ../before HEAD~10
    python benchmarks/two_checkouts.py --other ../before

Each round trains with either checkout from the start, the same recipe on the same pictures, and
takes the pictures/s of the last steps; by turns, so that what disturbs the machine disturbs both.
Prints a table, writes output/benchmarks/two_checkouts.json.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from common import describe, interleave, machine, ratios, show, spread, table
from training_runs import NEVER, data_flags, records

from iclevr.dataset import find_data
from runtime.device import pick_device
from runtime.files import write_json
from runtime.settings import (
    ROOT,
    DataConfig,
    PositiveInt,
    RecipeName,
    Settings,
    UserError,
    parse_args,
    run,
)

WARM_UP = 5
"""Steps of every training that are not measured."""


@dataclass(frozen=True)
class CheckoutsConfig(Settings):
    """Measure the trainings of this checkout and of another one."""

    other: Path
    """The other checkout of this repository."""
    recipe: RecipeName = "small"
    """What is trained."""
    more: str = ""
    """Further flags of src/train.py."""
    rounds: PositiveInt = 5
    """Either checkout is measured once a round."""
    steps: PositiveInt = 20
    """Optimiser steps of one measurement."""
    threads: PositiveInt = 1
    """CPU threads of a training."""
    out: Path = ROOT / "output" / "benchmarks" / "two_checkouts.json"
    """Where the figures go."""
    data: DataConfig = field(default_factory=DataConfig)


def pictures_per_s(checkout: Path, config: CheckoutsConfig) -> float:
    """Of a training's steps behind its warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        steps = WARM_UP + config.steps
        flags = f"--recipe {config.recipe} --max_train_steps {steps} --log_interval {WARM_UP}"
        flags += f" --sample_interval {NEVER} --preview_steps 5 --wandb disabled"
        flags += f" --output_dir {shlex.quote(folder)} {data_flags(config.data)} {config.more}"
        done = subprocess.run(
            [sys.executable, str(checkout / "src" / "train.py"), *shlex.split(flags)],
            capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": str(config.threads)},
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"{checkout}: training ends with {done.stderr.splitlines()[-1]!r}")
        (run_dir,) = Path(folder).iterdir()
        timed = [r for r in records(run_dir) if "seconds" in r and r["step"] > WARM_UP]
        pictures = sum(r["images_per_s"] * r["seconds"] for r in timed)
        return pictures / sum(r["seconds"] for r in timed)


def main(argv: Sequence[str] | None = None) -> dict:
    config = parse_args(CheckoutsConfig, argv)
    if not (config.other / "src" / "train.py").exists():
        raise UserError(f"--other {config.other}: no checkout of this repository")
    paths = find_data(config.data)  # the other checkout's would be its own
    config = replace(config, data=DataConfig(**vars(paths)))
    checkouts = {"this checkout": ROOT, "the other": config.other}
    rates = interleave(
        {name: lambda path=path: pictures_per_s(path, config) for name, path in checkouts.items()},
        config.rounds,
    )
    here, other = rates.values()
    report = {
        "machine": machine(pick_device(None)) | {"threads": config.threads},
        "recipe": config.recipe,
        "pictures_per_s": {name: spread(values) for name, values in rates.items()},
        "times_as_fast": spread(ratios(here, other)),
    }
    write_json(config.out, report)
    print(f"\n{describe(report['machine'])}")
    print(f"recipe {config.recipe}, {config.rounds} rounds of {config.steps} steps\n")
    print(table("training", {"pictures/s": {name: show(r) for name, r in rates.items()}}))
    print(f"\nthis checkout is {show(ratios(here, other))} times as fast\n{config.out}")
    return report


if __name__ == "__main__":
    run(main)
