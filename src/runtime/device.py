"""Which device and number format to compute in."""

import contextlib
import ctypes
import os
import sys

import torch

from runtime import processes
from runtime.settings import Precision, UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's mallopt(3)."""


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best there is: CUDA, Apple's MPS, else the CPU.

    Of several processes on a machine each gets a card of its own.

    Raises:
        UserError: the named device is not there, or other processes are not.
    """
    processes.check_launcher()
    has_mps = torch.backends.mps.is_available()
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown; use cuda, mps or cpu") from None
    if device.type == "cuda" and processes.world_size() > 1:
        if device.index is not None:
            raise UserError(f"--device {name}: each process takes a card of its own; use cuda")
        device = torch.device("cuda", processes.local_rank())
        name = f"cuda (process {processes.local_rank()} of this machine)"
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(has_mps)}
    if (device.index or 0) >= counts.get(device.type, 0):
        raise UserError(f"--device {name}: not there; leave it out for the best there is")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    processes.join(device)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 1 GiB: a training step allocates the same again.

    By default it hands large blocks back to the system, which then fills every page with zeros
    anew: some 30,000 page faults in each step of the small network. Elsewhere nothing happens.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**30)


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The low-precision type to compute in; None for plain float32.

    "auto" is bfloat16 where the hardware multiplies faster in it, else float32.
    """
    if precision == "auto":
        has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        # Intel's AVX-512 instructions for it are no faster than float32's, a training step was
        # 1.4 times as long with them; AMD's are.
        native = has.get("amx_bf16") or (
            has.get("avx512_bf16") and has.get("cpu_name", "").startswith("AMD")
        )
        if device.type == "cuda":
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        precision = "bf16" if native else "no"
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def warn_of_launcher(precision: Precision) -> None:
    """Say so where `accelerate launch` was told another number format: nothing here reads it."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" is what it sets untold, too
    if told not in ("no", precision) and processes.is_main():
        print(
            f"warning: --mixed_precision {told} of accelerate launch is not taken, but the "
            f"script's own: {precision}; put such flags behind the script's name",
            file=sys.stderr,
        )


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """torch.autocast in `dtype`, or nothing for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
