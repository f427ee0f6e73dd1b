"""Ctrl-C and SIGTERM, put off until the step that was begun is done."""

import signal
import sys
import threading
import time

from runtime import processes


class Stopped(Exception):
    """A preview was cut short by a signal."""


class StopSignal:
    """Ctrl-C and SIGTERM end training after the current step; a second one ends it at once.

    Within a second it still counts as the first: a terminal or a scheduler signals every process,
    and torch's launcher passes on what it got itself. In another thread than the main one, as in a
    sweep of Weights & Biases, no signal arrives.
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
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        self.before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.number is not None:
            if time.monotonic() > self.since + 1:
                sys.exit(128 + number)
            return
        self.number, self.since = number, time.monotonic()
        if processes.is_main():
            print("\nstopping after this step; once more stops at once", file=sys.stderr)
        if self.at_once and processes.world_size() == 1:  # else the others would wait for ever
            raise Stopped
