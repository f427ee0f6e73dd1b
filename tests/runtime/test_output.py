"""Streams that end before the work, and progress bars in a file."""

import contextlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tqdm.std
from conftest import SRC, train_argv

from runtime.output import LOG_INTERVAL_S, _lasting, progress_bar
from runtime.settings import run

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def ended(main: Callable[[], object], streams: dict[int, int | None]) -> int:
    """The exit code of a script whose standard streams are these descriptors; None: closed.

    It must not compute: torch's threads are not in a fork.
    """
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            for number, target in streams.items():
                os.close(number) if target is None else os.dup2(target, number)
            for number, name in ((1, "stdout"), (2, "stderr")):
                closed = streams.get(number, number) is None
                encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
                stream = None if closed else open(number, "w", encoding=encoding)  # noqa: SIM115
                setattr(sys, name, stream)
            try:
                run(main)
                code = 0
            except SystemExit as stop:
                code = stop.code
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def torn():
    """A pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def say_and_work(done: Path) -> None:
    for _ in range(300):
        print("实验", flush=True)
        print("实验", file=sys.stderr)
    done.touch()


@needs_fork
@pytest.mark.parametrize("how", ["closed", "torn", "/dev/full", "read only"])
@pytest.mark.parametrize("numbers", [[1], [2], [0, 1, 2]])
def test_work_outlasts_its_streams(tmp_path, torn, numbers, how):
    null = os.open(os.devnull, os.O_RDONLY)
    full = os.open("/dev/full", os.O_WRONLY)
    target = {"closed": None, "torn": torn, "/dev/full": full, "read only": null}[how]
    streams = {0: null, 1: os.open(os.devnull, os.O_WRONLY), 2: os.open(os.devnull, os.O_WRONLY)}
    streams |= dict.fromkeys(numbers, target)
    assert ended(lambda: say_and_work(tmp_path / "done"), streams) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(os.name != "posix", reason="a line of sh")
def test_training_outlasts_its_terminal(world, tmp_path, torn):
    argv = train_argv(world, tmp_path, "--epochs", 1, "--sample_interval", 1)
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, SRC / "train.py", *argv]
    assert subprocess.run(command, stdout=torn).returncode == 0
    assert (tmp_path / "r" / "checkpoints" / "model_epoch_1.pth").exists()
    assert (tmp_path / "r" / "samples" / "epoch_1.png").exists()


@needs_fork
def test_a_closed_stream_is_not_the_next_file(tmp_path):
    """A library that prints to standard error would else print into a checkpoint."""

    def work():
        with open(tmp_path / "a", "wb"):
            os.write(2, b"of a library")

    assert ended(work, {2: None}) == 0
    assert (tmp_path / "a").read_bytes() == b""


@needs_fork
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_characters_that_a_stream_lacks_are_escaped(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    with open(tmp_path / "log", "w") as log:
        assert (
            ended(lambda: say_and_work(tmp_path / "done"), {1: log.fileno(), 2: log.fileno()}) == 0
        )
    assert (tmp_path / "log").read_text() == "\\u5b9e\\u9a8c\n" * 600


@needs_fork
def test_output_to_a_full_disk_is_told_once(tmp_path):
    full = os.open("/dev/full", os.O_WRONLY)
    with open(tmp_path / "log", "w") as log:
        assert ended(lambda: print("x" * 10**5), {1: full, 2: log.fileno()}) == 0
    assert (tmp_path / "log").read_text() == (
        "warning: output can't be written: No space left on device\n"
    )


@needs_fork
def test_a_pipe_that_does_not_wait_gets_everything():
    """Such as some programs leave behind."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    got: list[int] = []

    def read():
        with open(reader, "rb") as pipe:
            got.append(len(pipe.read()))

    thread = threading.Thread(target=read)
    thread.start()
    assert ended(lambda: print("x" * 10**6), {1: writer}) == 0
    os.close(writer)
    thread.join()
    assert got == [10**6 + 1]


def test_a_signals_handler_prints_while_something_is_printed():
    class Interrupted(io.BytesIO):
        def write(self, data):
            if not self.getvalue():
                super().write(b"handler ")
                print("in between", file=stream, flush=True)
            return super().write(data)

    raw = Interrupted()
    stream = _lasting(io.TextIOWrapper(raw, "utf-8"))
    print("work", file=stream, flush=True)
    assert raw.getvalue() == b"handler in between\nwork\n"


@pytest.mark.skipif(os.name != "posix", reason="a line of sh")
def test_help_into_a_pipe_that_closes_is_quiet():
    script = '{ "$@"; echo $? >&2; } | head -n 1'
    command = ["sh", "-c", script, "sh", sys.executable, SRC / "render_iclevr.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stderr == "0\n"


@pytest.fixture
def clock(monkeypatch):
    """tqdm's time, to be set by hand."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_in_a_file_is_a_line_a_minute(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(total=6000, desc="train") as bar:
        for _ in range(6000):
            clock[0] += 0.1
            bar.update()
            bar.set_postfix(loss="0.5", refresh=False)
            for _ in progress_bar(range(3), desc="inner", leave=False):
                pass
    lines = sys.stderr.getvalue().split("\n")
    assert "\r" not in sys.stderr.getvalue() and "inner" not in sys.stderr.getvalue()
    assert 9 <= len([line for line in lines if line]) <= 600 / LOG_INTERVAL_S + 1
    assert "100%" in sys.stderr.getvalue() and "loss=0.5" in lines[0]


def test_a_bar_on_a_terminal_moves(monkeypatch, clock):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar(total=100, desc="train") as bar:
        for _ in range(100):
            clock[0] += 0.2
            bar.update()
    assert sys.stderr.getvalue().count("\r") > 50


def test_every_bar_comes_from_the_one_place():
    for path in SRC.rglob("*.py"):
        if path.name != "output.py":
            assert "tqdm(" not in path.read_text(encoding="utf-8"), path
