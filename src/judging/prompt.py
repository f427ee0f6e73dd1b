"""One scene by the names of its objects, or with one object more: drawn, saved, judged."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from iclevr.labels import decode_labels, encode_condition, encode_labels, parse_prompt
from judging.bench import Bench
from judging.drawing import plan
from judging.evaluator import judge_pictures
from judging.figures import save_image, strip
from judging.insertion import AS_BEFORE, add, described_objects, objects_in, open_picture
from runtime import processes
from runtime.files import write_json
from runtime.seeds import picture_seeds
from runtime.settings import SamplingConfig, to_dict

STRIP_PICTURES = 10
"""Pictures on the way from noise to a scene."""


def draw_strip(
    bench: Bench,
    sampling: SamplingConfig,
    names: list[str],
    seed: int,
    without: Sequence[str] = (),
) -> Tensor:
    """(STRIP_PICTURES, 3, S, S): x_T ... x_0 of one scene."""
    label = encode_condition(names, without, bench.checkpoint.objects)[None]
    _, kept = bench.sample(
        label, picture_seeds(seed, 1), sampling, num_intermediates=STRIP_PICTURES, progress=False
    )
    return kept[:, 0]


def draw_prompt(
    bench: Bench,
    sampling: SamplingConfig,
    prompt: str,
    without: str | None,
    seed: int,
    folder: Path,
) -> Path:
    """Draw the scene of --prompt and say what the judge, if there is one, sees in it.

    Args:
        without: objects that must not come, written as a prompt.
        folder: of the picture, the way to it, and the JSON that draws it again.

    Raises:
        UserError: unknown objects, or one that is asked for and must not come.
    """
    objects = bench.checkpoint.objects
    names = parse_prompt(prompt, objects)
    unwanted = [] if without is None else parse_prompt(without, objects, "--without")
    drawing = plan(bench, names, seed, sampling, unwanted)
    images = draw_strip(bench, sampling, names, seed, unwanted)
    path = folder / f"{drawing.name}.png"
    if processes.is_main():
        save_image(images[-1], path)
        write_json(path.with_suffix(".json"), to_dict(drawing))
        save_image(strip(images), path.with_name(f"{path.stem}_steps.png"))
        but = f", without {', '.join(unwanted)}" if unwanted else ""
        print(f"asked for: {', '.join(names)}{but}\n{path}")
        if bench.judge is None:
            return path
        found = judge_pictures(bench.judge, images[-1:], encode_labels(names, objects)[None])
        seen = ", ".join(decode_labels(found.detected[0], objects)) or "nothing"
        judge = bench.judge_name(sampling)
        print(f"judge ({judge}) sees: {seen}")
        if found.too_many:
            print(f"of a color that was asked for there are {int(found.too_many)} too many")
        if not found.once:
            print(f"not the same; --seed {seed + 1} draws another picture")
    return path


def draw_addition(
    bench: Bench,
    sampling: SamplingConfig,
    picture: Path,
    added: str,
    prompt: str | None,
    seed: int,
    folder: Path,
) -> Path:
    """Add the objects of --add to the picture of --to, and say what has become of it.

    Writes the picture, a strip of before, where it was drawn anew, and after, and a JSON with what
    the judge sees. Arguments beyond are those of `draw_prompt`.

    Raises:
        UserError: no picture, unknown objects, one that is there already, or no free place.
    """
    image, described = open_picture(picture, bench.model.image_size), picture.with_suffix(".json")
    side = bench.model.image_size
    with Image.open(picture) as file:
        if file.size != (side, side) and processes.is_main():
            size = "x".join(map(str, file.size))
            print(f"warning: {picture}: is {size}, taken as {side}x{side}", file=sys.stderr)
    told = described_objects(described) if prompt is None and described.exists() else None
    shows, who = objects_in(bench, picture, image, prompt, told)
    if who:
        print(f"the picture shows: {', '.join(shows)} ({who})")
    new = parse_prompt(added, bench.checkpoint.objects, "--add")
    drawn = add(bench, sampling, picture, image, shows, new, seed)
    path = folder / f"{drawn.name}.png"
    if processes.is_main():
        disc = drawn.free.expand(3, -1, -1) * 2 - 1
        way = strip(torch.stack([drawn.before, disc, drawn.image]))
        save_image(drawn.image, path)
        save_image(way, path.with_name(f"{path.stem}_steps.png"))
        write_json(path.with_suffix(".json"), drawn.report)
        print(f"{path}\n{drawn.outside}")
        if drawn.judge is not None:
            print(f"judge ({drawn.judge}) sees: {', '.join(drawn.seen) or 'nothing'}")
        for words, names in drawn.failures.items():
            remedy = f"--seed {seed + 1} tries again"
            if words == AS_BEFORE:
                remedy = "say with --prompt what the picture shows"
            print(f"{words}: {', '.join(names)}; {remedy}")
        if drawn.twice:
            print(f"{drawn.twice}; --seed {seed + 1} tries again")
    return path
