"""Everything there is to measure on a GPU in some minutes, by one command, in order of value.

    python benchmarks/gpu_session.py --minutes 9                        # on a machine with a GPU
    python benchmarks/gpu_session.py --minutes 3 --stages recipes       # some of it, longer
    python benchmarks/gpu_session.py --toy                              # a rehearsal, on a CPU

Stages, each a process of its own with its share of the time, which ends with it:

    tests      tests/test_cuda.py; beside it pictures are rendered and networks compiled
    speed      training steps of the full-size network: pictures/s, memory, where the time goes
    small      the small recipe's network, widened, trained for minutes, drawn and judged
    recipes    both recipes on the full-size network, equally long
    sampling   seconds for both splits, a sweep, a Frechet distance

A stage that fails or runs out of time is noted, and the next one starts; time that one leaves goes
to those after it. In --out_dir, rewritten after every stage: results.json, summary.md, log.txt,
pictures.png, recipes.png and the trained network in parts of 15 MiB (`cat network.pth.* >
network.pth`). Data, runs and the compiler's cache stay in --work_dir for a second session.
"""

# ruff: noqa: E402
import time

START = time.time()  # before what takes seconds to import

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from gpu_job import WORK_DIR, StageName

from runtime.files import atomic_write, make_folder, read_json, write_json
from runtime.settings import PositiveFloat, Settings, UserError, parse_args, run

SCRIPT = Path(__file__).with_name("gpu_stages.py")
SHARES: dict[StageName, float] = {
    "tests": 80, "speed": 85, "small": 260, "recipes": 70, "sampling": 45,
}  # fmt: skip
"""Seconds of nine minutes, in proportion; what a stage leaves is shared by those after it."""
LEAST: dict[StageName, float] = {
    "tests": 20, "speed": 30, "small": 75, "recipes": 60, "sampling": 20,
}  # fmt: skip
"""Seconds below which a stage is not started."""
BESIDE: dict[StageName, tuple[StageName, ...]] = {
    "data": ("speed", "small", "recipes", "sampling"),
    "compile": ("speed", "small"),
}
"""What is made ready beside the tests, and by whom it is wanted."""
BESIDE_SECONDS = 100.0
"""Of nine minutes, as above."""
TOY_SLACK = 6.0
"""A rehearsal has its steps counted, and may share its cores with others: limits are wider."""
END = 6.0
"""Seconds kept for the last files."""
GRACE = 5.0
"""Seconds between the request to stop and the kill."""


@dataclass(frozen=True)
class SessionConfig(Settings):
    """Measure what there is to measure on a GPU."""

    minutes: PositiveFloat = 9.0
    """When all must have ended, from the start of the process on."""
    stages: tuple[StageName, ...] = tuple(SHARES)
    """Which stages, of tests, speed, small, recipes and sampling."""
    toy: bool = False
    """Everything in miniature, on the CPU: a rehearsal."""
    out_dir: Path = WORK_DIR / "results"
    """The few files that are worth keeping."""
    work_dir: Path = WORK_DIR
    """Data, runs and caches."""


class Session:
    """What the stages have found, written after each of them."""

    def __init__(self, config: SessionConfig, log: TextIO):
        self.config, self.log = config, log
        self.end = START + 60 * config.minutes * (TOY_SLACK if config.toy else 1) - END
        self.results: dict[str, Any] = {"minutes": config.minutes, "toy": config.toy, "stages": {}}

    def note(self, stage: str, found: dict[str, Any]) -> None:
        print(f"=== {stage}: {found['status']}, {found.get('seconds', 0)} s", flush=True)
        self.results["stages"][stage] = found
        write_json(self.config.out_dir / "results.json", self.results)
        with atomic_write(self.config.out_dir / "summary.md") as temporary:
            temporary.write_text(summary(self.results), encoding="utf-8")


