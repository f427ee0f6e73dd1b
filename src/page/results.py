"""The charts that the last test and sweep of a run have written."""

import shlex
from html import escape
from pathlib import Path

from judging.bench import Bench, BenchConfig
from network.checkpoint import PRETRAINED
from page.cards import data_uri
from runtime.settings import ROOT, DataConfig

CHARTS = {
    "test_grid": "test.json",
    "new_test_grid": "new_test.json",
    "confusion": "what came instead of what was asked for",
    "nearest": "pictures above the training picture nearest to each",
    "denoising": "from noise to a picture",
    "sweep": "over the guidance scale",
}
"""PNGs of a result, in the order in which they are shown, and what they are."""


def last(folder: Path, pattern: str, title: str, words: str, command: str) -> tuple[str, str]:
    """The newest result below a folder, or the command that makes one.

    Args:
        pattern: of the report that such a result ends with.
        words: name of its Markdown file.

    Returns:
        Markdown, and HTML of the charts.
    """
    reports = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not reports:
        return f"### {title}\n\nNone yet. This makes one:\n\n```bash\n{command}\n```", ""
    found = reports[-1].parent
    text = found / words
    told = text.read_text(encoding="utf-8") if text.exists() else ""
    figures = []
    for name, what in CHARTS.items():
        path = found / f"{name}.png"
        if path.exists():
            source = data_uri(path.read_bytes())
            figures.append(
                f'<figure class="{name}"><img src="{source}" alt="{escape(what)}">'
                f"<figcaption>{escape(what)}</figcaption></figure>"
            )
    place = found.relative_to(ROOT) if found.is_relative_to(ROOT) else found
    head = f"### {title}\n\n`{place}`"
    return f"{head}\n\n{told}", f'<div class="charts">{"".join(figures)}</div>'


def last_results(
    bench: Bench, ckpt_path: Path, data: DataConfig, output_dir: Path
) -> tuple[str, str, str, str]:
    """Text and charts of the last test of the network's run, text and charts of its last sweep."""
    folder = output_dir / bench.run_name
    flags = [] if ckpt_path.resolve() == PRETRAINED.resolve() else ["--ckpt_path", str(ckpt_path)]
    flags += ["--data_dir", str(data.data_dir)] if data.data_dir else []
    flags += ["--output_dir", str(output_dir)] if output_dir != BenchConfig.output_dir else []
    more = f"{shlex.join(flags)} --scheduler dpmpp".strip()
    test = last(
        folder, "*/accuracies.json", "Last test", "figures.md", f"python src/test.py {more}"
    )
    sweep = last(
        folder, "guidance_scale/*/sweep.json", "Last sweep of the guidance scale", "sweep.md",
        f"python src/guidance_scale.py {more}",
    )  # fmt: skip
    return *test, *sweep
