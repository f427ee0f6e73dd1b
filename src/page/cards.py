"""Pictures as HTML: with what the judge sees in them, and the files to take away."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from PIL import Image
from torch import Tensor

from iclevr.dataset import resize
from iclevr.portrait import portrait
from judging.drawing import Judged, Picture, Shown, seen
from judging.evaluator import Evaluation
from judging.figures import data_uri, to_image, to_png
from judging.insertion import AS_BEFORE, Addition
from runtime.settings import SamplingConfig, to_dict

ENLARGED = 512
"""Side of the enlarged picture."""
FADED = 0.8
"""What stands for all that is held, in [-1, 1]."""
MARKS = {"right": "&#10003;", "missing": "&#10007;", "extra": "+"}
TITLES = {"right": "asked for, and there", "missing": "asked for, not there",
          "extra": "there, not asked for"}  # fmt: skip
FIELDS = {"scheduler": "sampler", "num_inference_steps": "steps", "guidance_scale": "guidance",
          "resample": "repeats", "prompt": "scene", "compose": "objects asked for"}  # fmt: skip
"""What the page calls the settings."""
COMPOSITIONS = {"joint": "as one scene", "objects": "one by one", "both": "both ways"}
"""What it calls the ways of asking for objects."""


def portraits_css(objects: dict[str, int]) -> str:
    """A background picture for each object that the renderer knows, as class `o-<index>`."""
    rules = []
    for name, index in objects.items():
        pixels = portrait(name)
        if pixels is not None:
            uri = data_uri(to_png(Image.fromarray(pixels)))
            rules.append(f".obj.o-{index} {{ background-image: url({uri}); }}")
    return "\n".join(rules)


def picker(objects: dict[str, int]) -> str:
    """A button for each object, eight in a row; without a portrait it bears the name."""
    buttons = []
    for name in sorted(objects, key=objects.__getitem__):
        text = "" if portrait(name) is not None else escape(name)
        shown = escape(name, quote=True)
        buttons.append(
            f'<button type="button" class="obj o-{objects[name]}" data-name="{shown}" '
            f'title="{shown}" aria-label="{shown}" aria-pressed="false">{text}</button>'
        )
    return f'<div class="picker" role="group" aria-label="objects">{"".join(buttons)}</div>'


def how(sampling: SamplingConfig) -> str:
    """'ddpm, 12 steps, guidance 3', and what else is not as usual."""
    usual = asdict(SamplingConfig())
    text = f"{sampling.scheduler}, {sampling.num_inference_steps} steps"
    text += f", guidance {sampling.guidance_scale:g}"
    for name, value in asdict(sampling).items():
        told = name in ("scheduler", "num_inference_steps", "guidance_scale", "batch_size")
        if not told and value != usual[name]:
            value = COMPOSITIONS[value] if name == "compose" else value
            text += f", {FIELDS.get(name, name).replace('_', ' ')} {value}"
    return text


def _image(image: Tensor, text: str) -> str:
    return f'<img src="{data_uri(to_png(to_image(image)))}" alt="{escape(text, quote=True)}">'


def _verdict(found: Evaluation, tries: int = 1) -> str:
    draws = f" after {tries} draws" if tries > 1 else ""
    if found.once:
        return f"right{draws}"
    twice = int(found.too_many) if found.exact else 0
    counts = {"missing": int(found.missing), "extra": int(found.extra), "there twice": twice}
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n) + draws


def _rows(picture: Judged, objects: dict[str, int]) -> str:
    return "".join(
        f'<li class="{kind}" title="{TITLES[kind]}"><span>{MARKS[kind]}</span>'
        f'<i class="obj o-{objects[name]}"></i>{escape(name)}<b>{score:.2f}</b></li>'
        for name, score, kind in seen(picture, objects)
    )


def _files(name: str, image: Tensor, content: Any) -> str:
    large = to_image(resize(image[None], ENLARGED)[0])
    side, described = image.shape[-1], json.dumps(content, indent=2) + "\n"
    files = (
        (f"PNG {side}", f"{name}.png", data_uri(to_png(to_image(image)))),
        (f"PNG {ENLARGED}", f"{name}_{ENLARGED}.png", data_uri(to_png(large))),
        ("JSON", f"{name}.json", data_uri(described.encode(), "application/json")),
    )
    links = (
        f'<a download="{escape(file, quote=True)}" href="{uri}">{text}</a>'
        for text, file, uri in files
    )
    return f'<p class="files">{" ".join(links)}</p>'


def card(
    what: Picture | Tensor | None, objects: dict[str, int], title: str = "", files: bool = True
) -> str:
    """One picture, on its way or judged."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    if what is None:
        return f'<article class="card waiting">{head}<div class="frame"></div></article>'
    if isinstance(what, Tensor):
        image = _image(what, "on its way from noise")
        return f'<article class="card growing">{head}<div class="frame">{image}</div></article>'
    near = ""
    if what.nearest is not None:
        near = (
            f'<p class="near">{_image(what.nearest, "nearest training picture")}'
            f"<span>nearest training picture, {what.rms:.1f} of 255 levels away</span></p>"
        )
    drawing = what.drawing
    links = _files(drawing.name, what.image, to_dict(drawing)) if files else ""
    verdict = _verdict(what.found, what.tries)
    return (
        f'<article class="card {"right" if what.right else "wrong"}">{head}'
        f'<div class="frame">{_image(what.image, ", ".join(drawing.objects))}</div>'
        f'<p class="verdict"><b>{verdict}</b><span>seed {drawing.seed}</span></p>'
        f'<ul class="seen">{_rows(what, objects)}</ul>{near}{links}</article>'
    )


