"""The page's controls and tabs: what stands where, and which handler it calls."""

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from diffusion.samplers import SCHEDULERS
from judging.drawing import with_steps
from page.cards import COMPOSITIONS, picker
from page.handlers import (
    KINDS,
    MOST_GUIDANCE,
    MOST_PICTURES,
    MOST_REPEATS,
    MOST_STEPS,
    Handlers,
    Session,
)
from runtime.settings import SamplingConfig

FILES = Path(__file__).parent
SCALES = (1, 1.5, 2, 2.5, 3, 4, 5, 7, 10)
FIRST_SCENE = ("red sphere", "cyan cube")
FIRST_ADDED = "green cylinder"
USUAL_GUIDANCE = 2.0
"""To begin with: more draws objects twice (benchmarks/drawn_twice.py)."""
UPLOAD = "Upload a PNG"
AT_ONCE = 2
"""Drawings at the same time; who comes then waits in line."""


@dataclass(frozen=True)
class Controls:
    """The left side: the scene, and how it is drawn."""

    picker: gr.HTML
    prompt: gr.Textbox
    without: gr.Textbox
    seed: gr.Number
    count: gr.Slider
    base: gr.State
    sampler: gr.Dropdown
    steps: gr.Slider
    guidance: gr.Slider
    repeats: gr.Slider
    compose: gr.Dropdown
    file: gr.UploadButton

    @property
    def how(self) -> list[gr.components.Component]:
        """What `Handlers.sampling` takes."""
        return [self.base, self.sampler, self.steps, self.guidance, self.repeats, self.compose]

    @property
    def all(self) -> list[gr.components.Component]:
        """What `Handlers.drawings` takes."""
        return [self.prompt, self.without, self.seed, self.count, *self.how]


def left_side(handlers: Handlers) -> Controls:
    """Objects, prompt and settings."""
    objects = handlers.objects
    scene = [name for name in FIRST_SCENE if name in objects] or [*objects][:1]
    noise = handlers.bench.checkpoint.config.noise
    steps = min(12, noise.num_train_timesteps)
    few = SamplingConfig(num_inference_steps=steps, guidance_scale=USUAL_GUIDANCE)
    usual = with_steps(noise, few)
    pick = gr.HTML(
        scene, html_template=picker(objects), elem_id="picker", apply_default_css=False,
        js_on_load=(FILES / "picker.js").read_text(encoding="utf-8"),
    )  # fmt: skip
    prompt = gr.Textbox(
        ", ".join(scene), label="Scene", placeholder="red sphere, cyan cube", elem_id="prompt"
    )
    count = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures", elem_id="count")
    guidance = gr.Slider(0, MOST_GUIDANCE, usual.guidance_scale, step=0.1, label="Guidance")
    steps = gr.Slider(
        1, MOST_STEPS, usual.num_inference_steps, step=1, label="Steps", elem_id="steps"
    )
    repeats = gr.Slider(1, MOST_REPEATS, 1, step=1, label="Repeats of every step")
    with gr.Row():
        sampler = gr.Dropdown([*SCHEDULERS], value=usual.scheduler, label="Sampler", min_width=120)
        seed = gr.Number(0, label="Seed", precision=0, min_width=120, elem_id="seed")
    with gr.Accordion("More", open=False, elem_id="more"), gr.Row():
        without = gr.Textbox(
            "", label="Without", placeholder="purple cylinder", min_width=130, elem_id="without"
        )
        compose = gr.Dropdown(
            [(words, name) for name, words in COMPOSITIONS.items()], value=usual.compose,
            label="Objects asked for", min_width=130, elem_id="compose",
        )  # fmt: skip
    file = gr.UploadButton("Open a picture's JSON", file_types=[".json"], size="sm", elem_id="open")
    base = gr.State(usual)
    pick.input(None, pick, prompt, js="(names) => names.join(', ')")
    prompt.input(
        handlers.names, prompt, pick, show_progress="hidden", queue=False,
        trigger_mode="always_last",
    )  # fmt: skip
    return Controls(
        pick, prompt, without, seed, count, base, sampler, steps, guidance, repeats, compose, file
    )


