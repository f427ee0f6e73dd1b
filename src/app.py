"""The network in the browser: choose objects, watch pictures grow, see what the judge sees.

    python src/app.py                       # http://127.0.0.1:7860, with the pretrained network
    python src/app.py --ckpt_path output/ddpm-cfg-v1/checkpoints/model_epoch_500.pth

What it draws is what src/test.py --prompt draws with the same settings and seed, byte for byte; the
JSON beside a picture is understood by both. Without --share nothing leaves the machine.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Annotated

import gradio as gr
from pydantic import Field

from diffusion.schedule import SCHEDULERS
from judging.bench import Bench, BenchConfig, open_bench, with_reference
from judging.drawing import with_steps
from network.checkpoint import PRETRAINED
from page.cards import picker, portraits_css
from page.handlers import (
    KINDS,
    MOST_GUIDANCE,
    MOST_PICTURES,
    MOST_REPEATS,
    MOST_STEPS,
    Handlers,
    Session,
)
from page.results import last_results
from runtime.settings import DataConfig, SamplingConfig, Settings, UserError, parse_args, run

FILES = Path(__file__).parent / "page"
SCALES = (1, 1.5, 2, 2.5, 3, 4, 5, 7, 10)
FIRST_SCENE = ("red sphere", "cyan cube")
NO_TRAINING_PICTURES = (
    '<p class="hint">There are no training pictures here to show the nearest of; '
    "<code>python src/render_iclevr.py</code> renders them.</p>"
)
AT_ONCE = 2
"""Drawings at the same time; who comes then waits in line."""


@dataclass(frozen=True)
class AppConfig(Settings):
    """A page in the browser that draws scenes."""

    ckpt_path: Path = PRETRAINED
    """Checkpoint of src/train.py (default: the pretrained network, see data/README.md)."""
    output_dir: Path = BenchConfig.output_dir
    """Where src/test.py and src/guidance_scale.py have put their results."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port to listen at (default: the first free one from 7860 on)."""
    share: bool = False
    """Give the page a public address for three days, through gradio's servers."""
    device: str | None = None
    """cuda, cpu ... (default: the best there is)."""
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class Controls:
    """The left side: the scene, and how it is drawn."""

    picker: gr.HTML
    prompt: gr.Textbox
    seed: gr.Number
    count: gr.Slider
    base: gr.State
    sampler: gr.Dropdown
    steps: gr.Slider
    guidance: gr.Slider
    repeats: gr.Slider
    file: gr.UploadButton

    @property
    def all(self) -> list[gr.components.Component]:
        """What `Handlers.drawings` takes."""
        return [self.prompt, self.seed, self.count, self.base, self.sampler, self.steps,
                self.guidance, self.repeats]  # fmt: skip


def left_side(handlers: Handlers) -> Controls:
    """Objects, prompt and settings."""
    objects = handlers.objects
    scene = [name for name in FIRST_SCENE if name in objects] or [*objects][:1]
    noise = handlers.bench.checkpoint.config.noise
    few = SamplingConfig(num_inference_steps=min(12, noise.num_train_timesteps))
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
    file = gr.UploadButton("Open a picture's JSON", file_types=[".json"], size="sm", elem_id="open")
    base = gr.State(usual)
    pick.input(None, pick, prompt, js="(names) => names.join(', ')")
    prompt.input(
        handlers.names, prompt, pick, show_progress="hidden", queue=False,
        trigger_mode="always_last",
    )  # fmt: skip
    return Controls(pick, prompt, seed, count, base, sampler, steps, guidance, repeats, file)


def draw_tab(handlers: Handlers, controls: Controls) -> None:
    """Pictures of one scene, and the judge's opinion of them."""
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


def build(bench: Bench, config: AppConfig) -> gr.Blocks:
    """The page, not yet served."""
    handlers = Handlers(bench)
    with gr.Blocks(title="Scenes from names", analytics_enabled=False) as page:
        network = f"{bench.run_name}, step {bench.checkpoint.step:,}"
        gr.HTML(
            f"<h1>Scenes from names</h1><p>Network: {escape(network)} &middot; "
            f"judge: {escape(bench.judge.name)}</p>", elem_classes="masthead",
        )  # fmt: skip
        with gr.Row():
            with gr.Column(scale=4, min_width=340):
                controls = left_side(handlers)
            with gr.Column(scale=8, min_width=340), gr.Tabs():
                with gr.Tab("Draw"):
                    draw_tab(handlers, controls)
                    if bench.reference is None:
                        gr.HTML(NO_TRAINING_PICTURES)
                with gr.Tab("Compare"):
                    compare_tab(handlers, controls)
                with gr.Tab("Results") as results:
                    parts = [
                        gr.Markdown(line_breaks=True),
                        gr.HTML(),
                        gr.Markdown(line_breaks=True),
                        gr.HTML(),
                    ]
        results.select(
            lambda: last_results(bench, config.ckpt_path, config.data, config.output_dir),
            None, parts, show_progress="hidden",
        )  # fmt: skip
    return page.queue(max_size=32)


def serve(argv: Sequence[str] | None = None) -> tuple[gr.Blocks, str]:
    """Start to serve the page: the page, to be closed in the end, and its address."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    config = parse_args(AppConfig, argv)
    bench = with_reference(open_bench(config.ckpt_path, config.data, config.device))
    page = build(bench, config)
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="md", spacing_size="sm",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    try:
        _, local, public = page.launch(
            share=config.share, server_name=config.host, server_port=config.port, quiet=True,
            prevent_thread_lock=True, footer_links=[], run_history=False, ssr_mode=False,
            theme=theme, css=portraits_css(bench.checkpoint.objects),
            css_paths=[FILES / "style.css"],
        )  # fmt: skip
    except OSError as error:
        which = f"--port {config.port}" if config.port else f"--host {config.host}"
        raise UserError(
            f"{which}: can't listen there; it is taken, or not this machine's"
        ) from error
    print(f"the page: {public or local}\nCtrl-C ends it")
    return page, local


def main(argv: Sequence[str] | None = None) -> None:
    page, _ = serve(argv)
    page.block_thread()


if __name__ == "__main__":
    run(main)
