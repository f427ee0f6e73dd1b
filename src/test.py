"""Draw and score both test splits with a trained network.

    python src/test.py --ckpt_path output/ddpm-cfg-v1/checkpoints/model_epoch_500.pth
    python src/test.py --ckpt_path ... --prompt "red sphere, cyan cube"

Writes output/result/<run>/<sampling>-<hash of all settings>/: images/<split>/0.png ... 31.png, a
grid of each split, the way from noise to a picture, which object was taken for which
(confusion.png), the nearest training pictures (nearest.png), figures.md, accuracies.json, and
draws.jsonl, from which an interrupted test goes on; and output/result/<run>/accuracies.md, where
different ways of sampling stand side by side. Network and schedule are those in the checkpoint.
"""

import statistics
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from diffusion.sampling import sample
from diffusion.schedule import check_steps
from iclevr.dataset import SPLITS, decode_labels, encode_labels, parse_prompt, resize
from judging.bench import (
    Bench,
    BenchConfig,
    Draw,
    append_draw,
    draw_frechet,
    draw_splits,
    fd_samples,
    open_bench,
    read_draws,
    settings_key,
    with_reference,
)
from judging.evaluator import IMAGE_SIZE, evaluate
from judging.figures import confusion_chart, grid, pairs, save_image, strip
from judging.intervals import Interval, mean_interval
from judging.metrics import confusion_shares, paired_difference, record, summarise, table
from judging.realism import frechet_floor, nearest
from runtime import processes
from runtime.files import atomic_write, check_folder, make_folder, read_json, write_json
from runtime.seeds import picture_seeds
from runtime.settings import (
    SamplingConfig,
    UserError,
    parse_args,
    run,
    to_dict,
)
from runtime.tracking import Tracker

STRIP_PROMPT = ["red sphere", "cyan cylinder", "cyan cube"]
"""The scene whose way from noise to picture is shown."""
STRIP_PICTURES = 10


@dataclass(frozen=True)
class TestConfig(BenchConfig):
    """Draw and score the conditions of test.json and new_test.json."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    num_seeds: Annotated[int, Field(ge=1, le=1000)] = 1
    """Draws of every picture; with several, accuracies are their mean and 95% interval."""
    prompt: str | None = None
    """Draw this scene instead, such as "red sphere, cyan cube"."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def draw_strip(bench: Bench, sampling: SamplingConfig, names: list[str], seed: int) -> Tensor:
    """(STRIP_PICTURES, 3, S, S): x_T ... x_0 of one scene."""
    label = encode_labels(names, bench.checkpoint.objects)[None]
    _, kept = sample(
        bench.model, bench.checkpoint.config.noise, label, picture_seeds(seed, 1), sampling,
        num_intermediates=STRIP_PICTURES, progress=False, guide=bench.guide,
    )  # fmt: skip
    return kept[:, 0]


def draw_seed(bench: Bench, config: TestConfig, seed: int, folder: Path) -> Draw:
    """Draw and score both splits and the pictures of the Frechet distance.

    The pictures of the first seed are written to the folder.
    """
    draw = Draw({}, more={"other": {}, "confusion": 0, "floor": None, "nearest_rms": None})
    splits = draw_splits(bench, config.sampling, seed)
    for split, (images, result) in splits.items():
        draw.records[split] = record(result)
        draw.more["confusion"] += result.confusion
        if bench.judge is not bench.guide:
            other = evaluate(bench.guide, images, bench.labels[split])
            draw.more["other"][split] = record(other)
        if seed == config.seed and processes.is_main():
            for i, image in enumerate(resize(images, IMAGE_SIZE)):
                save_image(image, folder / "images" / split / f"{i}.png")
            save_image(grid(images), folder / f"{split}_grid.png")
    draw.more["confusion"] = draw.more["confusion"].tolist()
    if bench.reference is not None and config.num_fd_samples:
        draw.frechet = draw_frechet(bench, config.sampling, seed, config.num_fd_samples)
        if processes.is_main():
            draw.more["floor"] = frechet_floor(bench.reference, config.num_fd_samples, seed)
    if bench.reference is not None and seed == config.seed and processes.is_main():
        images = torch.cat([images for images, _ in splits.values()])
        found, rms = nearest(images, bench.reference)
        save_image(pairs(images, found), folder / "nearest.png")
        draw.more["nearest_rms"] = rms.tolist()
    return draw


def has_pictures(bench: Bench, folder: Path) -> bool:
    """Whether every picture of the first seed is there."""
    return all(
        (folder / "images" / split / f"{i}.png").exists()
        for split in SPLITS
        for i in range(len(bench.labels[split]))
    )


