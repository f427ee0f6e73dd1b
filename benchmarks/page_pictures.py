"""Take the README's pictures of the page: what a visitor sees in its tabs.

    python benchmarks/page_pictures.py

Needs chromium. Draws with the given network, and shows the last test and sweep in output/result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import browser

import app
from network.checkpoint import PRETRAINED
from runtime.files import make_folder
from runtime.settings import ROOT, Settings, parse_args, run

WIDTH, LEAST_HEIGHT = 1280, 760


@dataclass(frozen=True)
class PagePicturesConfig(Settings):
    """Take pictures of the page of src/app.py."""

    ckpt_path: Path = PRETRAINED
    """Checkpoint of src/train.py."""
    out_dir: Path = ROOT / "docs"
    """Where app-draw.png, app-compare.png, app-add.png and app-results.png go."""
    objects: str = "red sphere, blue cube, yellow cylinder"
    """What is drawn."""
    added: str = "green cube"
    """What is added to the first picture."""


def take(page: Any, path: Path) -> None:
    """A picture of the whole page, as high as what it shows."""
    page.mouse.move(0, 0)
    page.set_viewport_size({"width": WIDTH, "height": LEAST_HEIGHT})
    page.wait_for_timeout(1000)  # what grows or fades has come to its end
    page.screenshot(path=path, full_page=True)
    print(path)


def wait_for_cards(page: Any, where: str, cards: int, files: int) -> None:
    page.wait_for_function(
        f"document.querySelectorAll('{where} .files').length == {files} && "
        f"document.querySelectorAll('{where} .card').length == {cards}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_args(PagePicturesConfig, argv)
    make_folder(config.out_dir, "--out_dir")
    with browser() as chromium:
        served, url = app.serve(["--ckpt_path", str(config.ckpt_path)])
        page = chromium.new_page(viewport={"width": WIDTH, "height": LEAST_HEIGHT})
        page.set_default_timeout(120_000)
        page.goto(url)
        page.wait_for_selector("#picker [aria-pressed=true]")
        page.fill("#prompt textarea", "")
        page.locator("#prompt textarea").press_sequentially(config.objects)  # as the picker hears
        page.wait_for_timeout(2000)
        page.click("#draw")
        wait_for_cards(page, "#pictures", 4, 4)
        take(page, config.out_dir / "app-draw.png")
        page.get_by_role("tab", name="Add").click()
        page.fill("#added textarea", config.added)
        page.click("#add")
        wait_for_cards(page, "#added-to", 3, 1)
        take(page, config.out_dir / "app-add.png")
        page.get_by_role("tab", name="Compare").click()
        page.get_by_text("samplers", exact=True).click()
        page.click("#compare")
        wait_for_cards(page, "#compared", 4, 4)
        take(page, config.out_dir / "app-compare.png")
        page.get_by_role("tab", name="Results").click()
        page.wait_for_timeout(2000)
        take(page, config.out_dir / "app-results.png")
        served.close()


if __name__ == "__main__":
    run(main)
