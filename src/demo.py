"""The whole job on a machine with nothing but Python: data, training, test, sweep, report.

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
import report
import test
import train
from network.checkpoint import PRETRAINED
from runtime.files import read_json, write_json
from runtime.settings import ROOT, Settings, UserError, parse_args, run
from training.resume import latest_checkpoint

FULL = dict(
    sequences=2500, steps=1700, seeds=4, fd=64, sweep="--scale_max 7 --scale_step 2 --num_seeds 4"
)
QUICK = dict(
    sequences=100, steps=40, seeds=2, fd=8, sweep="--scale_max 3 --scale_step 2 --num_seeds 1"
)
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


def stage(script: ModuleType, flags: str, notes: Path, done: bool = False) -> None:
    """Run `script` unless it has been done before, and note in `notes` how long it took."""
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
    seconds = read_json(notes)["seconds"] if notes.exists() else {}
    # A run that only went on from an earlier one took less: the longest counts.
    longest = max(time.perf_counter() - since, seconds.get(script.__name__, 0))
    write_json(notes, {"seconds": seconds | {script.__name__: round(longest, 1)}})


def show_pretrained(output: Path) -> None:
    """Both test splits, by the network that comes with the repository, on its own data."""
    flags = f"--output_dir {quoted(output / 'result')} {SAMPLING}"
    flags += f" --data_dir {quoted(ROOT / 'data' / 'standin')}"
    more = "--num_seeds 4 --num_fd_samples 0 --wandb disabled"
    print(f"\n$ python src/test.py {flags} {more}", flush=True)
    test.main(shlex.split(f"{flags} {more}"))
    show(f"--ckpt_path {quoted(PRETRAINED)} --output_dir {quoted(output)}")
    print(f'try: python src/test.py {flags} --prompt "red sphere, cyan cube"')


def show(flags: str) -> None:
    """Everything in one file."""
    print(f"\n$ python src/report.py {flags}", flush=True)
    report.main(shlex.split(flags))


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_args(DemoConfig, argv)
    if config.pretrained:
        if config.quick:
            raise UserError("--quick --pretrained: choose one of them")
        return show_pretrained(config.output_dir)
    size = QUICK if config.quick else FULL
    name = "demo-quick" if config.quick else "demo"
    run_dir, result = config.output_dir / name, config.output_dir / "result" / name
    data, notes = run_dir / "data", run_dir / "demo.json"

    flags = f"--num_sequences {size['sequences']} --out_dir {quoted(data)}"
    stage(render_iclevr, flags, notes, done=(data / "train.json").exists())
    flags = (
        f"--run_name {name} --output_dir {quoted(config.output_dir)} --data_dir {quoted(data)} "
        f"--max_train_steps {size['steps']} --save_interval 1 --sample_interval 2 "
        "--preview_steps 25 --wandb offline --recipe small --resume auto"
    )
    stage(train, flags, notes)
    common = (
        f"--ckpt_path {quoted(latest_checkpoint(run_dir))} --data_dir {quoted(data)} "
        f"--wandb offline --num_fd_samples {size['fd']}"
    )
    flags = f"{common} --output_dir {quoted(result.parent)}"
    # Always: test and sweep keep their own draws, and make only those that are missing.
    stage(test, f"{flags} {SAMPLING} --num_seeds {size['seeds']}", notes)
    stage(guidance_scale, f"{flags} {SAMPLER} {size['sweep']}", notes)
    show(f"--run_name {name} --output_dir {quoted(config.output_dir)}")

    print("\nstage              seconds")
    for script, seconds in read_json(notes)["seconds"].items():
        print(f"{script:<18}{seconds:>8.0f}")
    print((result / "accuracies.md").read_text(encoding="utf-8"))
    print(f"pictures: {newest(result, '*/accuracies.json').parent}")
    print("  test_grid.png, new_test_grid.png, denoising.png, confusion.png, nearest.png")
    print(f"sweep: {newest(result, 'guidance_scale/*/sweep.png')}")
    print(f"previews during training: {run_dir / 'samples'}")
    print(f'try: python src/test.py {common} {SAMPLING} --prompt "red sphere, cyan cube"')


if __name__ == "__main__":
    run(main)
