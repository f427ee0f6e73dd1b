"""The files of the stand-in beside its pictures: names, labels, conditions, a sheet to look at."""

import functools
from itertools import combinations
from pathlib import Path

from PIL import Image

from iclevr.held_out import NOTHING, SIZES, HeldOut, choose_held_out, held_out_conditions
from iclevr.scene import (
    NAMES,
    OBJECTS,
    PICTURES,
    make_conditions,
    make_large_conditions,
    sample_labels,
)
from runtime.files import atomic_write, write_json
from runtime.settings import UserError


def file_names(i: int, count: int = PICTURES) -> list[str]:
    """Names of the pictures of sequence i."""
    return [f"CLEVR_train_{i:06d}_{k}.png" for k in range(count)]


@functools.cache
def hold_out(seed: int, share_sets: float, share_pairs: float) -> HeldOut:
    """What no picture shows; of test.json and new_test.json nothing is held out."""
    if share_sets == share_pairs == 0:
        return NOTHING
    sets = {frozenset(names) for size in SIZES for names in combinations(NAMES, size)}
    keep = [frozenset(names) for split in make_conditions(seed) for names in split]
    held_out = choose_held_out(sets, keep, share_sets, share_pairs, seed)
    if held_out == NOTHING:
        raise UserError(
            f"--hold_out_sets {share_sets}, --hold_out_pairs {share_pairs}: hold out nothing; "
            "use more"
        )
    return held_out


def write_labels(
    folder: Path,
    seed: int,
    num_sequences: int,
    max_objects: int = PICTURES,
    held_out: HeldOut = NOTHING,
) -> None:
    """The course's four JSON files, objects, both lists of conditions, and what pictures show; and
    conditions beyond the course: four and five objects, and what is held out."""
    test, new_test = make_conditions(seed)
    train = {}
    for i in range(num_sequences):
        names = [NAMES[n] for n in sample_labels(seed, i, max_objects, held_out)]
        train |= {name: names[: k + 1] for k, name in enumerate(file_names(i, max_objects))}
    files = {"objects": OBJECTS, "test": test, "new_test": new_test, "train": train}
    files |= make_large_conditions(seed)
    if held_out != NOTHING:
        shown = {frozenset(names) for names in train.values()}
        files |= held_out_conditions(held_out, shown, map(frozenset, test + new_test), seed)
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)


def draw_sheet(folder: Path, num_sequences: int, max_objects: int) -> None:
    """sheet.png: the last pictures of the first 32 sequences, squeezed as a network sees them."""

    def last(i: int) -> str:
        return file_names(i, max_objects)[-1]

    side, columns = 128, 8
    numbers = range(min(32, num_sequences))
    sheet = Image.new("RGB", (columns * side, -(-len(numbers) // columns) * side))
    for i in numbers:
        with Image.open(folder / "iclevr" / last(i)) as picture:
            small = picture.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
        place = (i % columns * side, i // columns * side)
        sheet.paste(small.resize((side, side), Image.Resampling.BICUBIC), place)
    with atomic_write(folder / "sheet.png") as temporary:
        sheet.save(temporary)
