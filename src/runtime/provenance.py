"""Where a result comes from: the command, the versions and the machine, written beside it."""

import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from runtime import processes
from runtime.command_line import command
from runtime.settings import ROOT


def provenance(script: str, argv: Sequence[str] | None, device: torch.device) -> dict[str, Any]:
    """What is needed to make a result again, JSON-able.

    Args:
        script: its path.
        argv: its flags; None: those of the command line.
    """
    flags = sys.argv[1:] if argv is None else argv
    return {
        "command": command(Path(script).stem, *flags),
        "commit": commit(),
        "processes": processes.world_size(),
        "diffusers": version("diffusers"),
    } | machine(device)


def machine(device: torch.device) -> dict[str, Any]:
    """Where figures were measured, JSON-able."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        has = torch.cpu.get_capabilities()
        name = has.get("cpu_name") or platform.processor() or platform.machine()
        bf16 = [kind for kind in ("avx512_bf16", "amx_bf16", "bf16") if has.get(kind)]
        name += f" ({', '.join(bf16) or 'no bf16 instructions'})"
    return {
        "device": f"{device.type}, {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def commit() -> str:
    """The repository's commit, with "-dirty" where files differ from it; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
