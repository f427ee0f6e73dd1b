"""One picture with objects more: what it shows, drawn, judged."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.insertion import add_objects
from iclevr.dataset import normalize, to_uint8
from iclevr.image_cache import read_image
from iclevr.labels import decode_labels, encode_labels, parse_prompt
from judging.bench import Bench
from judging.counting import too_many
from judging.drawing import file_name, plan, read_drawing
from judging.evaluator import Evaluation, judge_pictures
from runtime.files import read_json
from runtime.seeds import picture_seeds
from runtime.settings import SamplingConfig, UserError, to_dict

AS_BEFORE = "not there, as before"
"""What `Addition.failures` says of objects that were missing from the start; no seed mends that."""


@dataclass(frozen=True)
class Addition:
    """A picture to which objects have been added."""

    picture: Path
    """The one that they were added to."""
    shows: list[str]
    """What is in that one."""
    added: list[str]
    seed: int
    sampling: SamplingConfig
    checkpoint: str
    """git's hash of it."""
    before: Tensor
    """(3, S, S) in [-1, 1]."""
    free: Tensor
    """(1, S, S) in [0, 1]: the disc that was drawn anew."""
    image: Tensor
    """(3, S, S) in [-1, 1]: what has become of it."""
    judge: str | None = None
    found: Evaluation | None = None
    """None where there is no judge."""
    seen_before: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    """What the judge sees, before and now."""

    @property
    def name(self) -> str:
        """Of its files; pictures of one name, or said to show other things, get one each."""
        name = file_name(f"{self.picture.stem}_and_{'_'.join(self.added)}", "picture_and_more")
        began = to_uint8(self.before).numpy().tobytes() + repr(self.shows).encode()
        return f"{name}-{zlib.crc32(began):08x}_seed{self.seed}"

    @property
    def change_outside(self) -> int:
        """The largest outside the disc, in levels of 255."""
        changed = (to_uint8(self.image).int() - to_uint8(self.before).int()).abs()
        return int((changed * (self.free == 0)).max())

    @property
    def share_drawn_anew(self) -> float:
        return (self.free > 0).float().mean().item()

    @property
    def outside(self) -> str:
        """What to say of the rest of the picture."""
        return (
            f"outside the disc that was drawn anew ({self.share_drawn_anew:.0%} of the picture) "
            f"no value changed by more than {self.change_outside} of 255"
        )

    @property
    def failures(self) -> dict[str, list[str]]:
        """What the judge does not see: objects that were there, and those that should be now."""
        if self.judge is None:
            return {}
        gone, missing = (sorted({*names} - {*self.seen}) for names in (self.shows, self.added))
        failures = {
            "no longer there": [name for name in gone if name in self.seen_before],
            AS_BEFORE: [name for name in gone if name not in self.seen_before],
            "not added": missing,
        }
        return {words: names for words, names in failures.items() if names}

    @property
    def twice(self) -> str:
        """What to say if something came twice, which the judge can't tell; else ""."""
        if self.found is None or not self.found.too_many:
            return ""
        return f"of a color that should be there have come {int(self.found.too_many)} too many"

    @property
    def report(self) -> dict[str, Any]:
        """The JSON beside it."""
        report = {
            "picture": str(self.picture),
            "shows": self.shows,
            "added": self.added,
            "seed": self.seed,
            "sampling": to_dict(self.sampling),
            "checkpoint_blob": self.checkpoint,
            "largest_change_outside": self.change_outside,
            "share_drawn_anew": self.share_drawn_anew,
        }
        if self.judge is None:
            return report
        seen = {"seen_before": [*self.seen_before], "seen": [*self.seen]}
        return report | {"judge": self.judge} | seen


def open_picture(path: Path, side: int) -> Tensor:
    """(3, side, side) in [-1, 1], of a file.

    Raises:
        UserError: as `read_image`.
    """
    return normalize(torch.from_numpy(read_image(path, side).copy()))


def described_objects(path: Path) -> list[str]:
    """What is in a picture by the JSON beside it, of a drawing or of an `Addition`.

    Raises:
        UserError: damaged, or of neither.
    """
    remedy = "say with --prompt what the picture shows"
    content = read_json(path, remedy)
    if isinstance(content, dict) and "format" in content:
        return [*read_drawing(path).objects]
    parts = [content.get(key) for key in ("shows", "added")] if isinstance(content, dict) else []
    names = [name for part in parts if isinstance(part, list) for name in part]
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: describes no picture; {remedy}")
    return names


def objects_in(
    bench: Bench,
    picture: Path,
    image: Tensor,
    prompt: str | None,
    described: Sequence[str] | None,
    flag: str = "--prompt",
) -> tuple[list[str], str]:
    """What a picture shows, and who says so: a prompt (then ""), else its JSON, else the judge.

    Args:
        picture: what it is called.
        described: what the JSON beside it says, if there is one.
        flag: of the prompt.

    Raises:
        UserError: unknown objects, nobody says, or the judge sees nothing.
    """
    objects = bench.checkpoint.objects
    if prompt is not None:
        return parse_prompt(prompt, objects, flag), ""
    if described is not None:
        encode_labels(described, objects)
        return [*described], "its JSON"
    remedy = f"fill in {flag}, such as 'red sphere'"
    if bench.judge is None:
        raise UserError(f"{picture}: no JSON beside it and no judge; {remedy}")
    seen = detected(bench, image)
    if not seen:
        raise UserError(f"{picture}: the judge sees no object in it; {remedy}")
    return seen, f"judge: {bench.judge.name}"


def detected(bench: Bench, image: Tensor) -> list[str]:
    """The objects that the judge sees in a picture (3, S, S)."""
    seen = bench.judge.scores(image[None])[0] >= bench.judge.threshold
    return decode_labels(seen, bench.checkpoint.objects)


def add(
    bench: Bench,
    sampling: SamplingConfig,
    picture: Path,
    image: Tensor,
    shows: Sequence[str],
    added: Sequence[str],
    seed: int,
    flag: str = "--prompt",
) -> Addition:
    """Add objects to a picture and judge what has become of it.

    Args:
        picture: what it is called.
        image: (3, S, S) in [-1, 1], as `open_picture` gives it.
        shows: what is in it.
        flag: by which somebody says that it shows something else.

    Raises:
        UserError: an object is there already, no place is free, or as `plan`.
    """
    if there := set(shows) & set(added):
        raise UserError(
            f"--add {', '.join(added)!r}: {min(there)!r} is in the picture already; "
            f"if it is not, fill in {flag} with what the picture shows"
        )
    objects = bench.checkpoint.objects
    whole = plan(bench, [*shows, *added], seed, sampling)
    before, after = (encode_labels(names, objects)[None] for names in (shows, whole.objects))
    images, free = add_objects(
        bench.model, bench.checkpoint.config.noise, image[None], before, after,
        picture_seeds(seed, 1), whole.sampling, bench.guide,
    )  # fmt: skip
    drawn = Addition(
        picture, [*shows], [*added], seed, whole.sampling, bench.blob, image, free[0], images[0]
    )
    if bench.judge is None:
        return drawn
    found = judge_pictures(bench.judge, images, after)
    twice_before = too_many(image[None], before, objects)  # which no other seed would mend
    found = replace(found, too_many=(found.too_many - twice_before).clamp(min=0))
    return replace(
        drawn,
        judge=bench.judge_name(sampling),
        found=found,
        seen_before=tuple(detected(bench, image)),
        seen=tuple(decode_labels(found.detected[0], objects)),
    )
