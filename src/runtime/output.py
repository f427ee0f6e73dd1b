"""What people see: standard output and error, which may end before the work, and progress bars."""

import contextlib
import errno
import io
import os
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

from runtime import processes

LOG_INTERVAL_S = 60
"""Between lines of a progress bar in a file."""


def outlast_readers() -> None:
    """From here on no print fails: not for a terminal or pipe that is gone (ssh, `| head`), a
    stream that is closed (`2>&-`), or characters that the encoding of a stream lacks.

    Work goes on, and what can't be shown is dropped; missing characters are escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Closed: the next file would get this number, and what libraries print into it. It is
            # the lowest that is free, so this one gets it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not hasattr(stream, "buffer"):  # a notebook's
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    raw = getattr(stream.buffer, "raw", stream.buffer)
    return io.TextIOWrapper(
        _Lasting(raw, stream), stream.encoding, errors="backslashreplace",
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


class _Lasting(io.RawIOBase):
    """Writes to `raw` as long as that can be written to.

    Without a buffer of its own: a signal's handler may print while something is being printed.
    """

    def __init__(self, raw: Any, stream: TextIO):
        self.raw, self.stream = raw, stream  # the stream would close `raw` if it was let go
        self.told = False

    def write(self, data: Any) -> int:
        left = memoryview(data)
        try:
            while left:
                written = self.raw.write(left)
                if written is None:  # full, and opened by someone as not to be waited for
                    time.sleep(0.01)
                left = left[written or 0 :]
        except OSError as error:
            if error.errno == errno.ENOSPC and not self.told:
                self.told = True
                print(f"warning: output can't be written: {error.strerror}", file=sys.stderr)
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return self.raw.isatty()


def progress_bar(iterable: Iterable | None = None, shown: bool = True, **options: Any) -> tqdm:
    """tqdm's bar on standard error, by the first process; in a file, a line once a minute.

    Args:
        shown: False for none.
        options: of tqdm. Figures behind the bar: `set_postfix(..., refresh=False)`.
    """
    options["disable"] = not shown or not processes.is_main()
    if sys.stderr.isatty():
        return tqdm(iterable, **options)
    often = {"mininterval": LOG_INTERVAL_S, "maxinterval": LOG_INTERVAL_S, "delay": LOG_INTERVAL_S}
    return _Lines(iterable, **often, **options, position=0)


class _Lines(tqdm):
    """Every state of the bar is a line of its own; one that is done within a minute shows none."""

    @staticmethod
    def status_printer(file: TextIO) -> Any:
        return lambda text: print(text, file=file, flush=True) if text else None