def draw_prompt(bench: Bench, config: TestConfig, folder: Path) -> Path:
    """Draw the scene of --prompt and say what the judge sees in it."""
    names = parse_prompt(config.prompt, bench.checkpoint.objects)
    images = draw_strip(bench, config.sampling, names, config.seed)
    if not processes.is_main():
        return folder
    name = "_".join(names).replace(" ", "-")
    if len(name) > 150:  # file systems allow 255 bytes
        name = f"{len(names)}-objects-{zlib.crc32(name.encode()):08x}"
    key = settings_key(0, bench, config.sampling)
    how = f"{folder_name(replace(config, seed=0, num_seeds=1))}-{key}"
    path = folder / "prompt" / how / f"{name}_seed{config.seed}.png"
    save_image(images[-1], path)
    save_image(strip(images), path.with_name(f"{path.stem}_steps.png"))
    scores = bench.judge.scores(images[-1:])[0]
    detected = (scores >= bench.judge.threshold).float()
    seen = ", ".join(decode_labels(detected, bench.checkpoint.objects)) or "nothing"
    judge = bench.judge_name(config.sampling)
    print(f"asked for: {', '.join(names)}\njudge ({judge}) sees: {seen}\n{path}")
    if set(seen.split(", ")) != set(names):
        print(f"not the same; --seed {config.seed + 1} draws another picture")
    return path


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | Path:
    """Returns the content of accuracies.json, or the path of the prompt's picture.

    Of several processes only the first one writes and returns something.
    """
    config = parse_args(TestConfig, argv)
    bench = open_bench(config.ckpt_path, config.data, config.device, config.judge)
    steps = check_steps(bench.checkpoint.config.noise, config.sampling)
    sampling = replace(config.sampling, num_inference_steps=steps)
    config = replace(config, sampling=sampling)
    run_folder = config.output_dir / bench.run_name
    check_folder(run_folder)
    if config.prompt is not None:
        return draw_prompt(bench, config, run_folder)
    config = replace(config, num_fd_samples=fd_samples(config, bench))
    bench = with_reference(bench)
    key = settings_key(config.num_fd_samples, bench, sampling)
    name = f"{folder_name(config)}-{key}"
    folder = run_folder / name
    make_folder(folder)
    draws = processes.from_main(read_draws(folder / "draws.jsonl"))
    tracker = Tracker(
        config.wandb, config.wandb_project, f"{bench.run_name}-{name}", run_folder, to_dict(config)
    )

    seeds = range(config.seed, config.seed + config.num_seeds)
    scale = sampling.guidance_scale
    if not processes.from_main(has_pictures(bench, folder)):
        draws.pop((scale, config.seed), None)  # someone has deleted them: draw them again
    if there := sum((scale, seed) in draws for seed in seeds):
        print(f"{there} of {config.num_seeds} draws are there already: {folder}")
    for seed in seeds:
        if (scale, seed) not in draws:
            draws[scale, seed] = draw_seed(bench, config, seed, folder)
            if processes.is_main():
                append_draw(folder / "draws.jsonl", scale, seed, draws[scale, seed])
    way = None
    if not set(STRIP_PROMPT) <= bench.checkpoint.objects.keys():
        print(f"no denoising.png: these objects lack one of {', '.join(STRIP_PROMPT)}")
    elif processes.from_main(not (folder / "denoising.png").exists()):
        way = draw_strip(bench, sampling, STRIP_PROMPT, config.seed)
    if not processes.is_main():
        return {}
    if way is not None:
        save_image(strip(way), folder / "denoising.png")

    of_seeds = [draws[scale, seed] for seed in seeds]
    judges = [bench.judge] if bench.judge is bench.guide else [bench.judge, bench.guide]
    records = [{split: [draw.records[split] for draw in of_seeds] for split in SPLITS}]
    if len(judges) > 1:
        records.append({s: [draw.more["other"][s] for draw in of_seeds] for s in SPLITS})
    confusion = sum(torch.tensor(draw.more["confusion"]) for draw in of_seeds)
    frechet = [draw.frechet for draw in of_seeds if draw.frechet is not None]
    floor = [draw.more["floor"] for draw in of_seeds if draw.frechet is not None]
    judge_name = bench.judge_name(sampling)
    names = sorted(bench.checkpoint.objects, key=bench.checkpoint.objects.__getitem__)
    title = f"{bench.run_name}, {name}, judge: {judge_name}"
    confusion_chart(confusion_shares(confusion), names, title, folder / "confusion.png")

    figures = {split: summarise(records[0][split]) for split in SPLITS}
    report = {
        "checkpoint": str(config.ckpt_path),
        "settings": key,
        "epoch": bench.checkpoint.epoch,
        "step": bench.checkpoint.step,
        "judge": judge_name,
        "threshold": bench.judge.threshold,
        "sampling": to_dict(sampling),
        "seed": config.seed,
        "num_seeds": config.num_seeds,
        "records": records[0],
        "accuracy": {split: vars(figures[split]["accuracy"]) for split in SPLITS},
        "figures": {
            split: {key: vars(interval) for key, interval in figures[split].items()}
            for split in SPLITS
        },
        "confusion": confusion.tolist(),
    }
    text = [table(figures)]
    if frechet:
        report["num_fd_samples"] = config.num_fd_samples
        distance, of_training = (mean_interval(values, lowest=0) for values in (frechet, floor))
        report["frechet_distance"] = vars(distance)
        report["frechet_distance_of_training_pictures"] = vars(of_training)
        text.append(
            f"Frechet distance, {config.num_fd_samples} pictures: {distance}; "
            f"of as many training pictures: {of_training}"
        )
    if rms := of_seeds[0].more["nearest_rms"]:
        report["nearest_rms"] = rms
        text.append(
            f"nearest training picture (nearest.png): median difference "
            f"{statistics.median(rms):.1f} of 255 levels, least {min(rms):.1f}"
        )
    if len(judges) > 1:
        guide = {split: summarise(records[1][split]) for split in SPLITS}
        guide_name = replace(bench, judge=bench.guide).judge_name(sampling)
        report["other_judge"] = {
            "judge": guide_name,
            "figures": {s: {k: vars(v) for k, v in guide[s].items()} for s in SPLITS},
            "difference": {
                split: {
                    key: vars(paired_difference(records[1][split], records[0][split], key))
                    for key in ("accuracy", "exact_sets")
                }
                for split in SPLITS
            },
        }
        text.append(f"by {guide_name} (--evaluator):\n\n{table(guide)}")
        for split in SPLITS:
            by = paired_difference(records[1][split], records[0][split], "accuracy")
            text.append(f"{split} accuracy: {bench.guide.name} minus {bench.judge.name}: {by}")
    write_json(folder / "accuracies.json", report)
    title = f"judge: {judge_name}, threshold {bench.judge.threshold:.2f}"
    with atomic_write(folder / "figures.md") as temporary:
        temporary.write_text("\n\n".join([title, *text, ""]), encoding="utf-8")
    tracker.log(
        {f"{s}_{key}": interval.mean for s in SPLITS for key, interval in figures[s].items()}
        | ({"frechet_distance": distance.mean} if frechet else {})
    )
    for picture in sorted(folder.glob("*.png")):
        tracker.log_picture(picture.stem, picture)
    tracker.finish()
    print("\n" + "\n\n".join(text) + "\n\n" + write_comparison(run_folder))
    print(folder)
    return report


