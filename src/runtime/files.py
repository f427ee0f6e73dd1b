"""Files that are either whole or absent, and JSON with errors a user can act on."""

import contextlib
import errno
import json
import os
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from runtime.settings import UserError

UNSUPPORTED = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""Errors of file systems (NFS, Lustre, FUSE) that know no locks or no fsync."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces `path` when the block succeeds.

    A crash, a kill or a full disk in between leaves the old file, or none, never half a file; an
    error leaves no new folder either.

    Raises:
        UserError: the folder can't be written to, or the disk is full.
    """
    # The suffix stays last: writers such as Pillow choose the format by it.
    temporary = path.with_name(f".tmp-{path.stem}-{secrets.token_hex(8)}{path.suffix}")
    missing = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "r+b") as file:  # Windows flushes no file opened for reading
            _flush_to_disk(file.fileno())
        _replace(temporary, path)
    except BaseException as error:
        for remove in (temporary.unlink, *(folder.rmdir for folder in missing)):  # innermost first
            with contextlib.suppress(OSError):  # never made, or it holds something
                remove()
        if isinstance(error, OSError):
            raise UserError(f"{path}: can't be written: {error.strerror or error}") from error
        raise


def _flush_to_disk(number: int) -> None:
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _replace(temporary: Path, path: Path) -> None:
    """os.replace; on Windows a scanner of viruses may hold either file for a moment."""
    for wait in (0.1, 0.3, 1.0) if os.name == "nt" else ():
        with contextlib.suppress(PermissionError):
            return os.replace(temporary, path)
        time.sleep(wait)
    os.replace(temporary, path)


def append(path: Path, text: str) -> None:
    """Add to the end of a text file, which a kill may leave with part of it."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None


def read_lines(path: Path) -> Iterator[Any]:
    """The values in a file of JSON lines, but for lines that a kill or a full disk has cut short.

    No file: none.
    """
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def make_folder(path: Path, flag: str = "--output_dir") -> None:
    """Make a folder where there is none, before work starts whose results it is to hold.

    Args:
        flag: which one names another.
    """
    with _name_another(path, flag):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def check_folder(path: Path, flag: str = "--output_dir") -> None:
    """Refuse what `make_folder` would fail with, without making anything."""
    with _name_another(path, flag):
        there = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
        tempfile.TemporaryFile(dir=there).close()


@contextlib.contextmanager
def _name_another(path: Path, flag: str) -> Iterator[None]:
    """What goes wrong with a folder ends in a message that says how to name another."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: can't be written to: {error.strerror}; name another with {flag}"
        ) from None


def remove_left_overs(folder: Path, older_than_s: float = 0) -> None:
    """Delete temporary files of `atomic_write` in a folder, of writes that a kill has cut short."""
    for path in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than_s:
                path.unlink()


def lock_folder(folder: Path, remedy: str) -> FileLock:
    """Keep other processes out of a folder, until the lock is released or this process ends.

    Where the file system has no locks, it says so and goes on without: a lock only guards against
    a mistake.

    Raises:
        UserError: another process holds it, or the file is not ours; ends with `remedy`.
    """
    path, owner = folder / ".lock", folder / ".lock-owner"
    # The system lifts it, however a process ends; a lock by a file that is there would outlive it.
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        who = "another process"
        with contextlib.suppress(OSError, ValueError):
            who = owner.read_text(encoding="utf-8")
        raise UserError(f"{folder}: {who} works here; {remedy}") from None
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno not in UNSUPPORTED:
            raise UserError(f"{path}: can't be locked: {why}; {remedy}") from None
        print(
            f"warning: {folder}: can't be locked here ({why}); see to it that no "
            "other process works in it", file=sys.stderr,
        )  # fmt: skip
        return lock
    with contextlib.suppress(OSError):
        owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    return lock


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, remedy: str = "check the path") -> Any:
    """Read a JSON file: UTF-8, with or without a byte-order mark, or UTF-16 (PowerShell's).

    Raises:
        UserError: the file is missing, unreadable or not JSON; ends with `remedy`.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}; {remedy}") from None
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise UserError(f"{path}: not valid JSON ({error}); mend the file, or {remedy}") from None
