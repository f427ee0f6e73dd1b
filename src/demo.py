"""The whole job on a machine with nothing but Python: data, training, test, sweep, report.

    python src/demo.py                 # 15 minutes on 2 CPU cores
    python src/demo.py --quick         # the same stages in miniature, to see that they work
    python src/demo.py --pretrained    # straight to pictures, by the network that comes with it

Every stage is one of the repository's scripts, shown as the command it stands for. A stage whose
result is there is skipped; an interrupted one goes on where it stopped.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import guidance_scale
import render_iclevr
import report
import test
import train
from network.checkpoint import PRETRAINED
from runtime.command_line import command
from runtime.files import read_json, write_json
from runtime.settings import ROOT, Settings, UserError, parse_args, run, to_dict
from training.recipes import RECIPES
from training.resume import FREE_ON_RESUME, latest_checkpoint

FULL = dict(sequences=2500, steps=1150, seeds=4, fd=64, sweep="--scale_max 7 --num_seeds 4")
QUICK = dict(sequences=100, steps=40, seeds=2, fd=8, sweep="--scale_max 3 --num_seeds 1")
RECIPE = "tiny"
SAMPLES = 8
"""Light paths per pixel: half of the stand-in's, as 64x64 hardly shows the difference."""
SAMPLER = ["--scheduler", "ddpm", "--num_inference_steps", "12"]
# Steps in which colors and shapes settle, four times: chosen on conditions outside the splits. The
# sweep takes every step once, for time's sake, so its figures at one scale are other ones.
AGAIN = ["--resample", "4", "--resample_interval", "0.3", "0.9"]
SAMPLING = [*SAMPLER, *AGAIN, "--guidance_scale", "3"]
PROMPT = ["--prompt", "red sphere, cyan cube"]


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Everything from data to pictures, on the rendered stand-in."""

    quick: bool = False
    """In miniature (under 2 minutes): shows that all stages work; the pictures are blobs."""
    pretrained: bool = False
    """Train nothing: test the network in data/standin/, in about a minute."""
    output_dir: Path = ROOT / "output"
    """Data, run and results go to folders in here."""


def stage(script: ModuleType, flags: Sequence[Any], notes: Path, done: bool = False) -> None:
    """Run `script` unless it has been done before, and note in `notes` how long it took."""
    if done:
        print(f"\n$ {command(script.__name__, *flags)}\ndone before, skipped")
        return
    since = time.perf_counter()
    try:
        at_once(script, flags)
    except (SystemExit, KeyboardInterrupt):
        print("the demo goes on from here when it is started again", file=sys.stderr)
        raise
    seconds = read_json(notes)["seconds"] if notes.exists() else {}
    # A run that only went on from an earlier one took less: the longest counts.
    longest = max(time.perf_counter() - since, seconds.get(script.__name__, 0))
    write_json(notes, {"seconds": seconds | {script.__name__: round(longest, 1)}})


def show_pretrained(output: Path) -> None:
    """Both test splits, by the network that comes with the repository, on its own data."""
    flags = ["--output_dir", output / "result", *SAMPLER, "--guidance_scale", "2"]
    flags += ["--data_dir", ROOT / "data" / "standin"]
    more = [*flags, *["--num_seeds", "4", "--num_fd_samples", "0", "--wandb", "disabled"]]
    at_once(test, more)
    at_once(report, ["--ckpt_path", PRETRAINED, "--output_dir", output])
    print(f"try: {command('test', *flags, *PROMPT)}")


def check_version(run_dir: Path, data: Path) -> None:
    """Refuse what a demo before this one left: going on with it gives neither's result.

    Raises:
        UserError: pictures or network were made by other settings.
    """
    expected = {
        data / "render.json": {"samples": SAMPLES},
        run_dir / "config.json": {
            name: value
            for name, value in to_dict(RECIPES[RECIPE]).items()
            if name == "recipe" or name not in FREE_ON_RESUME
        },
    }
    for path, settings in expected.items():
        kept = read_json(path, f"delete {run_dir}") if path.exists() else settings
        if not isinstance(kept, dict):
            raise UserError(f"{path}: not a dict of settings; delete {run_dir}")
        if other := [name for name, value in settings.items() if kept.get(name) != value]:
            raise UserError(
                f"{path}: of a version before ({other[0]} differs); delete {run_dir} or "
                "choose another --output_dir"
            )


def at_once(script: ModuleType, flags: Sequence[Any]) -> None:
    """Run `script`, shown as a command."""
    print(f"\n$ {command(script.__name__, *flags)}", flush=True)
    script.main([str(flag) for flag in flags])


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

    check_version(run_dir, data)
    flags = ["--num_sequences", size["sequences"], "--samples", SAMPLES, "--out_dir", data]
    stage(render_iclevr, flags, notes, done=(data / "train.json").exists())
    flags = [
        "--run_name", name, "--output_dir", config.output_dir, "--data_dir", data,
        "--max_train_steps", size["steps"], *["--save_interval", "1", "--sample_interval", "2"],
        *["--preview_steps", "25", "--wandb", "offline", "--recipe", RECIPE, "--resume", "auto"],
    ]  # fmt: skip
    stage(train, flags, notes)
    common = ["--ckpt_path", latest_checkpoint(run_dir), "--data_dir", data, "--wandb", "offline"]
    flags = [*common, "--output_dir", result.parent]
    # Always: test and sweep keep their own draws, and make only those that are missing.
    counts = ["--num_seeds", size["seeds"], "--num_fd_samples", size["fd"]]
    stage(test, [*flags, *SAMPLING, *counts], notes)
    scales = ["--scale_step", "2", *size["sweep"].split(), "--num_fd_samples", "0"]
    stage(guidance_scale, [*flags, *SAMPLER, *scales], notes)
    at_once(report, ["--run_name", name, "--output_dir", config.output_dir])

    print("\nstage              seconds")
    for script, seconds in read_json(notes)["seconds"].items():
        print(f"{script:<18}{seconds:>8.0f}")
    print((result / "accuracies.md").read_text(encoding="utf-8"))
    print(f"pictures: {newest(result, '*/accuracies.json').parent}")
    print("  test_grid.png, new_test_grid.png, denoising.png, confusion.png, nearest.png")
    print(f"sweep: {newest(result, 'guidance_scale/*/sweep.png')}")
    print(f"previews during training: {run_dir / 'samples'}")
    print(f"try: {command('test', *common, *SAMPLING, *PROMPT)}")


if __name__ == "__main__":
    run(main)
