"""Draw and score both test splits with a trained network.

    python src/test.py --ckpt_path output/ddpm-cfg-v1/checkpoints/model_epoch_500.pth
    python src/test.py --ckpt_path ... --prompt "red sphere, cyan cube"
    python src/test.py --ckpt_path ... --add "green cube" --to scene.png
    python src/test.py --ckpt_path ... --conditions my.json more.json
    python src/test.py --ckpt_path ... --from_json red-sphere_cyan-cube_seed0.json

Writes output/result/<run>/<sampling>-<hash of all settings>/: images/<split>/0.png ... 31.png, a
grid of each split, the way from noise to a picture, which object was taken for which
(confusion.png), the nearest training pictures (nearest.png), figures.md, accuracies.json, and
draws.jsonl, from which an interrupted test goes on; and output/result/<run>/accuracies.md, where
different ways of sampling stand side by side. Network and schedule are those in the checkpoint.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from diffusion import doubts
from iclevr.dataset import resize
from iclevr.labels import decode_labels
from judging.bench import (
    Bench,
    BenchConfig,
    Draw,
    draw_frechet,
    draw_missing,
    draw_splits,
    open_bench,
    settings_key,
    settle,
    split_records,
)
from judging.drawing import Drawing, check_origin, file_names, read_drawing
from judging.evaluator import IMAGE_SIZE, evaluate
from judging.figures import confusion_chart, grid, pairs, save_figure, save_image, save_text, strip
from judging.metrics import record
from judging.prompt import draw_addition, draw_prompt, draw_strip
from judging.realism import frechet_floor, nearest
from judging.summary import comparison, in_words, log_results, sum_up
from runtime import processes
from runtime.files import make_folder, write_json
from runtime.provenance import provenance
from runtime.settings import SamplingConfig, UserError, parse_args, run, to_dict
from runtime.tracking import Tracker

STRIP_PROMPT = ["red sphere", "cyan cylinder", "cyan cube"]
"""The scene whose way from noise to picture is shown."""


@dataclass(frozen=True)
class TestConfig(BenchConfig):
    """Draw and score the conditions of test.json and new_test.json, or of other files."""

    num_seeds: Annotated[int, Field(ge=1, le=1000)] = 1
    """Draws of every picture; with several, accuracies are their mean and 95% interval."""
    prompt: str | None = None
    """Draw this scene instead, such as "red sphere, cyan cube"."""
    without: str | None = None
    """With --prompt: these objects must not come, such as "purple cylinder"."""
    add: str | None = None
    """Add these objects, such as "green cube", to the picture of --to; what else it shows is told
    by --prompt, by the JSON beside it, or by the judge."""
    to: Path | None = None
    """The picture of --add: a PNG such as --prompt and src/app.py write."""
    from_json: Path | None = None
    """Draw a picture again, to the same bytes, from the JSON that --prompt and src/app.py write
    beside it; flags change what it says."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def draw_denoising(bench: Bench, config: TestConfig, path: Path) -> None:
    """The way from noise to a picture, unless it is there."""
    if not set(STRIP_PROMPT) <= bench.checkpoint.objects.keys():
        print(f"no {path.name}: these objects lack one of {', '.join(STRIP_PROMPT)}")
    elif processes.from_main(not path.exists()):
        way = draw_strip(bench, config.sampling, STRIP_PROMPT, config.seed)
        if processes.is_main():
            save_image(strip(way), path)


def draw_seed(bench: Bench, config: TestConfig, folder: Path, seed: int) -> Draw:
    """Draw and score all splits and the pictures of the Frechet distance.

    The pictures of the first seed are written to the folder.
    """
    splits = draw_splits(bench, config.sampling, seed)
    confusion = sum(result.confusion for _, result in splits.values())
    more = {"other": {}, "confusion": confusion.tolist(), "floor": None, "nearest_rms": None}
    draw = Draw(split_records(splits), more=more)
    if bench.judge is not bench.guide:
        for split, (images, _) in splits.items():
            more["other"][split] = record(evaluate(bench.guide, images, bench.labels[split]))
    if config.num_fd_samples:
        draw.frechet = draw_frechet(bench, config.sampling, seed, config.num_fd_samples)
        if processes.is_main():
            more["floor"] = frechet_floor(bench.reference, config.num_fd_samples, seed)
    if seed == config.seed and processes.is_main():
        objects = bench.checkpoint.objects
        more["seen"] = {
            split: [decode_labels(row, objects) for row in result.detected]
            for split, (_, result) in splits.items()
        }
        for split, (images, _) in splits.items():
            for i, image in enumerate(resize(images, IMAGE_SIZE)):
                save_image(image, folder / "images" / split / f"{i}.png")
            save_image(grid(images), folder / f"{split}_grid.png")
        if bench.reference is not None:
            images = torch.cat([images for images, _ in splits.values()])
            found, rms = nearest(images, bench.reference)
            save_image(pairs(images, found), folder / "nearest.png")
            more["nearest_rms"] = rms.tolist()
    return draw


