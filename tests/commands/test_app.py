"""src/app.py in a real browser, on a tiny world: clicked, watched, downloaded and drawn again."""

import json
import shutil
import socket
from pathlib import Path

import pytest
from conftest import OBJECTS

import app
import test

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install it")
BROWSER = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser: apt-get install chromium")


@pytest.fixture(scope="module")
def served(trained, tmp_path_factory):
    """The page's address, and the flags for src/test.py with the same network and results."""
    data, _, path = trained
    output = tmp_path_factory.mktemp("results")
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", output, "--device", "cpu"]
    argv = [str(a) for a in argv]
    connect, called = socket.socket.connect, []

    def noted(self, address):
        called.append(address[0] if isinstance(address, tuple) else "local")
        return connect(self, address)

    socket.socket.connect = noted
    try:
        page, url = app.serve(argv)
        yield url, argv
        page.close()
    finally:
        socket.socket.connect = connect
    assert set(called) <= {"127.0.0.1", "local"}  # nothing leaves the machine


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(served, browser):
    """Opens the page for one visitor more, who must see no error and nothing from elsewhere."""
    url, _ = served
    contexts, wrong = [], []

    def asked(request):
        if not request.url.startswith((url, "data:", "blob:")):
            wrong.append(request.url)

    def visit():
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("request", asked)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#picker [aria-pressed=true]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


def choose(page, *names):
    """Click until exactly these objects are chosen."""
    chosen = page.locator("#picker [aria-pressed=true]")
    for name in [*chosen.evaluate_all("all => all.map(b => b.dataset.name)"), *names]:
        page.click(f"#picker [data-name='{name}']")


def drawn(page, count, where="#pictures", files=None):
    """Wait for so many pictures and the files of all or some; returns the cards."""
    page.wait_for_function(
        f"document.querySelectorAll('{where} .files').length == {files or count} && "
        f"document.querySelectorAll('{where} .card').length == {count}"
    )
    return page.locator(f"{where} .card").all()


def set_slider(page, name, value):
    page.fill(f"#{name} input[type=number]", str(value))
    page.press(f"#{name} input[type=number]", "Tab")


def download(page, link):
    with page.expect_download() as waiting:
        link.click()
    return Path(waiting.value.path()).read_bytes(), waiting.value.suggested_filename


