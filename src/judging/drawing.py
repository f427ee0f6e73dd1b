"""One picture: all that it takes to draw it again, how it is drawn, what the judge sees in it."""

import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field
from torch import Tensor

from diffusion.samplers import StepsError, check_steps
from diffusion.sampling import relay
from iclevr.labels import decode_labels, encode_condition
from judging.bench import Bench
from judging.evaluator import Evaluation, judge_pictures
from judging.realism import nearest
from runtime.files import read_json
from runtime.seeds import picture_seeds
from runtime.settings import (
    SamplingConfig,
    SchedulerConfig,
    Seed,
    Settings,
    UserError,
    from_dict,
)

TRIES = 8
"""Draws after which `until_right` gives a picture up."""
Hash = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
"""git's, of a file."""


def file_name(name: str, instead: str) -> str:
    """A name without spaces; one that not every file system takes becomes `instead`, with a code.

    File systems allow 255 bytes, Windows not all characters.
    """
    name = name.replace(" ", "-")
    whole = name.encode("utf-8", "surrogatepass")
    if len(whole) > 150 or set(name) & set('<>:"|?*'):
        return f"{instead}-{zlib.crc32(whole):08x}"
    return name


def file_names(paths: Sequence[Path]) -> str:
    """What a folder of results is called after the files of its conditions."""
    return file_name("+".join(path.stem for path in paths), f"{len(paths)}-files")


@dataclass(frozen=True)
class Drawing(Settings):
    """All that a picture depends on. The same one gives the same bytes, on the same machine."""

    checkpoint: Hash
    objects: Annotated[tuple[str, ...], Field(min_length=1)]
    seed: Seed
    sampling: SamplingConfig
    arithmetic: str
    """Device and number format, see `Bench.arithmetic`."""
    without: tuple[str, ...] = ()
    """Objects that must not come."""
    guide: Hash | None = None
    """The judge, where its gradient is followed."""
    format: Literal["iclevr-picture-1", "iclevr-picture-2"] = "iclevr-picture-2"
    """1: what must not come was guided away from in another way."""

    @property
    def name(self) -> str:
        """Of its files."""
        names = [*self.objects, *(f"without-{name}" for name in self.without)]
        return f"{file_name('_'.join(names), f'{len(names)}-objects')}_seed{self.seed}"


@dataclass(frozen=True)
class Picture:
    """A picture that has been drawn and judged."""

    drawing: Drawing
    image: Tensor
    """(3, S, S) in [-1, 1]."""
    found: Evaluation
    tries: int = 1
    nearest: Tensor | None = None
    """(3, 64, 64) in [-1, 1]: the training picture most like it."""
    rms: float | None = None
    """How far that one is, in levels of 255."""

    @property
    def right(self) -> bool:
        """Whether the judge sees exactly what was asked for, and nothing stands there twice."""
        return bool(self.found.once)


class Judged(Protocol):
    """Whatever the judge has looked at: a `Picture`, an `Addition`."""

    found: Evaluation


Shown = list[Picture | Tensor | None]
"""Pictures, one of them perhaps on its way (3, S, S), those to come None."""


def with_steps(noise: SchedulerConfig, sampling: SamplingConfig) -> SamplingConfig:
    """The same with a number of steps that its sampler can take, as near as there is one."""
    try:
        steps = check_steps(noise, sampling)
    except StepsError as error:
        steps = error.nearest
    return replace(sampling, num_inference_steps=steps)


def plan(
    bench: Bench,
    objects: Sequence[str],
    seed: int,
    sampling: SamplingConfig,
    without: Sequence[str] = (),
) -> Drawing:
    """What is to be drawn, with all that the settings leave open.

    Raises:
        UserError: unknown objects, a bad seed, steps that the sampler can't take, or a guidance
            that does not heed what must not come.
    """
    encode_condition(objects, without, bench.checkpoint.objects)
    if without and sampling.guidance_scale == 0 and sampling.guidance_interval == (0, 1):
        raise UserError(
            f"--without {', '.join(without)!r}: does nothing with --guidance_scale 0, which draws "
            "without any condition; raise --guidance_scale"
        )
    steps = check_steps(bench.checkpoint.config.noise, sampling)
    sampling = replace(sampling, num_inference_steps=steps)
    values = {
        "checkpoint": bench.blob,
        "objects": objects,
        "seed": seed,
        "sampling": sampling,
        "arithmetic": bench.arithmetic(sampling),
        "without": without,
        "guide": bench.guide.blob if sampling.classifier_guidance_scale else None,
    }
    return from_dict(Drawing, values, source="")