def cards(shown: Shown, objects: dict[str, int], titles: Sequence[str] = ()) -> str:
    """All pictures, side by side as far as there is room; when the last is there, their files."""
    titles = titles or [""] * len(shown)
    files = all(isinstance(what, Picture) for what in shown)  # too large to send with every step
    parts = (card(what, objects, title, files) for what, title in zip(shown, titles, strict=True))
    return f'<div class="cards">{"".join(parts)}</div>'


def summary(shown: Shown, titles: Sequence[str] = ()) -> str:
    """What to say above the pictures."""
    pictures = [what for what in shown if isinstance(what, Picture)]
    if len(pictures) < len(shown):
        return f"Drawing {len(pictures) + 1} of {len(shown)} &hellip;"
    right = sum(picture.right for picture in pictures)
    draws = sum(picture.tries for picture in pictures)
    text = f"<b>{right} of {len(shown)}</b> right"
    if draws > len(shown):
        text += f", after {draws} draws"
        if given_up := len(shown) - right:
            text += f"; {given_up} given up after {max(p.tries for p in pictures)}"
        text += ". Chosen by the judge, so no measure of the network"
    drawing = pictures[0].drawing
    same = "the same noise" if titles else how(drawing.sampling)
    same += f", without {', '.join(drawing.without)}" if drawing.without else ""
    return f"{text}. Drawn {'from' if titles else 'by'} {escape(same)}."


def before_and_after(
    before: Tensor, shows: str, drawn: Addition | None, objects: dict[str, int]
) -> str:
    """A picture, the disc in which objects were added, and what has become of it.

    Args:
        shows: what to say of the picture.
        drawn: None while it is on its way.
    """
    first = (
        f'<article class="card"><h3>Before</h3><div class="frame">{_image(before, "before")}</div>'
        f'<p class="near"><span>{escape(shows)}</span></p></article>'
    )
    if drawn is None:
        rest = card(None, objects, "Drawn anew") + card(None, objects, "After")
        return f'<div class="cards three">{first}{rest}</div>'
    cut_out = drawn.free * drawn.image + (1 - drawn.free) * FADED
    added, names = ", ".join(drawn.added), ", ".join([*drawn.shows, *drawn.added])
    return (
        f'<div class="cards three">{first}'
        f'<article class="card"><h3>Drawn anew</h3><div class="frame">{_image(cut_out, added)}'
        f'</div><p class="near"><span>{drawn.share_drawn_anew:.0%} of the picture, for '
        f"{escape(added)}</span></p></article>"
        f'<article class="card {"right" if drawn.found.once else "wrong"}"><h3>After</h3>'
        f'<div class="frame">{_image(drawn.image, names)}</div>'
        f'<p class="verdict"><b>{_verdict(drawn.found)}</b><span>seed {drawn.seed}</span></p>'
        f'<ul class="seen">{_rows(drawn, objects)}</ul>'
        f"{_files(drawn.name, drawn.image, drawn.report)}</article></div>"
    )


def what_became(drawn: Addition) -> str:
    """What to say above `before_and_after`."""
    failed = [f"{words}: {', '.join(names)}" for words, names in drawn.failures.items()]
    failed += [drawn.twice] if drawn.twice else []
    if failed:
        text = escape("; ".join(failed))
        text = f"<b>{text[0].upper() + text[1:]}</b>"
        if drawn.twice or {*drawn.failures} - {AS_BEFORE}:
            text += "; Again tries the next seed"
    else:
        text = f"<b>Added</b>: {escape(', '.join(drawn.added))}; what was there still is"
    return f"{text}. {drawn.outside[0].upper()}{drawn.outside[1:]}."