def folder_name(config: TestConfig) -> str:
    """Such as ddim50-guidance3: other sampling, seeds and judges go side by side."""
    sampling = config.sampling
    strength = sampling.classifier_guidance_scale
    name = f"{sampling.scheduler}{sampling.num_inference_steps}-guidance{sampling.guidance_scale:g}"
    name += f"-eta{sampling.eta:g}" if sampling.eta else ""
    if sampling.guidance_interval != (0, 1):
        name += "-interval{:g}-{:g}".format(*sampling.guidance_interval)
    name += f"-resample{sampling.resample}" if sampling.resample > 1 else ""
    if sampling.resample_interval != (0, 1):
        name += "-in{:g}-{:g}".format(*sampling.resample_interval)
    name += f"-guided_by_the_judge{strength:g}" if strength else ""
    if config.num_seeds > 1:
        name += f"-seeds{config.seed}to{config.seed + config.num_seeds - 1}"
    elif config.seed:
        name += f"-seed{config.seed}"
    if config.data.evaluator:
        name += f"-evaluator_{config.data.evaluator.stem}"
    return name + (f"-judge_{config.judge.stem}" if config.judge else "")


def write_comparison(run_folder: Path) -> str:
    """accuracies.md: a line for every way of sampling that this run was tested with."""
    columns = [(key, split) for key in ("accuracy", "exact_sets") for split in SPLITS]
    names = " | ".join(f"{split} {key.replace('_', ' ')}" for key, split in columns)
    lines = [
        f"| sampling | step | seeds | judge | {names} | Frechet distance (pictures) |",
        "|---|---:|---:|---|" + "---|" * (len(columns) + 1),
    ]
    for path in sorted(run_folder.glob("*/accuracies.json")):
        try:
            report = read_json(path)
            cells = [str(Interval(**report["figures"][split][key])) for key, split in columns]
            distance = "-"
            if "frechet_distance" in report:
                distance = str(Interval(**report["frechet_distance"]))
                distance += f" ({report['num_fd_samples']})"
            about = f"{report['step']} | {report['num_seeds']} | {report['judge']}"
        except (UserError, KeyError, TypeError):
            print(
                f"warning: {path} is damaged or of an older version; left out of the table",
                file=sys.stderr,
            )
            continue
        lines.append(f"| {path.parent.name} | {about} | {' | '.join(cells)} | {distance} |")
    text = "\n".join(lines) + "\n"
    with atomic_write(run_folder / "accuracies.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    run(main, if_stopped="stopped; the same command goes on from here")
