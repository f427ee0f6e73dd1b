"""The whole job on a machine with nothing but Python: data, training, test, sweep.

    python src/demo.py                 # 12 minutes on 2 CPU cores
    python src/demo.py --quick         # the same stages in miniature, to see that they work
    python src/demo.py --pretrained    # straight to pictures, by the network that comes with it

Every stage is one of the repository's scripts, shown as the command it stands for. A stage whose
result is there is skipped; an interrupted one goes on where it stopped.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import guidance_scale
import render_iclevr
import test
import train
from runtime.files import read_json, write_json
from runtime.settings import ROOT, Settings, UserError, parse_args, run
from training.resume import latest_checkpoint

FULL = {
    "sequences": 2500,
    "steps": 1700,
    "seeds": 4,
    "fd": 64,
    "sweep": "--scale_min 1 --scale_max 7 --scale_step 2 --num_seeds 4",
}
QUICK = {
    "sequences": 100,
    "steps": 40,
    "seeds": 2,
    "fd": 8,
    "sweep": "--scale_min 1 --scale_max 3 --scale_step 2 --num_seeds 1",
}
SAMPLER = "--scheduler ddpm --num_inference_steps 12"
SAMPLING = f"{SAMPLER} --guidance_scale 3"


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Everything from data to pictures, on the rendered stand-in."""

    quick: bool = False
    """In miniature (under 2 minutes): shows that all stages work; the pictures are blobs."""
    pretrained: bool = False
    """Train nothing: test the network in data/standin/, in half a minute."""
    output_dir: Path = ROOT / "output"
    """Data, run and results go to folders in here."""


class Stages:
    """Runs scripts with flags; skips what is done, and notes how long each took."""

    def __init__(self, report: Path):
        self.report = report
        self.seconds = read_json(report)["seconds"] if report.exists() else {}

    def run(self, script: ModuleType, flags: str, done: bool = False) -> None:
        """Run `script` unless it has been done before."""
        print(f"\n$ python src/{script.__name__}.py {flags}", flush=True)
        if done:
            print("done before, skipped")
            return
        since = time.perf_counter()
        try:
            script.main(shlex.split(flags))
        except (SystemExit, KeyboardInterrupt):
            print("the demo goes on from here when it is started again", file=sys.stderr)
            raise
        # A run that only went on from an earlier one took less: the longest counts.
        seconds = max(time.perf_counter() - since, self.seconds.get(script.__name__, 0))
        self.seconds[script.__name__] = round(seconds, 1)
        write_json(self.report, {"seconds": self.seconds})


def show_pretrained(output: Path) -> None:
    """Both test splits, by the network that comes with the repository, on its own data."""
    flags = f"--output_dir {shlex.quote(str(output / 'result'))} {SAMPLING}"
    flags += f" --data_dir {shlex.quote(str(ROOT / 'data' / 'standin'))}"
    more = "--num_seeds 4 --num_fd_samples 0 --wandb disabled"
    print(f"\n$ python src/test.py {flags} {more}", flush=True)
    test.main(shlex.split(f"{flags} {more}"))
    print(f'try: python src/test.py {flags} --prompt "red sphere, cyan cube"')


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_args(DemoConfig, argv)
    if config.pretrained:
        if config.quick:
            raise UserError("--quick --pretrained: choose one of them")
        return show_pretrained(config.output_dir)
    size = QUICK if config.quick else FULL
    name = "demo-quick" if config.quick else "demo"
    output = config.output_dir
    run_dir, data, result = output / name, output / name / "data", output / "result" / name
    stages = Stages(run_dir / "demo.json")
    data_flag = f"--data_dir {shlex.quote(str(data))}"
    output_flag = f"--output_dir {shlex.quote(str(output))}"

    stages.run(
        render_iclevr,
        f"--num_sequences {size['sequences']} --out_dir {shlex.quote(str(data))}",
        (data / "train.json").exists(),
    )

    flags = f"--run_name {name} {output_flag} {data_flag} --max_train_steps {size['steps']}"
    flags += " --save_interval 1 --sample_interval 2 --preview_steps 25 --wandb offline"
    flags += " --recipe small"
    stages.run(train, flags + " --resume auto")

    checkpoint = latest_checkpoint(run_dir)
    common = f"--ckpt_path {shlex.quote(str(checkpoint))} {data_flag} --wandb offline"
    common += f" --num_fd_samples {size['fd']}"
    results = f"--output_dir {shlex.quote(str(output / 'result'))}"
    flags = f"{common} {results} {SAMPLING} --num_seeds {size['seeds']}"
    # Always: test and sweep keep their own draws, and make only those that are missing.
    stages.run(test, flags)
    stages.run(guidance_scale, f"{common} {results} {SAMPLER} {size['sweep']}")
    tested = max(result.glob("*/accuracies.json"), key=lambda p: p.stat().st_mtime).parent

    print("\nstage              seconds")
    for stage, seconds in stages.seconds.items():
        print(f"{stage:<18}{seconds:>8.0f}")
    print((result / "accuracies.md").read_text(encoding="utf-8"))
    print(
        f"pictures: {tested}\n  test_grid.png, new_test_grid.png, denoising.png,"
        " confusion.png, nearest.png"
    )
    chart = max(result.glob("guidance_scale/*/sweep.png"), key=lambda p: p.stat().st_mtime)
    print(f"sweep: {chart}\npreviews during training: {run_dir / 'samples'}")
    print(f'try: python src/test.py {common} {SAMPLING} --prompt "red sphere, cyan cube"')


if __name__ == "__main__":
    run(main)
