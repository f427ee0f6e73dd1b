"""The charts that the last test and sweep of a run have written."""

from html import escape
from pathlib import Path

from judging.bench import Bench, BenchConfig
from judging.figures import data_uri
from network.checkpoint import PRETRAINED
from runtime.command_line import command
from runtime.settings import ROOT, DataConfig

CHARTS = {
    "test_grid": "test.json",
    "new_test_grid": "new_test.json",
    "confusion": "what came instead of what was asked for",
    "nearest": "pictures above the training picture nearest to each",
    "denoising": "from noise to a picture",
    "sweep": "over the guidance scale",
}
"""PNGs of a result, in the order in which they are shown, and what they are; before them stand the
grids of conditions of one's own."""


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
    grids = sorted(path.stem for path in found.glob("*_grid.png"))
    own = {name: f"{name.removesuffix('_grid')}.json" for name in grids if name not in CHARTS}
    figures = []
    for name, what in (own | CHARTS).items():
        path = found / f"{name}.png"
        if path.exists():
            source, what = data_uri(path.read_bytes()), escape(what)
            figures.append(
                f'<figure class="{"own" if name in own else name}"><img src="{source}" '
                f'alt="{what}"><figcaption>{what}</figcaption></figure>'
            )
    place = found.relative_to(ROOT) if found.is_relative_to(ROOT) else found
    head = f"### {title}\n\n`{place}`"
    return f"{head}\n\n{told}", f'<div class="charts">{"".join(figures)}</div>'


def last_results(
    bench: Bench, ckpt_path: Path, data: DataConfig, output_dir: Path
) -> tuple[str, str, str, str]:
    """Text and charts of the last test of the network's run, text and charts of its last sweep."""
    folder = output_dir / bench.run_name
    flags = [] if ckpt_path.resolve() == PRETRAINED.resolve() else ["--ckpt_path", ckpt_path]
    flags += ["--data_dir", data.data_dir] if data.data_dir else []
    flags += ["--output_dir", output_dir] if output_dir != BenchConfig.output_dir else []
    flags += ["--scheduler", "dpmpp"]
    test = last(folder, "*/accuracies.json", "Last test", "figures.md", command("test", *flags))
    sweep = last(
        folder, "guidance_scale/*/sweep.json", "Last sweep of the guidance scale", "sweep.md",
        command("guidance_scale", *flags),
    )  # fmt: skip
    return *test, *sweep
