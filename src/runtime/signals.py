"""Signals that ask for an end, put off until the step that was begun is done."""

import signal
import sys
import threading
import time

from runtime import processes

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
"""Ctrl-C, kill, a terminal that is gone, what schedulers send before a job's time is up (Slurm's
--signal, submitit), the limit of CPU time, Windows' Ctrl-Break."""


def stop_signals() -> list[signal.Signals]:
    """Those of `NAMES` that there are here.

    What the caller has had ignored stays so (nohup: SIGHUP), but for Ctrl-C and kill: a shell has
    Ctrl-C ignored in whatever it starts in the background.
    """
    always = (signal.SIGINT, signal.SIGTERM)
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    ignored = (signal.SIG_IGN, None)
    return [n for n in numbers if n in always or signal.getsignal(n) not in ignored]


class Stopped(Exception):
    """What can be taken up again later, such as a preview, was cut short by a signal."""


class StopSignal:
    """`stop_signals` end a training after the current step.

    Ctrl-C or SIGTERM once more ends it at once. Within a second it still counts as the first: a
    terminal or a scheduler signals every process, and torch's launcher passes on what it got
    itself. In another thread than the main one, as in a sweep of Weights & Biases, no signal
    arrives.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.since = 0.0
        """When the first signal came."""
        self.at_once = False
        """While true, the first signal raises `Stopped` right away (in a single process)."""

    def agreed(self) -> bool:
        """Whether any process has been told to stop, since when all of them are.

        All processes have to ask, at the same point.
        """
        if number := processes.largest(self.number or 0):
            self.number = number
        return number != 0

    def __enter__(self) -> "StopSignal":
        main = threading.current_thread() is threading.main_thread()
        numbers = stop_signals() if main else ()
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number is not None:
            # Not another one: a scheduler's warning is followed by its SIGTERM, a lost terminal's
            # SIGHUP by its shell's.
            again = number == signal.SIGINT or number == self.number == signal.SIGTERM
            if again and time.monotonic() > self.since + 1:
                sys.exit(128 + number)
            return
        self.number, self.since = number, time.monotonic()
        if processes.is_main():
            print("\nstopping after this step; once more stops at once", file=sys.stderr)
        if self.at_once and processes.world_size() == 1:  # else the others would wait for ever
            raise Stopped
