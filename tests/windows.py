"""Windows' rules of files, imitated: what breaks them here would fail there."""

import builtins
import contextlib
import errno
import fcntl
import io
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

POSIX_ONLY = [(os, "fork"), (os, "posix_fallocate"), (os, "mkfifo")]
POSIX_ONLY += [(signal, name) for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGXCPU")]


def in_use(path: Path) -> bool:
    """Whether this process has the file open or mapped."""
    path = os.path.realpath(path)
    opened = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            opened.append(os.readlink(f"/proc/self/fd/{number}"))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    return path in opened or any(line.endswith(f" {path}") for line in maps.splitlines())


@pytest.fixture
def windows(monkeypatch):
    """Until the test's end:

    - fsync refuses a file that was opened for reading;
    - a file that is open or mapped can't be renamed, replaced or deleted;
    - some characters can't be in names;
    - text files without an encoding are in cp1252;
    - there are no fork, SIGHUP, SIGKILL ..., and processes are spawned.
    """
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("only Linux tells which files are in use")
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    for module, name in POSIX_ONLY:
        monkeypatch.delattr(module, name, raising=False)
    real_fsync, real_open = os.fsync, io.open

    def fsync(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real_fsync(number)

    def check_name(path):
        if set(os.path.basename(os.fsdecode(path))) & set('<>:"|?*'):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)

    def checked(real):
        def call(*paths, **more):
            for path in paths:
                check_name(path)
                if os.path.isfile(path) and in_use(path):
                    raise PermissionError(errno.EACCES, "used by another process", path)
            return real(*paths, **more)

        return call

    def text_in_cp1252(file, mode="r", buffering=-1, encoding=None, *more, **options):
        if not isinstance(file, int):
            check_name(file)
        if encoding in (None, "locale") and "b" not in mode:
            encoding = "cp1252"
        return real_open(file, mode, buffering, encoding, *more, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace", "unlink", "remove"):
        monkeypatch.setattr(os, name, checked(getattr(os, name)))
    for module in (io, builtins):
        monkeypatch.setattr(module, "open", text_in_cp1252)
    yield
    multiprocessing.set_start_method(method, force=True)
