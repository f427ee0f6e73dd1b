"""The whole job on a machine with nothing but Python: data, judge, training, test, sweep.

    python src/demo.py            # under 20 minutes on 2 CPU cores
    python src/demo.py --quick    # the same stages in miniature, to see that they work

Every stage is one of the repository's scripts, shown as the command it stands for. A stage whose
result is there is skipped; an interrupted one goes on where it stopped.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import guidance_scale
import render_iclevr
import test
import train
import train_evaluator
from checkpoint import load_checkpoint
from config import ROOT, Settings, parse_args, run
from files import read_json, write_json

# What gets furthest in ten minutes of two cores: a narrow network on 32x32 pictures, scaled to unit
# variance, small batches for many steps, and a start at which the condition is heard.
RECIPE = (
    "--image_size 32 --block_out_channels 32 64 128 128 --layers_per_block 1"
    " --down_block_types DownBlock2D DownBlock2D AttnDownBlock2D AttnDownBlock2D"
    " --up_block_types AttnUpBlock2D AttnUpBlock2D UpBlock2D UpBlock2D"
    " --norm_num_groups 8 --attention_head_dim 32"
    " --prediction_type v_prediction --timestep_spacing trailing"
    " --shift_factor -0.08 --scaling_factor 8 --zero_init"
    " --batch_size 16 --lr 1e-3 --lr_warmup_steps 50 --adam_beta2 0.99 --ema_decay 0.995"
)
FULL = {
    "sequences": 2500,
    "evaluator": "--epochs 7",
    "steps": 2800,
    "seeds": 4,
    "sweep": "--scale_min 1 --scale_max 9 --scale_step 2 --num_seeds 2",
}
QUICK = {
    "sequences": 100,
    "evaluator": "--epochs 3",
    "steps": 60,
    "seeds": 2,
    "sweep": "--scale_min 1 --scale_max 3 --scale_step 2 --num_seeds 1",
}
SAMPLING = "--scheduler ddim --num_inference_steps 25 --guidance_scale 3"


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Everything from data to pictures, on the rendered stand-in."""

    quick: bool = False
    """In miniature (under 3 minutes): shows that all stages work; the pictures are blobs."""


def run_stage(
    script: ModuleType, flags: str, done: bool, times: dict[str, float], report: Path
) -> None:
    """Run a script with flags unless its result is there; note how long it took."""
    print(f"\n$ python src/{script.__name__}.py {flags}", flush=True)
    if done:
        print("done before, skipped")
        return
    since = time.perf_counter()
    script.main(shlex.split(flags))
    times[script.__name__] = round(time.perf_counter() - since, 1)
    write_json(report, {"seconds": times})


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_args(DemoConfig, argv)
    size = QUICK if config.quick else FULL
    name = "demo-quick" if config.quick else "demo"
    output = ROOT / "output"
    data = output / name / "data" if config.quick else ROOT / "data" / "standin"
    run_dir = output / name
    result = output / "result" / name
    report = run_dir / "demo.json"
    times = read_json(report)["seconds"] if report.exists() else {}
    quote = shlex.quote

    run_stage(
        render_iclevr, f"--num_sequences {size['sequences']} --out_dir {quote(str(data))}",
        (data / "train.json").exists(), times, report,
    )  # fmt: skip
    run_stage(
        train_evaluator, f"{size['evaluator']} --data_dir {quote(str(data))}",
        (data / "evaluator.pth").exists(), times, report,
    )  # fmt: skip

    checkpoint = train.latest_checkpoint(run_dir)
    finished = checkpoint is not None and load_checkpoint(checkpoint).step >= size["steps"]
    flags = f"--run_name {name} --data_dir {quote(str(data))} --max_train_steps {size['steps']}"
    flags += f" --save_interval 1 --sample_interval 2 --preview_steps 25 --wandb offline {RECIPE}"
    if checkpoint is not None and not finished:
        flags += " --resume auto"
    run_stage(train, flags, finished, times, report)

    checkpoint = train.latest_checkpoint(run_dir)
    common = f"--ckpt_path {quote(str(checkpoint))} --data_dir {quote(str(data))} {SAMPLING}"
    accuracies = result / "accuracies.json"
    sources = (checkpoint, data / "evaluator.pth")
    run_stage(
        test, f"{common} --num_seeds {size['seeds']}",
        accuracies.exists()
        and all(accuracies.stat().st_mtime > source.stat().st_mtime for source in sources),
        times, report,
    )  # fmt: skip
    # The sweep keeps its own draws, and knows which ones are still to be made.
    run_stage(guidance_scale, f"{common} {size['sweep']} --wandb offline", False, times, report)

    accuracy = read_json(accuracies)["accuracy"]
    print("\nstage              seconds")
    for stage, seconds in times.items():
        print(f"{stage:<18}{seconds:>8.0f}")
    for split, i in accuracy.items():
        print(f"{split} accuracy {i['mean']:.3f} [{i['low']:.3f}, {i['high']:.3f}]")
    print(f"\npictures: {result}\n  test_grid.png, new_test_grid.png, denoising.png")
    for chart in sorted(result.glob("guidance_scale/*/sweep.png")):
        print(f"  {chart.relative_to(result)}")
    print(f"previews during training: {run_dir / 'samples'}")


if __name__ == "__main__":
    run(main)
