"""A run's folder: its checkpoints, which of them are kept, and one training at a time."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from network.checkpoint import Checkpoint, DamagedFileError, load_checkpoint
from runtime import processes
from runtime.files import lock_folder, remove_left_overs
from runtime.settings import UserError


class Source(NamedTuple):
    """A checkpoint that was read, and its file."""

    path: Path
    checkpoint: Checkpoint


def checkpoint_path(run_dir: Path, epoch: int) -> Path:
    return run_dir / "checkpoints" / f"model_epoch_{epoch}.pth"


def best_path(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "best.pth"


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints in a run folder, by epoch."""
    found = {
        int(number): path
        for path in (run_dir / "checkpoints").glob("model_epoch_*.pth")
        if (number := path.stem.rsplit("_", 1)[1]).isdigit()
    }
    return [found[epoch] for epoch in sorted(found)]


def resumable(run_dir: Path) -> list[Path]:
    """What a run can go on from, the last is the best choice.

    best.pth is the first: it may be all there is of a run that was killed early.
    """
    best = best_path(run_dir)
    return [best] * best.exists() + checkpoints(run_dir)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The last of `resumable`, or None."""
    return next(reversed(resumable(run_dir)), None)


def latest_whole_checkpoint(run_dir: Path) -> Source | None:
    """The latest one that can be read; says which damaged ones it passes over.

    Raises:
        UserError: there are some, but all are damaged, or one can't be read for another reason.
    """
    first_error = None
    for path in reversed(resumable(run_dir)):
        try:
            return Source(path, load_checkpoint(path))
        except DamagedFileError as error:
            first_error = first_error or error
            print(f"warning: {error.what}; looking for an earlier one", file=sys.stderr)
    if first_error:
        raise first_error
    return None


def best_accuracy(run_dir: Path) -> float:
    """Of the preview that best.pth was kept for; -1 if there is none."""
    best = None
    if best_path(run_dir).exists():
        try:
            best = load_checkpoint(best_path(run_dir)).training.get("best")
        except DamagedFileError as error:
            print(f"warning: {error.what}; the next best replaces it", file=sys.stderr)
    return best if isinstance(best, float) else -1.0


def delete_older(path: Path, keep: int) -> None:
    """Delete the checkpoints of a run before `path`, but for the last `keep - 1` of them.

    Later ones stay: the run went on from `path`'s epoch because they are damaged, and will write
    them again.
    """
    known = checkpoints(path.parents[1])
    for old in known[: known.index(path) + 1][:-keep]:
        with contextlib.suppress(OSError):  # Windows deletes none that is being read; next time
            old.unlink()


@contextlib.contextmanager
def own_folder(run_dir: Path, latest: Path | None) -> Iterator[None]:
    """Keep other trainings out of a run's folder, and tidy up what an interrupted one has left.

    Args:
        latest: its latest checkpoint as far as this process knows.

    Raises:
        UserError: another process works there, or has since `latest` was found.
    """
    with contextlib.ExitStack() as stack:
        if processes.is_main():
            stack.callback(lock_folder(run_dir, "choose another --run_name").release)
            if latest_checkpoint(run_dir) != latest:
                raise UserError(
                    f"{run_dir}: another process has trained here since this one started; "
                    "start again"
                )
            for folder in (run_dir, run_dir / "checkpoints", run_dir / "samples"):
                remove_left_overs(folder)
        processes.wait_for_all()
        yield
