"""The stages of gpu_session.py: each is a process of its own, and writes what it finds at once.

python benchmarks/gpu_stages.py --stage speed                    # one of them by itself
python benchmarks/gpu_stages.py --stage speed --toy              # in miniature, on the CPU
"""

import functools
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from common import table
from gpu_job import Job, StageConfig, StageName
from gpu_speed import compile_ahead, speed
from gpu_training import recipes, small

import guidance_scale
import render_iclevr
from diffusion.samplers import check_steps
from judging.bench import Bench, draw_frechet, draw_splits, open_bench, with_reference
from network.checkpoint import PRETRAINED
from runtime.files import make_folder
from runtime.settings import ROOT, SamplingConfig, parse_args, run
from training.run_folder import latest_checkpoint


def data(job: Job) -> None:
    """Render the stand-in with all cores, decode it, and compute the judge's features."""
    since = time.perf_counter()
    sequences = 12 if job.toy else 6003
    render_iclevr.main(["--num_sequences", str(sequences), "--out_dir", str(job.work / "data")])
    seconds = time.perf_counter() - since
    job.note(f"{3 * sequences:,} pictures rendered in {seconds:.0f} s, {os.cpu_count()} cores")
    bench = with_reference(open_bench(PRETRAINED, job.data, str(job.device)))
    _ = bench.reference.features
    job.note(render_s=seconds, pictures=3 * sequences)


class Outcomes:
    """Plugin of pytest: notes every outcome as soon as it is known."""

    def __init__(self, job: Job):
        self.job, self.tests = job, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = "" if report.passed else str(report.longrepr)[-400:]
            self.tests[report.nodeid.split("::")[-1]] = {
                "outcome": report.outcome, "seconds": report.duration, "why": why,
                "properties": dict(report.user_properties),
            }  # fmt: skip
            self.job.note(tests=self.tests)


def tests(job: Job) -> None:
    """tests/test_cuda.py."""
    outcomes = Outcomes(job)
    # In this process, one after the other: pyproject.toml's workers would share the card.
    argv = ["-o", "addopts=", "-p", "no:cacheprovider", "-v", "--tb=short"]
    argv.append(str(ROOT / "tests" / "test_cuda.py"))
    pytest.main(argv + (["-k", "muon"] if job.toy else []), plugins=[outcomes])
    of = [test["outcome"] for test in outcomes.tests.values()]
    lines = [f"{of.count('passed')} of {len(of)} tests passed"]
    for name, found in outcomes.tests.items():
        lines += [f"- {name}: {key}: {value}" for key, value in found["properties"].items()]
        if found["outcome"] != "passed":
            lines.append(f"- {name}: {found['outcome']}: {' '.join(found['why'].split())}")
    job.note("\n".join(lines))


def sampling(job: Job) -> None:
    """Seconds for what users draw: both splits, the sweep, a Frechet distance."""
    found = latest_checkpoint(job.work / "runs" / "full-0")
    half = job.work / "network.pth"
    network = half if half.exists() else PRETRAINED
    few = SamplingConfig(scheduler="ddpm", num_inference_steps=10 if job.toy else 12)
    bench = with_reference(open_bench(network, job.data, str(job.device)))
    sweep = f"--scheduler ddpm --num_inference_steps {few.num_inference_steps} --num_seeds 1 "
    sweep += "--num_fd_samples 0 " + ("--scale_max 2 --scale_step 1" if job.toy else "")
    argv = job.argv(sweep, ckpt_path=network, output_dir=job.work / "result")
    shutil.rmtree(job.work / "result" / bench.run_name / "guidance_scale", ignore_errors=True)
    count = 8 if job.toy else 2048
    label = f"{bench.run_name}, DDPM {few.num_inference_steps}"
    splits(job, label, bench, few)
    clock(job, f"Frechet distance of {count}, {label}", count,
          lambda: draw_frechet(bench, few, 0, count, progress=False))  # fmt: skip
    clock(job, f"sweep of 19 scales, {label}", 19 * 64, lambda: guidance_scale.main(argv))
    if found is not None:
        full = open_bench(found, job.data, str(job.device))
        for name in ("ddim", "ddpm"):
            if job.left() > (8 if name == "ddim" else 30) or job.toy:
                how = SamplingConfig(scheduler=name)
                steps = check_steps(full.checkpoint.config.noise, how)
                splits(job, f"full size, {name.upper()} {steps}", full, how)
    rows = job.report["draws"]
    rates = {n: f"{row['pictures'] / row['seconds']:,.0f}" for n, row in rows.items()}
    cells = {n: f"{row['seconds']:.2f}" for n, row in rows.items()}
    job.note(table("what is drawn, guidance 3", {"seconds": cells, "pictures/s": rates}))


def splits(job: Job, label: str, bench: Bench, how: SamplingConfig) -> None:
    """Both splits, after one evaluation of the network to warm up."""
    draw_splits(bench, replace(how, scheduler="dpmpp", num_inference_steps=5), 0, progress=False)
    count = sum(map(len, bench.labels.values()))
    clock(job, f"2 x 32 conditions, {label}", count,
          lambda: draw_splits(bench, how, 1, progress=False))  # fmt: skip


def clock(job: Job, label: str, pictures: int, draw: Callable[[], Any]) -> None:
    since = time.perf_counter()
    draw()
    row = {"seconds": time.perf_counter() - since, "pictures": pictures}
    job.note(draws=job.report.get("draws", {}) | {label: row})


STAGES: dict[StageName, Callable[[Job], None]] = {
    "data": data, "compile": compile_ahead, "tests": tests, "speed": speed, "small": small,
    "recipes": recipes, "sampling": sampling,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_args(StageConfig, argv)
    for folder in (config.work_dir, config.out_dir):
        make_folder(folder)
    job = Job(config)
    if config.toy:  # the compiler takes minutes on a CPU
        torch.compile = functools.partial(torch.compile, backend="eager")
    try:
        STAGES[config.stage](job)
    except Exception as error:  # noted, so that it comes back with the rest
        traceback.print_exc()
        job.note(error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        sys.exit(1)


if __name__ == "__main__":
    run(main)
