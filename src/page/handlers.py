"""What the page does when a control is used; one visitor's pictures never meet another's."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from torch import Tensor

from iclevr.dataset import normalize, to_uint8
from iclevr.labels import parse_prompt
from judging.bench import Bench
from judging.drawing import (
    Drawing,
    Picture,
    Shown,
    check_origin,
    draw_all,
    plan,
    read_drawing,
    until_right,
    with_steps,
)
from judging.insertion import add, objects_in, open_picture
from page.cards import FIELDS, before_and_after, cards, summary, what_became
from runtime.settings import SamplingConfig, UserError, from_dict

KINDS = ("guidance scales", "samplers")
"""What can be set side by side."""
MOST_STEPS, MOST_GUIDANCE, MOST_REPEATS, MOST_PICTURES = 100, 10, 8, 12
"""Ends of the sliders; a file may hold more."""


def sentence(error: UserError) -> str:
    """The message in the page's words: settings have labels here, not flags."""
    text = re.sub(
        r"--(\w+)", lambda flag: FIELDS.get(flag[1], flag[1].replace("_", " ")), str(error)
    )
    return f'<div class="error" role="alert">{escape(text[0].upper() + text[1:])}</div>'


def seed_of(seed: int | None) -> int:
    """What is in its box."""
    if seed is None:
        raise UserError("seed: is empty; write a number from 0 on")
    return seed


@dataclass(frozen=True)
class Session:
    """What one visitor has before him."""

    drawings: tuple[Drawing, ...] = ()
    shown: tuple[Picture | None, ...] = ()
    """Of each drawing the picture, once it is drawn, or the one that was drawn in its place."""


def in_the_page(handler: Callable[..., Iterator[tuple]]) -> Callable[..., Iterator[tuple]]:
    """A handler of pictures, status and session, whose error ends in a sentence instead."""

    @functools.wraps(handler)
    def handled(*args: Any) -> Iterator[tuple]:
        try:
            yield from handler(*args)
        except UserError as error:
            yield gr.skip(), sentence(error), gr.skip()

    return handled