def read_drawing(path: Path) -> Drawing:
    """Read the JSON that lies beside a picture.

    Raises:
        UserError: missing, damaged, or not such a file.
    """
    remedy = "name a file that src/test.py --prompt or src/app.py has written"
    content = read_json(path, remedy)
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path}: describes no picture; {remedy}")
    drawing = from_dict(Drawing, content, source=str(path))
    return drawing if drawing.without else replace(drawing, format=Drawing.format)


def check_origin(drawing: Drawing, bench: Bench, source: str) -> str:
    """Make sure that a drawing that was read is one of this network.

    Returns:
        what may make it come out slightly different; mostly nothing.

    Raises:
        UserError: it was drawn by another network, or guided in another way or by another judge.
    """
    if drawing.format != Drawing.format:
        raise UserError(
            f"{source}: of a version that guided away from {drawing.without[0]!r} in another way; "
            "draw it anew with --prompt and --without"
        )
    origins = [("network", "--ckpt_path", drawing.checkpoint, bench.blob)]
    if drawing.guide:
        origins.append(("judge", "--evaluator", drawing.guide, bench.guide.blob))
    for what, flag, there, here in origins:
        if there != here:
            raise UserError(
                f"{source}: drawn with another {what}, whose file has git's hash {there[:10]} and "
                f"not {here[:10]}; name it with {flag}"
            )
    try:
        same = plan(bench, drawing.objects, drawing.seed, drawing.sampling, drawing.without)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    here = same.arithmetic
    if here == drawing.arithmetic:
        return ""
    return f"drawn on {drawing.arithmetic}, here on {here}: rounding may differ"


def draw(bench: Bench, drawing: Drawing) -> Generator[Tensor, None, Picture]:
    """Draw and judge: yields (3, S, S) in [-1, 1] after every step, returns the picture."""
    known = bench.checkpoint.objects
    labels = encode_condition(drawing.objects, drawing.without, known)[None]
    steps = bench.watch(labels, picture_seeds(drawing.seed, 1), drawing.sampling)
    images = yield from relay(steps, lambda batch: batch[0])
    return Picture(drawing, images[0], judge_pictures(bench.judge, images, labels.clamp(min=0)))


def _draw_into(
    bench: Bench, shown: Shown, place: int, drawing: Drawing, tries: int = 1
) -> Iterator[Shown]:
    def put(what: Picture | Tensor) -> Shown:
        shown[place] = what
        return [*shown]

    picture = yield from relay(draw(bench, drawing), put)
    yield put(replace(picture, tries=tries))


def draw_all(bench: Bench, drawings: Sequence[Drawing]) -> Iterator[Shown]:
    """Draw one picture after the other; yields all of them as far as they are, step by step.

    Each is drawn by itself, so that it has the very bytes of one that nothing is drawn beside.
    """
    shown: Shown = [None] * len(drawings)
    for place, drawing in enumerate(drawings):
        yield from _draw_into(bench, shown, place, drawing)
    yield with_nearest(bench, shown)


def until_right(bench: Bench, pictures: Sequence[Picture]) -> Iterator[Shown]:
    """Keep what the judge finds right and draw the rest again with other seeds, TRIES in all.

    Yields as `draw_all`. Pictures chosen so say nothing about how often the network is right.
    """
    shown: Shown = [replace(picture, tries=1) for picture in pictures]
    for place in range(len(shown)):
        while not (picture := shown[place]).right and picture.tries < TRIES:
            drawing = replace(picture.drawing, seed=picture.drawing.seed + len(shown))
            yield from _draw_into(bench, shown, place, drawing, picture.tries + 1)
    yield with_nearest(bench, shown)


def with_nearest(bench: Bench, pictures: Sequence[Picture]) -> list[Picture]:
    """The same with the training picture nearest to each, where there are any."""
    if bench.reference is None:
        return [*pictures]
    found = []
    for picture in pictures:
        if picture.nearest is None:
            (image,), (rms,) = nearest(picture.image[None], bench.reference)
            picture = replace(picture, nearest=image, rms=float(rms))
        found.append(picture)
    return found


def seen(picture: Judged, objects: dict[str, int]) -> list[tuple[str, float, Literal]]:
    """What the judge says of a picture: name, score and "right", "missing" or "extra"."""
    rows = []
    asked, detected = picture.found.labels[0], picture.found.detected[0]
    for name in decode_labels(asked | detected, objects):
        k = objects[name]
        kind = "extra" if not asked[k] else "right" if detected[k] else "missing"
        rows.append((name, float(picture.found.scores[0, k]), kind))
    return sorted(rows, key=lambda row: ("right", "missing", "extra").index(row[2]))
