"""Pictures as HTML: with what the judge sees in them, and the files to take away."""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape

from PIL import Image
from torch import Tensor

from iclevr.dataset import resize
from iclevr.portrait import portrait
from judging.drawing import Drawing, Picture, Shown, seen
from judging.figures import to_image, to_png
from runtime.settings import SamplingConfig, to_dict

ENLARGED = 512
"""Side of the enlarged picture."""
MARKS = {"right": "&#10003;", "missing": "&#10007;", "extra": "+"}
TITLES = {"right": "asked for, and there", "missing": "asked for, not there",
          "extra": "there, not asked for"}  # fmt: skip
FIELDS = {"scheduler": "sampler", "num_inference_steps": "steps", "guidance_scale": "guidance",
          "resample": "repeats", "prompt": "scene", "compose": "objects asked for"}  # fmt: skip
"""What the page calls the settings."""
COMPOSITIONS = {"joint": "as one scene", "objects": "one by one", "both": "both ways"}
"""What it calls the ways of asking for objects."""


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


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


def _verdict(picture: Picture) -> str:
    tries = f" after {picture.tries} draws" if picture.tries > 1 else ""
    if picture.right:
        return f"right{tries}"
    counts = {"missing": int(picture.found.missing), "extra": int(picture.found.extra)}
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n) + tries


def _files(drawing: Drawing, image: Tensor) -> str:
    large = to_image(resize(image[None], ENLARGED)[0])
    name, side = drawing.name, image.shape[-1]
    described = json.dumps(to_dict(drawing), indent=2) + "\n"
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
    rows = "".join(
        f'<li class="{kind}" title="{TITLES[kind]}"><span>{MARKS[kind]}</span>'
        f'<i class="obj o-{objects[name]}"></i>{escape(name)}<b>{score:.2f}</b></li>'
        for name, score, kind in seen(what, objects)
    )
    near = ""
    if what.nearest is not None:
        near = (
            f'<p class="near">{_image(what.nearest, "nearest training picture")}'
            f"<span>nearest training picture, {what.rms:.1f} of 255 levels away</span></p>"
        )
    drawing = what.drawing
    links = _files(drawing, what.image) if files else ""
    return (
        f'<article class="card {"right" if what.right else "wrong"}">{head}'
        f'<div class="frame">{_image(what.image, ", ".join(drawing.objects))}</div>'
        f'<p class="verdict"><b>{_verdict(what)}</b><span>seed {drawing.seed}</span></p>'
        f'<ul class="seen">{rows}</ul>{near}{links}</article>'
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
