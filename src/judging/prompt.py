"""One scene by the names of its objects: drawn, saved with the way to it, judged."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from iclevr.labels import decode_labels, encode_condition, parse_prompt
from judging.bench import Bench, settings_key
from judging.drawing import plan
from judging.figures import save_image, strip
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