def draw_tab(handlers: Handlers, controls: Controls) -> gr.State:
    """Pictures of one scene, and the judge's opinion of them.

    Returns:
        what each visitor has before him.
    """
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", min_width=90, elem_id="draw")
        again = gr.Button("Again", min_width=80, elem_id="again")
        keep = gr.Button("Keep what is right", min_width=185, elem_id="keep")
        stop = gr.Button("Stop", min_width=70, elem_id="stop")
    status = gr.HTML(elem_classes="status", elem_id="status")
    gallery = gr.HTML('<div class="empty">Choose objects, then draw.</div>', elem_id="pictures")
    session = gr.State(Session())
    shown = [gallery, status, session]
    hidden = dict(show_progress_on=status, concurrency_id="network", concurrency_limit=AT_ONCE)
    inputs = [session, *controls.all]
    again_seed = again.click(
        lambda seed, count: (seed or 0) + count, [controls.seed, controls.count], controls.seed
    )
    stop.click(
        None,
        cancels=[
            draw.click(handlers.draw, inputs, shown, **hidden),
            controls.prompt.submit(handlers.draw, inputs, shown, **hidden),
            controls.without.submit(handlers.draw, inputs, shown, **hidden),
            again_seed.then(handlers.draw, inputs, shown, **hidden),
            keep.click(handlers.keep, inputs, shown, **hidden),
            controls.file.upload(
                handlers.open_file,
                controls.file,
                [*shown, controls.picker, *controls.all],
                **hidden,
            ),
        ],
    )
    return session


def compare_tab(handlers: Handlers, controls: Controls) -> None:
    """One scene from one noise, drawn in several ways."""
    kind = gr.Radio(KINDS, value=KINDS[0], label="Side by side", elem_id="kind")
    scales = gr.CheckboxGroup(SCALES, value=[1, 2, 3, 5], label="Guidance scales")
    samplers = gr.CheckboxGroup([*SCHEDULERS], value=[*SCHEDULERS], label="Samplers", visible=False)
    kind.change(
        lambda kind: [gr.update(visible=kind == k) for k in KINDS], kind, [scales, samplers]
    )
    with gr.Row():
        compare = gr.Button("Compare", variant="primary", min_width=90, elem_id="compare")
        stop = gr.Button("Stop", min_width=70)
    status = gr.HTML(elem_classes="status", elem_id="compare-status")
    gallery = gr.HTML(
        '<div class="empty">The scene on the left, every time from the same noise.</div>',
        elem_id="compared",
    )
    drawn = compare.click(
        handlers.compare, [kind, scales, samplers, *controls.all], [gallery, status, gr.State()],
        show_progress_on=status, concurrency_id="network", concurrency_limit=AT_ONCE,
    )  # fmt: skip
    stop.click(None, cancels=drawn)


def add_tab(handlers: Handlers, controls: Controls, session: gr.State) -> None:
    """One object more in a picture of the Draw tab, or in one that is uploaded."""
    with gr.Row():
        number = gr.Number(1, label="Picture", precision=0, min_width=80, elem_id="number")
        added = gr.Textbox(
            FIRST_ADDED if FIRST_ADDED in handlers.objects else "", label="Add", scale=2,
            min_width=150, placeholder="green cube", elem_id="added",
        )  # fmt: skip
        there = gr.Textbox(
            "", label="What is there", placeholder="as asked for, else as the judge sees it",
            scale=3, min_width=220, elem_id="there",
        )  # fmt: skip
    with gr.Row():
        add = gr.Button("Add", variant="primary", min_width=90, elem_id="add")
        again = gr.Button("Again", min_width=80, elem_id="add-again")
        file = gr.UploadButton(UPLOAD, file_types=[".png"], min_width=120, elem_id="upload")
    status = gr.HTML(elem_classes="status", elem_id="add-status")
    gallery = gr.HTML(
        '<div class="empty">A picture of the Draw tab by its number, or one of your own; settings '
        "and seed are those on the left, Scene and Without are not heeded.</div>",
        elem_id="added-to",
    )  # fmt: skip
    upload, shown = gr.State(), [gallery, status, gr.State()]
    which = [session, number, upload]
    inputs = [*which, there, added, controls.seed, *controls.how]
    hidden = dict(show_progress_on=status, concurrency_id="network", concurrency_limit=AT_ONCE)
    number.input(lambda: (None, gr.update(label=UPLOAD)), None, [upload, file]).then(
        handlers.show_picture, which, shown, show_progress="hidden"
    )
    file.upload(
        lambda path: (path, None, gr.update(label=Path(path).name)), file, [upload, number, file]
    ).then(handlers.show_picture, which, shown, show_progress="hidden")
    again_seed = again.click(lambda seed: (seed or 0) + 1, controls.seed, controls.seed)
    for event in (add.click, added.submit, there.submit, again_seed.then):
        event(handlers.add, inputs, shown, **hidden)
