"""Keep some sets and pairs of objects out of a training list, to test what training never shows.

    python src/hold_out.py --hold_out_sets 0.1
    python src/train.py --data_dir output/held_out --image_dir data/iclevr ...    (as it prints)
    python src/test.py --ckpt_path ... --conditions output/held_out/*seen.json

Reads the data's JSON files and writes others, next to which nothing else is needed: train.json
without the pictures that show what is held out, unseen.json and seen.json (as many sets that stay),
unseen_pairs.json, and objects.json, test.json, new_test.json, and four.json and five.json where
there are such, as they are. The data itself is never changed. src/render_iclevr.py
--hold_out_sets renders a stand-in without such sets instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iclevr.dataset import find_data
from iclevr.held_out import HELD_OUT_FILES, NOTHING, choose_held_out, held_out_conditions
from iclevr.labels import (
    condition_files,
    decode_labels,
    read_conditions,
    read_objects,
    read_train,
)
from iclevr.scene import LARGE
from runtime.command_line import command
from runtime.files import make_folder, read_json, write_json
from runtime.settings import (
    ROOT,
    DataConfig,
    Probability,
    Seed,
    Settings,
    UserError,
    parse_args,
    run,
)

MADE_BY = "hold_out.json"
"""Beside the new files: the settings that they follow from."""


@dataclass(frozen=True)
class HoldOutConfig(Settings):
    """Write a training list that lacks some sets and pairs of objects, and conditions of them."""

    hold_out_sets: Probability = 0.1
    """Share of the sets of two and of three objects in train.json."""
    hold_out_pairs: Probability = 0.0
    """Share of the pairs of objects that stand together in some picture."""
    seed: Seed = 0
    """Seed of the choice."""
    out_dir: Path = ROOT / "output" / "held_out"
    """Folder of the new JSON files."""
    data: DataConfig = field(default_factory=DataConfig)


def check_same(folder: Path, files: dict[str, Any]) -> None:
    """What the folder holds already of these files is the same: a network may be trained on it.

    Raises:
        UserError: something else.
    """
    remedy = "choose another --out_dir"
    for name, content in files.items():
        path = folder / f"{name}.json"
        if path.exists() and read_json(path, remedy) != content:
            raise UserError(f"{path}: holds something else than would be written; {remedy}")


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    """Returns the number of pictures and of conditions, by the names of the files."""
    config = parse_args(HoldOutConfig, argv)
    paths = find_data(config.data)
    if config.out_dir.resolve() == paths.data_dir.resolve():
        raise UserError(f"--out_dir {config.out_dir}: is the data's own folder; use another")
    if config.hold_out_sets == config.hold_out_pairs == 0:
        raise UserError(
            "--hold_out_sets 0.0, --hold_out_pairs 0.0: nothing to hold out; use such as 0.1"
        )
    settings = {name: getattr(config, name) for name in ("hold_out_sets", "hold_out_pairs", "seed")}
    settings["data_dir"] = str(paths.data_dir.resolve())
    objects = read_objects(paths.data_dir)
    conditions = {
        split: read_conditions(path, objects)[0]
        for split, path in condition_files(paths.data_dir).items()
    }
    names, labels = read_train(paths.data_dir, objects)
    shows = {name: decode_labels(row, objects) for name, row in zip(names, labels, strict=True)}
    keep = [frozenset(c) for split in conditions.values() for c in split]
    sets = set(map(frozenset, shows.values()))
    held_out = choose_held_out(sets, keep, config.hold_out_sets, config.hold_out_pairs, config.seed)
    if held_out == NOTHING:
        raise UserError(
            f"--hold_out_sets {config.hold_out_sets}, --hold_out_pairs {config.hold_out_pairs}: "
            f"is none of the {len(sets)} sets of "
            f"{paths.data_dir / 'train.json'}, or test.json and new_test.json need all; use more"
        )
    train = {name: found for name, found in shows.items() if not held_out.holds(found)}
    if not train:
        raise UserError(
            f"--hold_out_sets {config.hold_out_sets}: leaves no picture of {len(names)} to train "
            "with; use less"
        )
    shown = set(map(frozenset, train.values()))
    files = {"objects": objects, "train": train, **conditions}
    files |= held_out_conditions(held_out, shown, keep, config.seed)
    more = (paths.data_dir / f"{name}.json" for name in LARGE)
    files |= {path.stem: read_conditions(path, objects)[0] for path in more if path.exists()}
    make_folder(config.out_dir, "--out_dir")
    check_same(config.out_dir, files)
    write_json(config.out_dir / MADE_BY, settings)
    for name, content in files.items():
        write_json(config.out_dir / f"{name}.json", content)

    found = {name: len(content) for name, content in files.items() if name != "objects"}
    print(f"{len(train)} of {len(names)} pictures stay in {config.out_dir / 'train.json'}")
    tests = [config.out_dir / f"{n}.json" for n in HELD_OUT_FILES if n in found]
    print("".join(f"{found[path.stem]:6} conditions in {path}\n" for path in tests), end="")
    data = ["--data_dir", config.out_dir, "--image_dir", paths.image_dir]
    data += ["--evaluator", paths.evaluator] if paths.evaluator else []
    data += ["--follow_links"] if paths.follow_links else []
    print(f"{command('train', *data)} ...\n{command('test', *data, '--conditions', *tests)} ...")
    return found


if __name__ == "__main__":
    run(main)
