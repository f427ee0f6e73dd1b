"""Names of objects as labels, and the JSON files that hold them."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.files import read_json
from runtime.settings import UserError

SPLITS = ("test", "new_test")
RESERVED = "mean", "guidance_scale", "frechet_distance"
"""What stands beside the splits in results: no names of files of conditions."""
HOW_TO_GET_DATA = (
    "put the course's objects.json, train.json, test.json, new_test.json and iclevr/ into data/, "
    "or render a stand-in with: python src/render_iclevr.py"
)


def read_objects(data_dir: Path) -> dict[str, int]:
    """Read objects.json: name -> index in [0, number of objects).

    Raises:
        UserError: not a dict of names to distinct indices 0, 1, 2 ...
    """
    path = Path(data_dir) / "objects.json"
    return check_objects(read_json(path, HOW_TO_GET_DATA), path)


def check_objects(objects: Any, path: Path) -> dict[str, int]:
    """What a file says are the objects, checked as `read_objects` says."""
    if not isinstance(objects, dict) or not objects:
        raise UserError(f"{path}: expected a dict of object name -> index, e.g. {{'red cube': 1}}")
    for name, index in objects.items():
        if not isinstance(name, str) or any(c in name for c in "/\\,\0\n"):
            raise UserError(f"{path}: {name!r} is no name of an object; use letters and spaces")
        if type(index) is not int:
            raise UserError(f"{path}: index of {name!r} is {index!r}, not an integer")
    if sorted(objects.values()) != list(range(len(objects))):
        raise UserError(f"{path}: the indices are not 0 ... {len(objects) - 1}, each once")
    return objects


def encode_labels(names: Sequence[str], objects: dict[str, int]) -> Tensor:
    """Object names -> multi-hot vector, (number of objects,) float32. The inverse: decode_labels.

    Raises:
        UserError: no names, an unknown one, or one named twice.
    """
    if not isinstance(names, (list, tuple)) or not names:
        raise UserError(f"{names!r} is not a non-empty list of object names")
    label = torch.zeros(len(objects))
    for name in names:
        if not isinstance(name, str) or name not in objects:
            near = difflib.get_close_matches(str(name).lower(), objects, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(objects)}"
            raise UserError(f"unknown object {name!r}; {hint}")
        if label[objects[name]]:
            raise UserError(f"object {name!r} is named twice; a scene holds each object once")
        label[objects[name]] = 1
    return label


def encode_condition(
    names: Sequence[str], without: Sequence[str], objects: dict[str, int]
) -> Tensor:
    """What is asked for (1) and what must not come (-1): (number of objects,) float32.

    Raises:
        UserError: as `encode_labels`, or an object is in both lists.
    """
    label = encode_labels(names, objects)
    if both := set(names) & set(without):
        raise UserError(
            f"--without {min(both)!r}: {min(both)!r} is asked for and must not come; leave one out"
        )
    return label - encode_labels(without, objects) if without else label


def decode_labels(label: Tensor, objects: dict[str, int]) -> list[str]:
    """Multi-hot vector -> object names, in the order of their indices."""
    names = {index: name for name, index in objects.items()}
    return [names[index] for index in label.nonzero().flatten().tolist()]


def parse_prompt(prompt: str, objects: dict[str, int], flag: str = "--prompt") -> list[str]:
    """'red sphere, cyan cube' -> ['red sphere', 'cyan cube'], checked; or as a JSON list.

    Raises:
        UserError: as `encode_labels`.
    """
    parts = [part.strip("'\" ") for part in prompt.strip("[] ").split(",")]
    names = [" ".join(part.split()) for part in parts]
    remedy = "write such as 'red sphere, cyan cube'"
    if not all(names):
        raise UserError(f"{flag} {prompt!r}: an empty name; {remedy}")
    try:
        encode_labels(names, objects)
    except UserError as error:
        more = "" if "," in prompt else f"; of several: {remedy}"
        raise UserError(f"{flag} {prompt!r}: {error}{more}") from None
    return names


def condition_files(data_dir: Path, conditions: Sequence[Path] | None = None) -> dict[str, Path]:
    """Split -> file: test.json and new_test.json in the data folder, or other files by their names.

    Raises:
        UserError: two of the same name, which also names their folder of pictures.
    """
    files = {split: Path(data_dir) / f"{split}.json" for split in SPLITS}
    if not conditions:
        return files
    files = {}
    for path in conditions:
        if path.stem in (*files, *RESERVED):
            raise UserError(
                f"--conditions {path}: results go by a file's name, and {path.stem!r} is taken; "
                "rename it"
            )
        files[path.stem] = path
    return files


def read_conditions(path: Path, objects: dict[str, int]) -> tuple[list[list[str]], Tensor]:
    """Read conditions such as test.json: N lists of names, and their labels (N, objects).

    Raises:
        UserError: another shape, or an entry that `encode_labels` refuses.
    """
    own = "name a JSON file of lists of object names, such as data/standin/four.json"
    conditions = read_json(path, HOW_TO_GET_DATA if path.stem in SPLITS else own)
    if not isinstance(conditions, list) or not conditions:
        raise UserError(f"{path}: expected a non-empty list of lists of object names")
    return conditions, _encode_all(path, enumerate(conditions), objects)


def read_train(data_dir: Path, objects: dict[str, int]) -> tuple[list[str], Tensor]:
    """Read train.json: N file names and their labels (N, number of objects).

    Raises:
        UserError: another shape, a name that leads out of the folder, or bad object names.
    """
    path = Path(data_dir) / "train.json"
    entries = read_json(path, HOW_TO_GET_DATA)
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: expected a non-empty dict of file name -> object names")
    for name in entries:
        if name in ("", ".", "..") or any(c in name for c in "/\\\0:\n"):
            raise UserError(f"{path}: {name!r} is not a plain file name")
    return list(entries), _encode_all(path, entries.items(), objects)


def _encode_all(path: Path, entries: Iterable[tuple[Any, Any]], objects: dict[str, int]) -> Tensor:
    labels = []
    for key, names in entries:
        try:
            labels.append(encode_labels(names, objects))
        except UserError as error:
            raise UserError(f"{path}: entry {key!r}: {error}") from None
    return torch.stack(labels)