def test_objects_are_clicked_and_their_pictures_come_again(visit, served, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.insertion.BUSY", 3)  # in pictures of noise no place is free
    page, (_, argv) = visit(), served
    buttons = page.locator("#picker button")
    assert buttons.count() == len(OBJECTS)
    assert all(
        "data:image/png" in b.evaluate("b => getComputedStyle(b).backgroundImage")
        for b in buttons.all()[::7]
    )
    choose(page, "red cube", "cyan sphere")
    assert page.input_value("#prompt textarea") == "red cube, cyan sphere"
    set_slider(page, "count", 2)
    assert not page.is_visible("#without textarea")
    page.click("#more button")
    page.wait_for_timeout(500)  # under load, what opens takes its first value a little later
    page.fill("#without textarea", "gray cube")
    page.click("#compose input")
    page.get_by_role("option", name="one by one").click()
    noise = "() => document.querySelector('.growing img')?.src"
    page.click("#draw")
    frames = {page.wait_for_function(noise).json_value()}
    frames.add(page.wait_for_function(
        "old => { const src = document.querySelector('.growing img')?.src;"
        " return src && src != old && src; }", arg=[*frames][0],
    ).json_value())  # fmt: skip
    assert len(frames) == 2  # it is seen to grow
    cards = drawn(page, 2)
    assert [card.locator(".verdict span").inner_text() for card in cards] == ["seed 0", "seed 1"]
    for card in cards:
        rows = card.locator(".seen li")
        texts = rows.evaluate_all("rows => rows.map(row => row.className + ' ' + row.innerText)")
        asked = [text.split()[2:-1] for text in texts if not text.startswith("extra")]
        assert sorted(asked) == [["cyan", "sphere"], ["red", "cube"]]
        assert card.locator(".near").inner_text().startswith("nearest training picture, ")
    assert "of 2 right" in page.inner_text("#status")
    assert "objects asked for one by one, without gray cube." in page.inner_text("#status")

    # The second one's JSON draws it again, by the command and by another visitor's page.
    described, name = download(page, cards[1].get_by_text("JSON"))
    picture, _ = download(page, cards[1].get_by_text("PNG 16"))
    large, _ = download(page, cards[1].get_by_text("PNG 512"))
    assert name == "red-cube_cyan-sphere_without-gray-cube_seed1.json"
    assert len(large) > len(picture)
    (tmp_path / name).write_bytes(described)
    again = test.main([*argv, "--output_dir", str(tmp_path), "--from_json", str(tmp_path / name)])
    assert again.read_bytes() == picture
    other = visit()
    with other.expect_file_chooser() as chooser:
        other.click("#open")
    chooser.value.set_files(tmp_path / name)
    (card,) = drawn(other, 1)
    assert download(other, card.get_by_text("PNG 16"))[0] == picture
    assert json.loads(download(other, card.get_by_text("JSON"))[0]) == json.loads(described)
    assert other.input_value("#prompt textarea") == "red cube, cyan sphere"
    assert other.input_value("#seed input") == "1"
    other.wait_for_selector("#picker [data-name='cyan sphere'][aria-pressed=true]")
    other.click("#more button")
    assert other.input_value("#without textarea") == "gray cube"
    assert other.input_value("#compose input") == "one by one"

    # An object is added to it: by its number, as a file, and by the command.
    file, how = (tmp_path / name).with_suffix(".png"), json.loads(described)["sampling"]
    file.write_bytes(picture)
    other.get_by_role("tab", name="Add").click()
    other.fill("#added textarea", "blue cube")
    other.click("#add")
    (_, _, after) = drawn(other, 3, "#added-to", files=1)
    added, name = download(other, after.get_by_text("PNG 16"))
    settings = ("scheduler", "num_inference_steps", "guidance_scale", "resample", "compose")
    flags = [f"--{setting}={how[setting]}" for setting in settings]
    flags += ["--seed=1", "--add=blue cube", f"--to={file}", f"--output_dir={tmp_path}"]
    written = test.main([*argv, *flags])
    assert written.name == name and written.read_bytes() == added
    other.click("#add-again")
    other.wait_for_selector("#added-to .files")
    other.get_by_text("seed 2").wait_for()
    assert download(other, after.get_by_text("PNG 16"))[0] != added
    with other.expect_file_chooser() as chooser:
        other.click("#upload")
    chooser.value.set_files(file)
    other.wait_for_selector("#added-to .card.waiting")
    assert other.input_value("#number input") == ""
    other.fill("#there textarea", "red cube, cyan sphere")
    other.fill("#seed input", "1")
    other.click("#add")
    (_, _, after) = drawn(other, 3, "#added-to", files=1)
    assert download(other, after.get_by_text("PNG 16"))[0] == added


def test_two_visitors_get_their_own_pictures(visit):
    first, second = visit(), visit()
    for page, name, seed in ((first, "gray cube", 5), (second, "blue sphere", 50)):
        choose(page, name)
        set_slider(page, "count", 2)
        page.fill("#seed input", str(seed))
        set_slider(page, "steps", 5)
    first.click("#draw"), second.click("#draw")
    for page, name, seed in ((first, "gray cube", 5), (second, "blue sphere", 50)):
        for i, card in enumerate(drawn(page, 2)):
            assert card.locator(".frame img").get_attribute("alt") == name
            assert f"seed {seed + i}" in card.inner_text()
    first.click("#again")
    first.wait_for_function("document.querySelector('#pictures').innerText.includes('seed 7')")
    assert first.input_value("#seed input") == "7"
    drawn(first, 2)
    second.click("#keep")  # such a network draws nothing right
    second.get_by_text("2 given up after 8").wait_for()
    second.wait_for_function(
        "[...document.querySelectorAll('#pictures .verdict b')]"
        ".filter(b => b.innerText.endsWith('after 8 draws')).length == 2"
    )
    for card in drawn(second, 2):
        assert card.locator(".frame img").get_attribute("alt") == "blue sphere"


def test_prompts_mistakes_and_the_other_tabs(visit, served, tmp_path):
    page, (_, argv) = visit(), served
    prompt = page.locator("#prompt textarea")
    prompt.fill("")
    prompt.press_sequentially("green cylinder, red ball")
    page.click("#draw")
    page.wait_for_selector("#status [role=alert]")
    assert "unknown object 'red ball'" in page.inner_text("#status")
    prompt.fill("")
    prompt.press_sequentially("green cylinder")
    page.wait_for_selector("#picker [data-name='green cylinder'][aria-pressed=true]")
    assert page.locator("#picker [aria-pressed=true]").count() == 1

    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("samplers", exact=True).check()
    page.click("#compare")
    cards = drawn(page, 4, "#compared")
    titles = [card.locator("h3").inner_text() for card in cards]
    assert [title.split(",")[0] for title in titles] == ["ddpm", "ddim", "dpmpp", "unipc"]

    page.get_by_role("tab", name="Results").click()
    page.get_by_text("python src/test.py").wait_for()
    test.main([*argv, "--scheduler", "dpmpp", "--wandb", "disabled"])
    page.get_by_role("tab", name="Draw").click()
    page.get_by_role("tab", name="Results").click()
    page.wait_for_selector("figure.confusion img")
    assert page.locator(".charts img").count() == 5
