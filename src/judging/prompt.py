"""One scene by the names of its objects, or with one object more: drawn, saved, judged."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion.adding import add_objects
from iclevr.dataset import normalize, to_uint8
from iclevr.image_cache import read_image
from iclevr.labels import decode_labels, encode_condition, encode_labels, parse_prompt
from judging.bench import Bench, settings_key
from judging.drawing import plan, read_drawing
from judging.figures import save_image, strip
from runtime import processes
from runtime.files import write_json
from runtime.seeds import picture_seeds
from runtime.settings import SamplingConfig, UserError, to_dict

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
        folder: of the picture, the way to it, and the JSON that draws it again; the hash of all
            settings is added to its name.

    Raises:
        UserError: unknown objects, or one that is asked for and must not come.
    """
    objects = bench.checkpoint.objects
    names = parse_prompt(prompt, objects)
    unwanted = [] if without is None else parse_prompt(without, objects, "--without")
    drawing = plan(bench, names, seed, sampling, unwanted)
    images = draw_strip(bench, sampling, names, seed, unwanted)
    folder = folder.with_name(f"{folder.name}-{settings_key(0, bench, sampling)}")
    path = folder / f"{drawing.name}.png"
    if processes.is_main():
        save_image(images[-1], path)
        write_json(path.with_suffix(".json"), to_dict(drawing))
        save_image(strip(images), path.with_name(f"{path.stem}_steps.png"))
        but = f", without {', '.join(unwanted)}" if unwanted else ""
        print(f"asked for: {', '.join(names)}{but}\n{path}")
        if bench.judge is None:
            return path
        detected = (bench.judge.scores(images[-1:])[0] >= bench.judge.threshold).float()
        seen = ", ".join(decode_labels(detected, objects)) or "nothing"
        judge = bench.judge_name(sampling)
        print(f"judge ({judge}) sees: {seen}")
        if set(seen.split(", ")) != set(names):
            print(f"not the same; --seed {seed + 1} draws another picture")
    return path


def objects_in(bench: Bench, picture: Path, image: Tensor, prompt: str | None) -> list[str]:
    """What a picture shows: by --prompt, else by the JSON beside it, else as the judge sees it.

    Raises:
        UserError: nobody says, or the judge sees nothing.
    """
    objects = bench.checkpoint.objects
    if prompt is not None:
        return parse_prompt(prompt, objects)
    if picture.with_suffix(".json").exists():
        names = [*read_drawing(picture.with_suffix(".json")).objects]
        encode_labels(names, objects)
        print(f"the picture shows: {', '.join(names)} (its JSON)")
        return names
    remedy = '--prompt "red sphere" says what it shows'
    if bench.judge is None:
        raise UserError(f"--to {picture}: no JSON beside it and no judge; {remedy}")
    seen = (bench.judge.scores(image[None])[0] >= bench.judge.threshold).float()
    if not seen.any():
        raise UserError(f"--to {picture}: the judge sees no object in it; {remedy}")
    names = decode_labels(seen, objects)
    print(f"the picture shows: {', '.join(names)} (judge: {bench.judge.name})")
    return names


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
    objects, side = bench.checkpoint.objects, bench.model.image_size
    image = normalize(torch.from_numpy(read_image(picture, side).copy()))
    names, new = objects_in(bench, picture, image, prompt), parse_prompt(added, objects, "--add")
    if there := set(names) & set(new):
        raise UserError(f"--add {added!r}: {min(there)!r} is in the picture already")
    before, after = (encode_labels(n, objects)[None] for n in (names, [*names, *new]))
    images, free = add_objects(
        bench.model, bench.checkpoint.config.noise, image[None], before, after,
        picture_seeds(seed, 1), sampling,
    )  # fmt: skip
    changed = (to_uint8(images).int() - to_uint8(image[None]).int()).abs()
    report = {
        "picture": str(picture),
        "shows": names,
        "added": new,
        "seed": seed,
        "sampling": to_dict(sampling),
        "checkpoint_blob": bench.blob,
        "largest_change_outside": int((changed * (free == 0)).max()),
        "share_drawn_anew": (free > 0).float().mean().item(),
    }
    folder = folder.with_name(f"{folder.name}-{settings_key(0, bench, sampling)}")
    path = folder / f"{picture.stem}_and_{'_'.join(new).replace(' ', '-')}_seed{seed}.png"
    if bench.judge is not None:
        seen = (bench.judge.scores(images)[0] >= bench.judge.threshold).float()
        report |= {"judge": bench.judge_name(sampling), "seen": decode_labels(seen, objects)}
    if processes.is_main():
        save_image(images[0], path)
        save_image(strip(torch.cat([image[None], free.expand(-1, 3, -1, -1) * 2 - 1, images])),
                   path.with_name(f"{path.stem}_steps.png"))  # fmt: skip
        write_json(path.with_suffix(".json"), report)
        print(path)
        print(
            f"outside the disc that was drawn anew ({report['share_drawn_anew']:.0%} of the "
            f"picture) no value changed by more than {report['largest_change_outside']} of 255"
        )
        if bench.judge is not None:
            lost, missing = (sorted(set(n) - set(report["seen"])) for n in (names, new))
            print(f"judge ({report['judge']}) sees: {', '.join(report['seen']) or 'nothing'}")
            for word, which in (("no longer there", lost), ("not added", missing)):
                if which:
                    print(f"{word}: {', '.join(which)}; --seed {seed + 1} tries again")
    return path