class Handlers:
    """What the page does for whoever asks; network and judge are shared, and only read."""

    def __init__(self, bench: Bench):
        self.bench, self.objects = bench, bench.checkpoint.objects
        self.noise, self.side = bench.checkpoint.config.noise, bench.model.image_size

    def sampling(
        self, base: SamplingConfig, sampler: str, steps: int, guidance: float, repeats: int,
        compose: str,
    ) -> SamplingConfig:  # fmt: skip
        """The settings that the controls ask for.

        Args:
            base: the settings that have no control; those of a file that was opened.
        """
        values = asdict(base) | {
            "scheduler": sampler, "num_inference_steps": steps, "guidance_scale": guidance,
            "resample": repeats, "compose": compose,
        }  # fmt: skip
        return from_dict(SamplingConfig, values, source="")

    def drawings(
        self, prompt: str, without: str, seed: int | None, count: int, *how: Any
    ) -> list[Drawing]:
        """What the controls ask for; picture i has the seed `seed` + i."""
        names, sampling = parse_prompt(prompt, self.objects), self.sampling(*how)
        unwanted = parse_prompt(without, self.objects, "--without") if without.strip() else []
        first = seed_of(seed)
        return [plan(self.bench, names, first + i, sampling, unwanted) for i in range(count)]

    def show(
        self, drawings: Sequence[Drawing], frames: Iterable[Shown], titles: Sequence[str] = ()
    ) -> Iterator[tuple[str, str, Session]]:
        """Pictures, status and session for every step of what is being drawn."""
        for shown in frames:
            done = tuple(what if isinstance(what, Picture) else None for what in shown)
            session = Session(tuple(drawings), done)
            yield cards(shown, self.objects, titles), summary(shown, titles), session

    @in_the_page
    def draw(self, session: Session, *controls: Any) -> Iterator[tuple]:
        drawings = self.drawings(*controls)
        yield from self.show(drawings, draw_all(self.bench, drawings))

    @in_the_page
    def keep(self, session: Session, *controls: Any) -> Iterator[tuple]:
        """Draw until the judge agrees, from the pictures that are there if they are still meant."""
        drawings = tuple(self.drawings(*controls))
        if session.drawings != drawings or None in session.shown:
            for frame in self.show(drawings, draw_all(self.bench, drawings)):
                yield frame
                session = frame[-1]
        yield from self.show(drawings, until_right(self.bench, session.shown))

    @in_the_page
    def compare(
        self, kind: str, scales: list[float], samplers: list[str], *controls: Any
    ) -> Iterator[tuple]:
        """One scene from the same noise with each guidance scale, or each sampler.

        A sampler that can't take so many steps takes as many as it can; its title says how many.
        """
        prompt, without, seed, _, *how = controls
        drawings = {}
        for scale in scales if kind == KINDS[0] else ():
            (drawing,) = self.drawings(prompt, without, seed, 1, *how[:3], scale, *how[4:])
            drawings[f"guidance {scale:g}"] = drawing
        for sampler in samplers if kind == KINDS[1] else ():
            sampling = self.sampling(how[0], sampler, *how[2:])
            steps = with_steps(self.noise, sampling).num_inference_steps
            way = how[0], sampler, steps, *how[3:]
            (drawing,) = self.drawings(prompt, without, seed, 1, *way)
            drawings[f"{sampler}, {steps} steps"] = drawing
        if not drawings:
            raise UserError("choose at least one to compare")
        frames = draw_all(self.bench, [*drawings.values()])
        yield from self.show([*drawings.values()], frames, [*drawings])

    def picture_of(
        self, session: Session, number: int | None, upload: str | None
    ) -> tuple[Path, Tensor, Drawing | None]:
        """What the Add tab takes: the picture's name, the picture, and its drawing if there is one.

        Args:
            number: of a picture in the Draw tab, from 1 on; None: the one that was uploaded.
        """
        if number is not None:
            if not 0 < number <= len(session.shown) or session.shown[number - 1] is None:
                raise UserError(f"picture {number}: is not in the Draw tab; draw it, or upload one")
            picture = session.shown[number - 1]
            image = normalize(to_uint8(picture.image))  # as its PNG has it
            return Path(f"{picture.drawing.name}.png"), image, picture.drawing
        if upload is None:
            raise UserError("picture: is empty; write a number from 1 on, or upload one")
        try:
            return Path(Path(upload).name), open_picture(Path(upload), self.side), None
        except UserError as error:
            raise UserError(str(error).replace(upload, Path(upload).name)) from None

    @in_the_page
    def show_picture(self, *which: Any) -> Iterator[tuple]:
        """The picture that something is to be added to."""
        picture, image, _ = self.picture_of(*which)
        yield before_and_after(image, picture.stem, None, self.objects), "", gr.skip()

    @in_the_page
    def add(
        self, session: Session, number: int | None, upload: str | None, there: str, added: str,
        seed: int | None, *how: Any,
    ) -> Iterator[tuple]:  # fmt: skip
        """Add objects to a picture, as src/test.py --add does.

        Args:
            there: what the picture shows; if empty, what it was drawn from or the judge says so.
        """
        picture, image, drawing = self.picture_of(session, number, upload)
        told = there if there.strip() else None
        described = drawing and drawing.objects
        flag = "--what_is_there"
        names, who = objects_in(self.bench, picture, image, told, described, flag)
        new, seed = parse_prompt(added, self.objects, "--add"), seed_of(seed)
        sampling = self.sampling(*how)
        shows = ", ".join(names) + (f" ({who})" if who else "")
        html = before_and_after(image, shows, None, self.objects)
        yield html, f"Adding {escape(', '.join(new))} &hellip;", gr.skip()
        drawn = add(self.bench, sampling, picture, image, names, new, seed, flag)
        yield before_and_after(image, shows, drawn, self.objects), what_became(drawn), gr.skip()

    def open_file(self, path: str) -> Iterator[tuple]:
        """Draw the picture of a JSON file, and set the controls to what it says: what `draw`
        yields, and picker, prompt, without, seed, count, base, sampler, steps, guidance, repeats
        and compose."""
        try:
            drawing = read_drawing(Path(path))
            note = check_origin(drawing, self.bench, Path(path).name)
        except UserError as error:
            text = str(error).replace(path, Path(path).name)
            yield gr.skip(), sentence(UserError(text)), *[gr.skip()] * 12
            return
        base = with_steps(self.noise, drawing.sampling)
        drawing = replace(drawing, sampling=base)
        steps, scale, repeats = base.num_inference_steps, base.guidance_scale, base.resample
        names = [*drawing.objects]
        controls = [names, ", ".join(names), ", ".join(drawing.without), drawing.seed, 1, base]
        controls += [
            base.scheduler,
            gr.Slider(value=steps, maximum=max(MOST_STEPS, steps)),
            gr.Slider(value=scale, minimum=min(0, scale), maximum=max(MOST_GUIDANCE, scale)),
            gr.Slider(value=repeats, maximum=max(MOST_REPEATS, repeats)),
            base.compose,
        ]
        for html, text, session in self.show([drawing], draw_all(self.bench, [drawing])):
            yield html, f"{text} {escape(note)}", session, *controls

    def names(self, prompt: str) -> list[str] | Any:
        """What a prompt names, for the picker; as it is while the prompt is being written."""
        try:
            return parse_prompt(prompt, self.objects) if prompt.strip() else []
        except UserError:
            return gr.skip()
