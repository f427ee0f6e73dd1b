"""A run and its results in one file to hand in, which needs nothing else to be looked at.

    python src/report.py --run_name ddpm-cfg-v1
    python src/report.py --run_name ddpm-cfg-v1 --language zh-TW --pdf
    python src/report.py --ckpt_path data/standin/model.pth    # the pretrained network's results

Writes report.html to the run's folder: what was trained, curves, previews, pictures, figures with
their intervals, and the commands that made them. It shows what the other scripts have written, and
computes no figure; of what is missing it names the command that makes it.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reporting.findings import find_run
from reporting.page import page
from runtime.files import atomic_write, check_folder
from runtime.settings import ROOT, RunName, Settings, TrainConfig, UserError, parse_args, run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Show a run and its results in one HTML file."""

    run_name: RunName = TrainConfig.run_name
    """The run; its folder lies in --output_dir."""
    output_dir: Path = ROOT / "output"
    """Folder of all runs."""
    ckpt_path: Path | None = None
    """Report the network in this checkpoint instead, such as data/standin/model.pth."""
    result_dir: Path | None = None
    """Folder of all results, the --output_dir of src/test.py (default: result/ in --output_dir)."""
    test: str | None = None
    """Folder name of the test whose pictures are shown (default: of the latest checkpoint's the
    one with most seeds, then the newest)."""
    language: Literal["en", "zh-TW"] = "en"
    """Of headings, captions and explanations."""
    out: Path | None = None
    """The file (default: report.html in the run's folder, report.zh-TW.html in that language; of a
    checkpoint that lies in no run's folder, in the folder of its results)."""
    pdf: bool = False
    """Print it to a PDF beside it, too; needs Chromium."""


def find_browser() -> str:
    """Chromium, or one of its kin."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise UserError(
            "--pdf: no Chromium here; install it (apt-get install chromium), or leave --pdf out "
            "and print the HTML file from any browser"
        )
    return found


def print_pdf(browser: str, html: Path, pdf: Path) -> None:
    """Print a page as a browser does."""
    command = [browser, "--headless", "--disable-gpu", "--no-pdf-header-footer"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--no-sandbox")  # which Chromium refuses to root
    with atomic_write(pdf) as temporary, tempfile.TemporaryDirectory() as profile:
        command += [f"--user-data-dir={profile}", f"--print-to-pdf={temporary}"]
        failed = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            failed = subprocess.run(
                [*command, html.absolute().as_uri()], capture_output=True, text=True, timeout=120
            )
        if not temporary.exists():
            why = (failed.stderr.strip().splitlines() or [""])[-1] if failed else "no answer"
            raise UserError(f"--pdf: {browser} printed nothing ({why[:160]}); {html} is there")


def main(argv: Sequence[str] | None = None) -> Path:
    """Returns the path of the HTML file."""
    config = parse_args(ReportConfig, argv)
    name = "report.html" if config.language == "en" else f"report.{config.language}.html"
    if config.out and config.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {config.out}: name a file that ends in .html")
    browser = find_browser() if config.pdf else None
    result_dir = config.result_dir or config.output_dir / "result"
    of = find_run(config.output_dir, config.run_name, config.ckpt_path, result_dir)
    out = config.out or (of.folder or of.results) / name
    check_folder(out.parent, "--out")
    text = page(of, config.test, config.language)
    with atomic_write(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{out} ({out.stat().st_size / 2**20:.1f} MiB)")
    if browser:
        pdf = out.with_suffix(".pdf")
        print_pdf(browser, out, pdf)
        print(pdf)
    return out


if __name__ == "__main__":
    run(main)