class Stage:
    """The process of a stage, which is stopped when its time is up."""

    def __init__(self, session: Session, name: StageName, seconds: float):
        print(f"\n=== {name}: {seconds:.0f} s at most", flush=True)
        config, self.session, self.name = session.config, session, name
        self.since = time.time()
        self.until = self.ended = self.since + seconds
        self.figures = config.work_dir / f"{name}.json"
        self.figures.unlink(missing_ok=True)  # of a session before
        command = [sys.executable, str(SCRIPT), "--stage", name,
                   "--until", str(self.until - GRACE), "--work_dir", str(config.work_dir),
                   "--out_dir", str(config.out_dir)] + ["--toy"] * config.toy  # fmt: skip
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(config.work_dir.resolve() / "compiled")}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,  # so that its own children can be stopped with it
            env={"TQDM_MININTERVAL": "15", "PYTHONUNBUFFERED": "1"} | os.environ | cache,
        )  # fmt: skip
        self.reader = threading.Thread(target=self.follow, daemon=True)
        self.reader.start()

    def follow(self) -> None:
        for line in self.process.stdout:
            print(line, end="", flush=True)
            self.session.log.write(f"{self.name}: {line}")
            self.session.log.flush()
        self.ended = time.time()

    def finish(self) -> None:
        """Wait for it until its time is up, then keep how it ended and what it wrote."""
        status = ""
        for number, until in ((signal.SIGTERM, self.until - GRACE), (signal.SIGKILL, self.until)):
            try:
                self.process.wait(max(0, until - time.time()))
                break
            except subprocess.TimeoutExpired:
                status = f"stopped after {time.time() - self.since:.0f} s"
                self.signal(number)
        code = self.process.wait()
        self.signal(signal.SIGKILL)  # whatever it has left running
        self.reader.join(timeout=2)
        status = status or ("done" if code == 0 else f"failed (exit code {code})")
        wrote = read_json(self.figures) if self.figures.exists() else {}
        seconds = round(self.ended - self.since, 1)
        self.session.note(self.name, {"status": status, "seconds": seconds} | wrote)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def summary(results: dict[str, Any]) -> str:
    """summary.md: how each stage ended, then what they say."""
    found = results["stages"]
    machine = next((s["machine"] for s in found.values() if "machine" in s), {})
    lines = [f"# {machine.get('device', 'no machine')}, torch {machine.get('torch')}", "",
             "| stage | ended | seconds |", "|---|---|---:|"]  # fmt: skip
    lines += [f"| {n} | {s['status']} | {s.get('seconds', 0)} |" for n, s in found.items()]
    for name, stage in found.items():
        lines += ["", f"## {name}"]
        for paragraph in [*stage.get("text", {}).values(), stage.get("error", "")]:
            lines += ["", paragraph] if paragraph else []
    return "\n".join([*lines, ""])


def share(stage: StageName, stages: Sequence[StageName], left: float) -> float:
    """Seconds of a stage: its share of what is left for it and those after it."""
    after = stages[stages.index(stage) :]
    return left * SHARES[stage] / sum(SHARES[name] for name in after)


def run_stages(session: Session) -> None:
    stages = [name for name in SHARES if name in session.config.stages]
    seconds = (session.end - time.time()) * BESIDE_SECONDS / 540
    running: list[Stage] = []
    try:
        for name, wanted in BESIDE.items():
            if set(wanted) & set(stages):
                running.append(Stage(session, name, seconds))
        for name in stages:
            while running and name != "tests":  # from here on nothing else runs
                running[0].finish()
                del running[0]
            seconds = share(name, stages, session.end - time.time())
            if seconds < LEAST[name]:
                status = f"not started: {seconds:.0f} s left, it takes {LEAST[name]:.0f}"
                session.note(name, {"status": status})
                continue
            running.append(Stage(session, name, seconds))
            running[-1].finish()
            del running[-1]
    finally:
        for stage in running:
            stage.signal(signal.SIGKILL)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    config = parse_args(SessionConfig, argv)
    if unknown := set(config.stages) - set(SHARES):
        raise UserError(f"--stages {' '.join(sorted(unknown))}: use {', '.join(SHARES)}")
    if not torch.cuda.is_available() and not config.toy:
        raise UserError("no GPU here; --toy rehearses on the CPU")
    for folder in (config.out_dir, config.work_dir):
        make_folder(folder, "--out_dir")
    with open(config.out_dir / "log.txt", "w", encoding="utf-8") as log:
        session = Session(config, log)
        run_stages(session)
    print(f"\n{summary(session.results)}\n{config.out_dir}, {time.time() - START:.0f} s")
    return session.results


if __name__ == "__main__":
    run(main)
