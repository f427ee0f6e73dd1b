"""Runs in the tests: what they logged, and trainings that are stopped or go wrong on the way."""

import json
import os
import signal
from collections.abc import Container
from pathlib import Path

import pytest
import torch

from training import step, trainer


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def same(ours: dict, theirs: dict) -> bool:
    """Whether state dicts hold the same tensors."""
    return ours.keys() == theirs.keys() and all(map(torch.equal, ours.values(), theirs.values()))


def auto(output: Path) -> list[str]:
    """Go on with the run "r" in a folder."""
    return ["--output_dir", str(output), "--run_name", "r", "--resume", "auto"]


def stopped(main, argv, after: int, number: int = signal.SIGTERM) -> None:
    """Train until so many steps are done, then get a signal."""
    real = trainer.train_step

    def train_step(state, *args):
        result = real(state, *args)
        if state.step == after:
            os.kill(os.getpid(), number)
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(trainer, "train_step", train_step)
        main(argv)
    assert ended.value.code == 128 + number


def poison(monkeypatch, steps: Container[int]) -> None:
    """The training loss of these steps is NaN."""
    real = step.training_loss
    count = iter(range(10**6))

    def poisoned(*args, **kwargs):
        loss = real(*args, **kwargs)
        return loss * float("nan") if next(count) in steps else loss

    monkeypatch.setattr(step, "training_loss", poisoned)


def damage_middle(path: Path) -> None:
    """Flip a bit among the weights: torch alone would read them without complaint."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
