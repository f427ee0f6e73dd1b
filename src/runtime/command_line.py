"""From the command line, or a file, to settings; and from a mistake to a line that says so.

tyro turns settings classes into flags (nested ones without a prefix: `--norm_num_groups 8`);
pydantic checks types and ranges, for flags and for settings read back from a checkpoint alike.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import tyro
from pydantic import ConfigDict, TypeAdapter, ValidationError

from runtime import processes
from runtime.errors import UserError
from runtime.output import outlast_readers

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
"""Folder of the repository: default paths hang on it, so that commands work from any folder."""


class Settings:
    """Base of all settings: unknown names and NaN or infinite numbers are refused."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", allow_inf_nan=False)


def parse_args(cls: type[T], argv: Sequence[str] | None = None, default: T | None = None) -> T:
    """Read the command line into `cls`.

    Args:
        cls: a settings dataclass; its fields become flags, its docstring the help's first line.
        argv: the flags; None takes them from the command line.
        default: where values not given as flags come from (None: the class's own defaults).

    Raises:
        UserError: an unknown flag or a value of the wrong type or range.
    """
    argv = spelled_out(cls, sys.argv[1:] if argv is None else argv)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            config = tyro.cli(
                cls,
                args=argv,
                default=default,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
        raise UserError(_first_paragraph(captured.getvalue())) from None
    # No shell expands the ~ of --output_dir=~/runs.
    return with_paths(
        from_dict(cls, asdict(config), source=""), lambda path: Path(os.path.expanduser(path))
    )


def spelled_out(cls: type, argv: Sequence[str]) -> list[str]:
    """Flags with `--ema=False` and `--ema False`, as sweeps write them, made `--no_ema`.

    Raises:
        UserError: another value than true, false, 1 or 0 behind an equals sign.
    """
    known, words = boolean_flags(cls), {"true": True, "1": True, "false": False, "0": False}
    result: list[str] = []
    rest = list(argv)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        plain = name.removeprefix("no_")
        if not flag.startswith("--") or plain not in known:
            result.append(flag + equals + value)
            continue
        if not equals:
            value = rest.pop(0) if rest and rest[0].lower() in words else "true"
        if value.lower() not in words:
            raise UserError(f"{flag} {value!r}: use {flag} True or {flag} False")
        on = words[value.lower()] == (name == plain)
        result.append(f"--{plain}" if on else f"--no_{plain}")
    return result


def boolean_flags(cls: type) -> set[str]:
    """Names of the fields that are true or false, nested ones too."""
    found = set()
    for name, kind in get_type_hints(cls).items():
        if kind is bool:
            found.add(name)
        elif isinstance(kind, type) and issubclass(kind, Settings):
            found |= boolean_flags(kind)
    return found


def with_paths(config: T, change: Callable[[Path], Path]) -> T:
    """The same settings with `change` applied to every path in them, nested ones too."""
    changed = {}
    for name, value in vars(config).items():
        if isinstance(value, Settings):
            changed[name] = with_paths(value, change)
        elif isinstance(value, Path):
            changed[name] = change(value)
        elif isinstance(value, tuple) and any(isinstance(part, Path) for part in value):
            changed[name] = tuple(map(change, value))
    return replace(config, **changed)


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as JSON-able values (paths become strings, tuples lists); see `from_dict`."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def from_dict(cls: type[T], values: Any, source: str) -> T:
    """Rebuild settings, the inverse of `to_dict`, refusing unknown names and bad values.

    Args:
        source: the file that `values` came from, for the message; empty for the command line.

    Raises:
        UserError: naming the first bad entry, its value and what it should be.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        loc = [str(part) for part in first["loc"]]
        # Flags have no prefixes; an index into a list (0, 1 ...) is not a name.
        names = [part for part in loc if part.isidentifier() and not part[0].isupper()]
        name = f"{source}: {'.'.join(loc)}" if source else f"--{names[-1] if names else loc[-1]}"
        why = (first["msg"][0].lower() + first["msg"][1:]).removeprefix("value error, ")
        raise UserError(f"{name} {first['input']!r}: {why}") from None


def run(main: Callable[[], Any], if_stopped: str = "stopped") -> None:
    """Run a script's `main`: a user's mistake ends in one line and exit code 2.

    Args:
        if_stopped: what to say after Ctrl-C.
    """
    outlast_readers()
    try:
        main()
    except UserError as error:
        processes.wait_for_the_first()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a path that no check has foreseen
        name = f"{error.filename}: " if error.filename else ""
        print(f"error: {name}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(if_stopped, file=sys.stderr)
        sys.exit(130)
    finally:
        processes.leave()


def command(script: str, *flags: Any) -> str:
    """What to type in the repository's folder; a report that is handed on tells no other one."""
    short = [
        flag.relative_to(ROOT) if isinstance(flag, Path) and flag.is_relative_to(ROOT) else flag
        for flag in flags
    ]
    return as_typed(["python", f"src/{script}.py", *short])


def as_typed(argv: Sequence[Any]) -> str:
    """Arguments in one line, quoted for the shell of this system."""
    words = [str(word) for word in argv]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _first_paragraph(box: str) -> str:
    """The message inside the box that tyro draws around an error, on one line."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    if not lines:  # a terminal without box characters
        return " ".join(box.split())
    rule = next((i for i, line in enumerate(lines) if re.fullmatch("─+", line)), len(lines))
    flags = [line.split()[0] for line in lines[rule:] if line.startswith("--")]
    hint = f" (did you mean {flags[0]}?)" if flags and "nrecognized" in lines[0] else ""
    return " ".join(lines[:rule]) + hint + "; see --help"
