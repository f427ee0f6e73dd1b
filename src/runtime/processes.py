"""Several processes that train or draw together, on one machine or more.

    accelerate launch --multi_gpu --num_processes 8 src/train.py ...

accelerate (or torchrun) starts the processes and tells each its number in environment variables; a
script that was started by itself is a single one, for which everything in here does nothing. All
processes compute, the first one writes, prints and logs.

Such variables may be another launcher's. WORLD_SIZE decides: where it is absent, empty or 1, there
is a single process, whatever the others say. Else RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
must be there and fit, or `join` ends in an error that says how to get rid of them.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.errors import UserError

T = TypeVar("T")

REMEDY = "start with accelerate launch, or, for a single process, unset WORLD_SIZE"
HEAD_START_S = 3.0
"""An error that all processes run into is printed by the first; the launcher ends the others."""
MEET_WITHIN = timedelta(minutes=10)
"""All processes have to have started; what they exchange later may take longer."""


def check_launcher() -> None:
    """Refuse launcher's variables that make no sense; the message names the variable."""
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdecimal() or size == "0":
        raise UserError(f"WORLD_SIZE={size}: not a number of processes; {REMEDY}")
    if world_size() == 1:
        return
    limits = {"RANK": int(size), "LOCAL_RANK": int(size), "MASTER_PORT": 2**16, "MASTER_ADDR": None}
    for name, limit in limits.items():
        value = os.environ.get(name, "")
        if not value:
            raise UserError(f"WORLD_SIZE={size}, but no {name}: no launcher's doing; {REMEDY}")
        if limit and not (value.isdecimal() and int(value) < limit):
            raise UserError(f"{name}={value}: not below {limit} (WORLD_SIZE={size}); {REMEDY}")


def join(device: torch.device) -> None:
    """Meet the other processes, if the launcher has started any; once, before any of the below."""
    if world_size() > 1 and not dist.is_initialized():
        # gloo for what lies on the CPU: agreements, and pictures that are gathered.
        nccl = device.type == "cuda" and dist.is_nccl_available()  # which Windows has not
        where = "{MASTER_ADDR}:{MASTER_PORT}, WORLD_SIZE={WORLD_SIZE}".format_map(os.environ)
        if is_main():
            print(f"meeting the other processes: {where}", file=sys.stderr)
        try:
            store, number, count = next(dist.rendezvous("env://", timeout=MEET_WITHIN))
            backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
            dist.init_process_group(backend, store=store, rank=number, world_size=count)
        except (RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:160]
            raise UserError(
                f"the other processes can't be met: {where} ({why}); {REMEDY}"
            ) from None
        if not is_main():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return _number("LOCAL_RANK", 0) if world_size() > 1 else 0


def world_size() -> int:
    """How many processes there are, on all machines."""
    return _number("WORLD_SIZE", 1) or 1


def _number(name: str, default: int) -> int:
    """An environment variable; the default where it is no number, which `check_launcher` tells."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def shard(count: int, number: int | None = None) -> slice:
    """Which of `count` things process `number` (this one) works on: a run of them, in order."""
    number = rank() if number is None else number
    return slice(count * number // world_size(), count * (number + 1) // world_size())


def gather(part: Tensor, count: int) -> Tensor:
    """Every process's part, put together again: (its share of `count`, ...) -> (count, ...).

    Args:
        part: on the CPU, as `shard` has cut it.
    """
    if world_size() == 1:
        return part
    sizes = [len(range(count)[shard(count, number)]) for number in range(world_size())]
    padded = part.new_zeros(max(sizes), *part.shape[1:])  # gloo gathers equal shapes only
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def total(values: Tensor) -> Tensor:
    """The sum of all processes' values, which are of one shape."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def from_main(value: T) -> T:
    """The first process's value, for all of them to act on alike."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def largest(value: int) -> int:
    """The largest of all processes' values."""
    if world_size() == 1:
        return value
    values = torch.tensor([value])
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def wait_for_all() -> None:
    """Return when all processes have come here."""
    largest(0)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """One process of each machine goes first: it makes the files that the others then find."""
    if local_rank():
        wait_for_all()
    try:
        yield
    finally:  # what fails here fails for the others, too: they are not kept waiting
        if not local_rank():
            wait_for_all()


def wait_for_the_first() -> None:
    """Let the first process report an error that all have: it is then printed once."""
    if not is_main():
        sys.stderr.flush()
        time.sleep(HEAD_START_S)
