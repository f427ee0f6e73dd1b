"""Stages of gpu_session.py: how fast a training step is, and where its time goes."""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from common import show, spread, synchronize, table
from gpu_job import CHOICES, ORIGINAL, SMALL, Job, free_memory
from input_pipeline import Waiting, cached_loader
from training_step import Matmul, Variant, row_of, step_table

from runtime.device import autocast_dtype
from runtime.settings import TrainConfig

PROFILED = 5
"""Steps that are profiled."""


def compile_ahead(job: Job) -> None:
    """Fill the compiler's cache with the networks that will be wanted compiled."""
    for network in (ORIGINAL, SMALL):
        variant = Variant(job.settings(network), job.device, 1, compiled=True)
        job.note(f"compiled with an empty cache, {network}: {variant.warm_up:.0f} s")
        free_memory()


def measure(
    job: Job,
    config: TrainConfig,
    matmul_rate: float = 1.0,
    profile: bool = False,
    benchmark: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """A row of the table of training steps; `profile` notes where its time goes, too.

    Args:
        benchmark: cuDNN tries out its algorithms.
        options: of `Variant`.
    """
    free_memory()
    torch.backends.cudnn.benchmark = benchmark
    steps = 2 if job.toy else max(5, 20 * 64 // config.batch_size)
    variant = Variant(config, job.device, steps, **options)
    rates = [variant() for _ in range(1 if job.toy else 3)]
    if profile:
        job.note(profile_table(variant, "compiled" if options.get("compiled") else "eager"))
    return {"batch_size": config.batch_size} | row_of(variant, rates, matmul_rate)


def profile_table(variant: Variant, name: str) -> str:
    """The kernels that take the most time."""
    cuda = variant.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if cuda else [kind.CPU]) as kept:
        since = time.perf_counter()
        for _ in range(PROFILED):
            variant.step()
        synchronize(variant.device)
        wall = time.perf_counter() - since
    events = kept.key_averages()
    if cuda:  # operators and annotations carry their kernels' time too: count the kernels alone
        events = [e for e in events if e.device_type.name == "CUDA"]
        events = [e for e in events if not getattr(e, "is_user_annotation", False)]
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    seconds = {e: 1e-6 * getattr(e, key) for e in events}
    whole, top = sum(seconds.values()), sorted(events, key=lambda e: -seconds[e])[:12]
    rows = {f"{n}. `{e.key[:90].replace('|', '/')}`": e for n, e in enumerate(top, start=1)}
    columns = {
        "ms a step": {n: f"{1e3 * seconds[e] / PROFILED:.2f}" for n, e in rows.items()},
        "share": {n: f"{100 * seconds[e] / max(whole, 1e-9):.1f}%" for n, e in rows.items()},
        "calls": {n: f"{e.count / PROFILED:g}" for n, e in rows.items()},
    }
    busy = f"{100 * whole / wall:.0f}% of {1e3 * wall / PROFILED:.1f} ms a step"
    return f"Where the time goes, {name} (kernels fill {busy}):\n\n{table('kernel', columns)}"


def speed(job: Job) -> None:
    """Training steps of the full-size network by batch, layout and compiler; of the others, too."""
    full, small = job.settings(ORIGINAL), job.settings(SMALL)
    dtype = autocast_dtype("auto", job.device) or torch.float32
    matmul = Matmul(job.device, dtype)
    rates = [matmul() for _ in range(5)]
    del matmul
    how = f"{str(dtype).removeprefix('torch.')}: {show([rate / 1e12 for rate in rates])} TFLOP/s"
    job.note(f"matmul in {how}", matmul_flops_per_s=spread(rates))
    batches = {n: replace(full, batch_size=n // (8 if job.toy else 1)) for n in (64, 128, 256)}
    variants: dict[str, tuple[TrainConfig, dict[str, Any]]] = {
        "batch 64 (default)": (full, {"profile": True}),
        SMALL: (small, {}),
        "batch 64, not channels_last": (full, {"layout": torch.contiguous_format}),
        "batch 128": (batches[128], {}),
        "batch 256": (batches[256], {}),
        f"{SMALL}, compiled": (small, {"compiled": True}),
        "batch 64, compiled": (full, {"compiled": True, "profile": True}),
        "batch 64, cudnn.benchmark": (full, {"benchmark": True}),
        CHOICES: (job.settings(CHOICES), {}),
        "batch 256, compiled": (batches[256], {"compiled": True}),
    }
    for network in (ORIGINAL, SMALL):
        measure_waiting(job, network)
    rows: dict[str, dict[str, Any]] = {}
    seconds = {False: 8.0, True: 20.0}  # of a variant, compiled or not
    for name, (config, options) in variants.items():
        compiled, since = options.get("compiled", False), time.perf_counter()
        if job.left() < seconds[compiled]:
            print(f"no time for {name}", flush=True)
            continue
        print(f"training step: {name}", flush=True)
        try:
            rows[name] = measure(job, config, statistics.median(rates), **options)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            job.note(f"{name}: {' '.join(str(error).split())[:200]}")
        seconds[compiled] = max(seconds[compiled], time.perf_counter() - since)
        job.note(step_table(rows), key="table", variants=rows)


def measure_waiting(job: Job, network: str) -> None:
    """The share of a training step that waits for the loader."""
    if not (job.work / "data" / "train.json").exists():
        return job.note("waiting for data: not measured, there are no pictures", key="waiting")
    free_memory()
    config = job.settings(network)
    loader = cached_loader(job.work / "data", config, job.device)
    share = Waiting(loader, config, job.device, steps=8)()
    figures = job.report.get("waiting", {}) | {network: share}
    job.note(f"waiting for data, {network}: at most {100 * share:.2f}% of a step", waiting=figures)
