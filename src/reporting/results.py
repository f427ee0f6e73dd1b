"""A run's tests and sweeps, as src/test.py and src/guidance_scale.py wrote them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from iclevr.labels import SPLITS
from judging.intervals import Interval
from judging.sweep import cells
from runtime.files import read_json
from runtime.settings import SamplerConfig, SamplingConfig, UserError, from_dict

Found = TypeVar("Found", bound="Result")


@dataclass(frozen=True, kw_only=True)
class MadeBy:
    """`runtime.provenance.provenance`, read back."""

    command: str
    commit: str
    processes: int
    diffusers: str
    device: str
    threads: int
    torch: str
    python: str
    system: str


@dataclass(frozen=True, kw_only=True)
class Start(MadeBy):
    """A start of a training."""

    step: int
    total_steps: int
    num_pictures: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """What accuracies.json and sweep.json have in common."""

    checkpoint: str
    checkpoint_blob: str
    step: int
    judge: str
    sampling: SamplerConfig
    made_by: list[MadeBy]
    folder: Path = Path()
    current: bool = False
    """Whether it is of the run's latest checkpoint."""


@dataclass(frozen=True, kw_only=True)
class OtherJudge:
    """What a second judge says of the same pictures."""

    judge: str
    figures: dict[str, dict[str, Interval]]


@dataclass(frozen=True, kw_only=True)
class Test(Result):
    """accuracies.json."""

    sampling: SamplingConfig
    evaluations: float
    seed: int
    num_seeds: int
    figures: dict[str, dict[str, Interval]]
    records: dict[str, list[dict[str, list[int]]]]
    confusion: list[list[int]]
    objects: list[str]
    asked: dict[str, list[list[str]]]
    seen: dict[str, list[list[str]]] | None = None
    """None: not noted by older versions."""
    num_fd_samples: int = 0
    frechet_distance: Interval | None = None
    frechet_distance_of_training_pictures: Interval | None = None
    nearest_median: float | None = None
    nearest_least: float | None = None
    other_judge: OtherJudge | None = None

    @property
    def seeds(self) -> list[int]:
        """The seed of every draw; the pictures on disk are the first one's."""
        return [*range(self.seed, self.seed + self.num_seeds)]


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best scale by a figure, and those that can't be told from it."""

    scale: float
    equals: list[float] | None


@dataclass(frozen=True, kw_only=True)
class Sweep(Result):
    """sweep.json."""

    seeds: list[int]
    rows: list[dict[str, Any]]
    best: dict[str, Best]
    frechet_distance_of_training_pictures: float | None = None

    @property
    def table(self) -> dict[float, dict[str, Interval]]:
        """Scale -> column -> interval."""
        return {row["guidance_scale"]: cells(row) for row in self.rows}


def read_results(
    kind: type[Found], results: Path, pattern: str, blob: str | None, check: Callable = lambda _: 0
) -> list[Found]:
    """All files of a kind; damaged ones and those of older versions are left out, with a word.

    Those of the latest checkpoint come before others, those not drawn with the judge's help before
    those that were, of more seeds before fewer, then the newest.

    Args:
        results: folder of the run's results.
        blob: git's hash of the latest checkpoint.
        check: is given each, and fails where something is missing.
    """
    found = {}
    for path in sorted(results.glob(pattern)):
        try:
            result = from_dict(kind, read_json(path), source=str(path))
            check(result)
        except (UserError, KeyError, TypeError, AttributeError) as error:
            why = str(error) if isinstance(error, UserError) else f"{path}: lacks {error}"
            print(f"warning: left out: {why[:300]}", file=sys.stderr)
            continue
        current = result.checkpoint_blob == blob
        guided = bool(result.sampling.classifier_guidance_scale)
        rank = (current, not guided, len(result.seeds), path.stat().st_mtime, path)
        found[rank] = replace(result, folder=path.parent, current=current)
    return [found[rank] for rank in sorted(found, reverse=True)]


def find_tests(results: Path, blob: str | None, main: str | None) -> list[Test]:
    """The run's tests; first the one whose pictures are shown.

    Raises:
        UserError: none lies in a folder of the name `main`.
    """
    found = read_results(Test, results, "*/accuracies.json", blob)
    found.sort(key=lambda test: set(test.figures) != set(SPLITS))  # the course's come first
    if main is not None:
        names = [test.folder.name for test in found]
        if main not in names:
            there = ", ".join(names) or "none"
            raise UserError(f"--test {main}: no such test in {results} (there: {there})")
        found.insert(0, found.pop(names.index(main)))
    return found


def find_sweeps(results: Path, blob: str | None) -> list[Sweep]:
    """The run's sweeps."""
    pattern = "guidance_scale/*/sweep.json"
    return read_results(Sweep, results, pattern, blob, check=lambda sweep: sweep.table)
