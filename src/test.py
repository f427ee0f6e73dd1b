"""Draw and score both test splits with a trained network.

    python src/test.py --ckpt_path output/ddpm-cfg-v1/checkpoints/model_epoch_500.pth
    python src/test.py --ckpt_path ... --prompt "red sphere, cyan cube"

Writes output/result/<run>/<sampling>/: images/<split>/0.png ... 31.png, a grid of each split, the
way from noise to a picture, and accuracies.json; and output/result/<run>/accuracies.md, where
different ways of sampling stand side by side. Network and schedule are those in the checkpoint.
"""

import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from config import (
    ROOT,
    DataConfig,
    SamplingConfig,
    Seed,
    Settings,
    UserError,
    WandbMode,
    parse_args,
    run,
    to_dict,
)
from dataset import SPLITS, decode_labels, encode_labels, parse_prompt, resize
from diffusion import check_steps, picture_seeds, sample
from evaluator import IMAGE_SIZE
from figures import grid, save_image, strip
from files import atomic_write, make_folder, read_json, write_json
from intervals import accuracy_interval
from scoring import Bench, draw_splits, open_bench
from tracking import Tracker

STRIP_PROMPT = ["red sphere", "cyan cylinder", "cyan cube"]
"""The scene whose way from noise to picture is shown."""
STRIP_PICTURES = 10


@dataclass(frozen=True)
class TestConfig(Settings):
    """Draw and score the conditions of test.json and new_test.json."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    ckpt_path: Path
    """Checkpoint of src/train.py."""
    num_seeds: Annotated[int, Field(ge=1, le=1000)] = 1
    """Draws of every picture; with several, accuracies are their mean and 95% interval."""
    seed: Seed = 0
    """Seed of the first draw; the others follow."""
    prompt: str | None = None
    """Draw this scene instead, such as "red sphere, cyan cube"."""
    output_dir: Path = ROOT / "output" / "result"
    """Results go to a folder in here, named after the run."""
    device: str | None = None
    """cuda, cpu ... (default: the best there is)."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    wandb: WandbMode = "auto"
    """auto: online when logged in to Weights & Biases, else offline."""
    wandb_project: str = "iclevr-ddpm"
    """Project name at Weights & Biases."""
    data: DataConfig = field(default_factory=DataConfig)


def draw_strip(bench: Bench, sampling: SamplingConfig, names: list[str], seed: int) -> Tensor:
    """(STRIP_PICTURES, 3, S, S): x_T ... x_0 of one scene."""
    label = encode_labels(names, bench.checkpoint.objects)[None]
    _, kept = sample(
        bench.model, bench.checkpoint.config.noise, label, picture_seeds(seed, 1), sampling,
        num_intermediates=STRIP_PICTURES, progress=False,
    )  # fmt: skip
    return kept[:, 0]


def draw_prompt(bench: Bench, config: TestConfig, folder: Path) -> Path:
    """Draw the scene of --prompt and say what the judge sees in it."""
    names = parse_prompt(config.prompt, bench.checkpoint.objects)
    images = draw_strip(bench, config.sampling, names, config.seed)
    name = "_".join(names).replace(" ", "-")
    if len(name) > 150:  # file systems allow 255 bytes
        name = f"{len(names)}-objects-{zlib.crc32(name.encode()):08x}"
    path = folder / "prompt" / f"{name}_seed{config.seed}.png"
    save_image(images[-1], path)
    save_image(strip(images), path.with_name(f"{path.stem}_steps.png"))
    scores = bench.judge.scores(images[-1:])[0]
    detected = torch.zeros_like(scores)
    detected[scores.topk(len(names)).indices] = 1
    seen = ", ".join(decode_labels(detected, bench.checkpoint.objects))
    print(f"asked for: {', '.join(names)}\njudge sees: {seen}\n{path}")
    return path


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | Path:
    """Returns the content of accuracies.json, or the path of the prompt's picture."""
    config = parse_args(TestConfig, argv)
    bench = open_bench(config.ckpt_path, config.data, config.device)
    steps = check_steps(bench.checkpoint.config.noise, config.sampling)
    sampling = replace(config.sampling, num_inference_steps=steps)
    config = replace(config, sampling=sampling)
    run_folder = config.output_dir / bench.run_name
    make_folder(run_folder)
    if config.prompt is not None:
        return draw_prompt(bench, config, run_folder)
    name = folder_name(sampling) + (f"-seed{config.seed}" if config.seed else "")
    folder = run_folder / name
    tracker = Tracker(
        config.wandb, config.wandb_project, f"{bench.run_name}-{name}", run_folder, to_dict(config)
    )

    correct: dict[str, list[int]] = {split: [] for split in SPLITS}
    for draw in range(config.num_seeds):
        for split, (images, result) in draw_splits(bench, sampling, config.seed + draw).items():
            correct[split].append(int(result.correct.sum()))
            if draw == 0:
                for i, image in enumerate(resize(images, IMAGE_SIZE)):
                    save_image(image, folder / "images" / split / f"{i}.png")
                save_image(grid(images), folder / f"{split}_grid.png")
    if set(STRIP_PROMPT) <= bench.checkpoint.objects.keys():
        steps = draw_strip(bench, sampling, STRIP_PROMPT, config.seed)
        save_image(strip(steps), folder / "denoising.png")
    else:
        print(f"no denoising.png: these objects lack one of {', '.join(STRIP_PROMPT)}")

    totals = {split: int(bench.labels[split].sum()) for split in SPLITS}
    intervals = {split: accuracy_interval(correct[split], totals[split]) for split in SPLITS}
    report = {
        "checkpoint": str(config.ckpt_path),
        "epoch": bench.checkpoint.epoch,
        "step": bench.checkpoint.step,
        "judge": bench.judge.name,
        "sampling": to_dict(sampling),
        "seed": config.seed,
        "num_seeds": config.num_seeds,
        "objects": totals,
        "correct": correct,
        "accuracy": {split: vars(interval) for split, interval in intervals.items()},
    }
    write_json(folder / "accuracies.json", report)
    tracker.log({f"{split}_accuracy": interval.mean for split, interval in intervals.items()})
    for split in SPLITS:
        tracker.log_picture(f"{split}_grid", folder / f"{split}_grid.png")
    tracker.finish()
    print("\n" + write_comparison(run_folder))
    print(folder)
    return report


def folder_name(sampling: SamplingConfig) -> str:
    """Such as ddim50-guidance3: results of other ways of sampling stay side by side."""
    name = f"{sampling.scheduler}{sampling.num_inference_steps}-guidance{sampling.guidance_scale:g}"
    return name + (f"-eta{sampling.eta:g}" if sampling.eta else "")


def write_comparison(run_folder: Path) -> str:
    """accuracies.md: a line for every way of sampling that this run was tested with."""
    lines = [
        "| sampling | step | seeds | judge | test [95% interval] | new_test [95% interval] |",
        "|---|---:|---:|---|---|---|",
    ]
    for path in sorted(run_folder.glob("*/accuracies.json")):
        try:
            report = read_json(path)
            cells = [
                "{mean:.4f} [{low:.4f}, {high:.4f}]".format(**report["accuracy"][split])
                for split in SPLITS
            ]
            about = f"{report['step']} | {report['num_seeds']} | {report['judge']}"
        except (UserError, KeyError, TypeError):
            print(f"warning: {path} is damaged; left out of the table", file=sys.stderr)
            continue
        lines.append(f"| {path.parent.name} | {about} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    with atomic_write(run_folder / "accuracies.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    return table


if __name__ == "__main__":
    run(main)
