"""The network in the browser: choose objects, watch pictures grow, see what the judge sees.

    python src/app.py                       # http://127.0.0.1:7860, with the pretrained network
    python src/app.py --ckpt_path output/ddpm-cfg-v1/checkpoints/model_epoch_500.pth

What it draws is what src/test.py --prompt and --add draw with the same settings and seed, byte for
byte; the JSON beside a scene is understood by both. Without --share nothing leaves the machine.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Annotated

import gradio as gr
from pydantic import Field

from judging.bench import Bench, BenchConfig, open_bench, with_reference
from network.checkpoint import PRETRAINED
from page.cards import portraits_css
from page.handlers import Handlers
from page.results import last_results
from page.tabs import FILES, add_tab, compare_tab, draw_tab, left_side
from runtime.settings import DataConfig, Settings, UserError, parse_args, run

NO_TRAINING_PICTURES = (
    '<p class="hint">There are no training pictures here to show the nearest of; '
    "<code>python src/render_iclevr.py</code> renders them.</p>"
)


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
                    session = draw_tab(handlers, controls)
                    if bench.reference is None:
                        gr.HTML(NO_TRAINING_PICTURES)
                with gr.Tab("Compare"):
                    compare_tab(handlers, controls)
                with gr.Tab("Add"):
                    add_tab(handlers, controls, session)
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