def folder_name(config: TestConfig) -> str:
    """Such as ddim50-guidance3: other sampling, seeds and judges go side by side."""
    how, last = config.sampling, config.seed + config.num_seeds - 1
    evaluator, judge = (path and path.stem for path in (config.data.evaluator, config.judge))
    parts = {
        f"{how.scheduler}{how.num_inference_steps}-guidance{how.guidance_scale:g}": True,
        f"eta{how.eta:g}": how.eta,
        "interval{:g}-{:g}".format(*how.guidance_interval): how.guidance_interval != (0, 1),
        f"resample{how.resample}": how.resample > 1,
        "in{:g}-{:g}".format(*how.resample_interval): how.resample_interval != (0, 1),
        f"compose_{how.compose}": how.compose != "joint",
        f"best_of{how.best_of}": how.best_of > 1,
        f"guided_by_the_judge{how.classifier_guidance_scale:g}": how.classifier_guidance_scale,
        f"seeds{config.seed}to{last}": config.num_seeds > 1,
        f"seed{config.seed}": config.num_seeds == 1 and config.seed,
        f"conditions_{file_names(config.conditions or ())}": config.conditions,
        f"evaluator_{evaluator}": evaluator,
        f"judge_{judge}": judge,
    }
    return "-".join(part for part, shown in parts.items() if shown)


def read_config(argv: Sequence[str] | None) -> tuple[TestConfig, Drawing | None]:
    """The flags, and what --from_json describes, from which they then take their defaults."""
    config = parse_args(TestConfig, argv)
    if config.from_json is None:
        return config, None
    drawing = read_drawing(config.from_json)
    again = TestConfig(
        prompt=", ".join(drawing.objects),
        without=", ".join(drawing.without) or None,
        seed=drawing.seed,
        sampling=drawing.sampling,
    )
    return parse_args(TestConfig, argv, default=again), drawing


def check_together(config: TestConfig) -> None:
    """Refuse flags that lack the ones they need, or do not go together."""
    if config.without is not None and config.add is not None:
        told = f" ({config.from_json})" if config.from_json else ""
        raise UserError(
            f"--without {config.without!r}{told}: does not go with --add; leave one of them out"
        )
    if config.without is not None and config.prompt is None:
        raise UserError(f"--without {config.without!r}: goes with --prompt; name the scene there")
    if config.conditions and (config.prompt is not None or config.add is not None):
        raise UserError(
            f"--conditions {' '.join(map(str, config.conditions))}: goes with none of --prompt, "
            "--from_json and --add, which draw one scene"
        )
    if (config.add is None) != (config.to is None):
        given = f"--to {config.to}" if config.add is None else f"--add {config.add!r}"
        raise UserError(f'{given}: use both, as in --add "green cube" --to scene.png')


def draw_one(bench: Bench, config: TestConfig, run_folder: Path) -> Path:
    """Draw the scene of --prompt, or the picture of --to with what --add adds; returns its path."""
    if config.num_seeds > 1 or config.num_fd_samples:
        doubts.warn(
            ["--prompt and --add: draw one picture, whatever --num_seeds and --num_fd_samples"]
        )
    scale = config.sampling.guidance_scale
    config, bench = settle(replace(config, num_fd_samples=0), bench, [scale])
    sampling, seed = config.sampling, config.seed
    how = f"{folder_name(replace(config, seed=0, num_seeds=1))}-{settings_key(0, bench, sampling)}"
    if config.add is not None:
        folder = run_folder / "added" / how
        return draw_addition(bench, sampling, config.to, config.add, config.prompt, seed, folder)
    folder = run_folder / "prompt" / how
    return draw_prompt(bench, sampling, config.prompt, config.without, seed, folder)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | Path:
    """Returns the content of accuracies.json, or the path of the prompt's picture.

    Of several processes only the first one writes and returns something.
    """
    config, drawing = read_config(argv)
    check_together(config)
    guided = config.sampling.classifier_guidance_scale
    bench = open_bench(
        config.ckpt_path, config.data, config.device, config.judge,
        needs_judge=config.prompt is None is config.add or guided > 0, conditions=config.conditions,
    )  # fmt: skip
    run_folder = config.output_dir / bench.run_name
    scale = config.sampling.guidance_scale
    if drawing and (why := check_origin(drawing, bench, str(config.from_json))):
        print(f"{config.from_json}: {why}", file=sys.stderr)
    if config.prompt is not None or config.add is not None:
        return draw_one(bench, config, run_folder)
    config, bench = settle(config, bench, [scale], nearest=True)
    key = settings_key(config.num_fd_samples, bench, config.sampling)
    name = f"{folder_name(config)}-{key}"
    folder = run_folder / name
    make_folder(folder)
    tracker = Tracker(
        config.wandb, config.wandb_project, f"{bench.run_name}-{name}", run_folder, to_dict(config)
    )

    wanted = [(scale, seed) for seed in range(config.seed, config.seed + config.num_seeds)]
    pictures = processes.from_main(len([*folder.glob("images/*/[0-9]*.png")]))
    complete = pictures == sum(map(len, bench.labels.values()))
    draws = draw_missing(
        folder / "draws.jsonl",
        wanted,
        lambda _, seed: draw_seed(bench, config, folder, seed),
        provenance(__file__, argv, bench.device),
        again=[] if complete else wanted[:1],  # someone has deleted its pictures
    )
    draw_denoising(bench, config, folder / "denoising.png")
    if not processes.is_main():
        return {}

    found = sum_up(bench, config, [draws[which] for which in wanted])
    text = in_words(found, bench)
    report = to_dict(found)
    write_json(folder / "accuracies.json", report)
    save_text(text, folder / "figures.md")
    title = f"{bench.run_name}, {name}, judge: {report['judge']}"
    chart = confusion_chart(torch.tensor(report["confusion"]), report["objects"], title)
    save_figure(chart, folder / "confusion.png")
    compared = comparison(run_folder)
    save_text(compared, run_folder / "accuracies.md")

    log_results(tracker, found, folder)
    print(f"\n{text}\n\n{compared}\n\n{folder}")
    return report


if __name__ == "__main__":
    run(main, if_stopped="stopped; whole draws of a split are kept, and the same command goes on")
