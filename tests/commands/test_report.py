"""src/report.py on a tiny world: its page holds what the other scripts have written."""

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import error_of
from matplotlib.figure import Figure

import demo
import guidance_scale
import report
import test
from judging.intervals import Interval
from network.checkpoint import PRETRAINED
from reporting.page import TEMPLATE, environment
from runtime.settings import parse_args


class Page(HTMLParser):
    """Rows of its tables by id or class, captions of its pictures, sources, and all text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tables, self.figures, self.sources, self.tags = {}, [], [], set()
        self.text, self.cell, self.figure = "", None, None
        self.feed(path.read_text(encoding="utf-8"))
        self.text = joined(self.text)
        self.figures = [(kind, joined(text)) for kind, text in self.figures]
        self.tables = {
            name: [list(map(joined, row)) for row in rows] for name, rows in self.tables.items()
        }

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(attrs.get("id") or attrs["class"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = self.rows[-1]
        elif tag == "figure":
            self.figure = [attrs["class"], ""]
            self.figures.append(self.figure)
        self.sources += [attrs[name] for name in ("src", "href") if name in attrs]

    def handle_data(self, data):
        self.text += data
        if self.cell is not None:
            self.cell[-1] += data
        if self.figure is not None:
            self.figure[1] += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None
        elif tag == "figure":
            self.figure = None


def joined(text: str) -> str:
    """With single spaces."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def tested(trained, tmp_path_factory):
    """A copy of the trained run with two tests and a sweep: its output folder."""
    data, output, path = trained
    root = tmp_path_factory.mktemp("report") / "output"
    shutil.copytree(output / "tiny", root / "tiny")
    path = root / "tiny" / "checkpoints" / path.name
    common = ["--ckpt_path", path, "--data_dir", data, "--output_dir", root / "result",
              "--device", "cpu", "--wandb", "disabled", "--num_inference_steps", 5]  # fmt: skip
    for more in (["--scheduler", "ddpm", "--num_seeds", 2, "--num_fd_samples", 4],
                 ["--scheduler", "ddim", "--num_fd_samples", 0]):  # fmt: skip
        test.main([str(a) for a in [*common, *more]])
    sweep = ["--scale_max", 2, "--scale_step", 1, "--num_seeds", 2, "--num_fd_samples", 4]
    guidance_scale.main([str(a) for a in [*common, *sweep]])
    return root


@pytest.fixture(scope="module")
def page(tested):
    """The report of it."""
    return read(tested)


@pytest.fixture
def copy(tested, tmp_path, monkeypatch):
    """The same, to damage; its charts are left out, which take long."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **how: file.write(b"<svg/>"))
    shutil.copytree(tested, tmp_path / "output")
    return tmp_path / "output"


def read(output: Path, *more) -> Page:
    argv = ["--run_name", "tiny", "--output_dir", output, *more]
    return Page(report.main([str(a) for a in argv]))


def the(output: Path, pattern: str) -> Path:
    (path,) = (output / "result" / "tiny").glob(pattern)
    return path


def load(output: Path, pattern: str) -> dict:
    return json.loads(the(output, pattern).read_text())


def change(output: Path, pattern: str, **values) -> None:
    path = the(output, pattern)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flat(found: dict) -> str:
    return str(Interval(**found))


def test_its_figures_are_those_of_the_json_files(tested, page):
    of = load(tested, "ddpm5*/accuracies.json")  # of more seeds than the other
    head, *rows = page.tables["figures"]
    assert head == ["figure", "test", "new_test"]
    figures = {name: values for name, *values in rows}
    assert len(figures) == len(of["figures"]["test"]) == 10
    for name, key in (("course accuracy", "accuracy"), ("exact sets", "exact_sets"),
                      ("exact sets, nothing twice", "exact_once"),
                      ("extra, objects per picture", "extra"),
                      ("accuracy, objects in the scene: 2", "accuracy_2")):  # fmt: skip
        assert figures[name] == [flat(of["figures"][s][key]) for s in ("test", "new_test")]

    head, *rows = page.tables["tests"]
    assert [row[0] for row in rows] == ["DDPM, 5 steps, guidance 3", "DDIM, 5 steps, guidance 3"]
    for row, pattern in zip(rows, ("ddpm5*", "ddim5*"), strict=True):
        of = load(tested, f"{pattern}/accuracies.json")
        assert row[1:3] == [f"{of['evaluations']:g}", str(of["num_seeds"])]
        assert of["evaluations"] == 10
        assert row[3:9] == [
            flat(of["figures"][split][figure])
            for figure in ("accuracy", "exact_sets", "exact_once") for split in ("test", "new_test")
        ]  # fmt: skip
        distance = flat(of["frechet_distance"]) + "4 pictures" if "frechet_distance" in of else ""
        assert row[9].replace(" 4 pictures", "4 pictures") == distance

    of = load(tested, "guidance_scale/*/sweep.json")
    head, *rows = page.tables["narrow sweep"]
    assert [row[0] for row in rows] == ["1", "2"]
    for shown, row in zip(rows, of["rows"], strict=True):
        assert shown[head.index("new_test accuracy")] == flat(row["new_test"]["accuracy"])
        assert shown[head.index("mean exact sets")] == flat(row["mean"]["exact_sets"])
        assert shown[head.index("Frechet distance")] == flat(row["frechet_distance"])
    assert f"Best by exact sets: {of['best']['exact_sets']['scale']:g}." in page.text


def test_pictures_are_framed_and_captioned_as_the_judge_sees_them(tested, page):
    of = load(tested, "ddpm5*/accuracies.json")
    scenes = [figure for figure in page.figures if figure[0].startswith("scene")][:8]
    asked, seen = (of[key]["test"] + of[key]["new_test"] for key in ("asked", "seen"))
    exact = of["records"]["test"][0]["exact"] + of["records"]["new_test"][0]["exact"]
    for (kind, caption), wanted, found, right in zip(scenes, asked, seen, exact, strict=True):
        assert bool(right) == (sorted(wanted) == sorted(found))
        text = ", ".join(wanted) + ("" if right else f" seen: {', '.join(found) or 'nothing'}")
        assert (kind, caption) == ("scene" if right else "scene wrong", text)
    assert not all(exact)


def test_it_is_one_file_with_everything_in_it(tested, page):
    # 8 scenes, 2 x 4 compared, 2 previews, curves, confusion, samplers, sweep, nearest; the tiny
    # world's objects are the real ones, so there is a way from noise, too.
    assert len(page.sources) == 8 + 8 + 2 + 6
    assert all(source.startswith("data:image/") for source in page.sources)
    assert not page.tags & {"script", "link", "iframe"}
    html = (tested / "tiny" / "report.html").read_text()
    assert "url(" not in html and "@import" not in html and "@page" in html


def test_what_was_trained_and_how_it_was_made(tested, page):
    settings = {row[0]: row[1:] for row in page.tables["settings"]}
    assert settings["--block_out_channels"] == ["16 32", "128 128 256 256 512 512"]
    assert settings["--batch_size"] == ["4", "64"] and "--run_name" not in settings
    assert page.tables["stages"][1] == ["conv_in Conv2d", "3 x 16 x 16", "16 x 16 x 16"]
    start = json.loads((tested / "tiny" / "metrics.jsonl").read_text().splitlines()[0])
    assert start["command"].startswith("python src/train.py --data_dir")
    assert (start["total_steps"], start["num_pictures"]) == (12, 12)
    assert "Trained for 12 steps of 4 pictures, 4 epochs." in page.text
    assert "In training" not in page.text
    for made in (start, *(load(tested, f"{name}/accuracies.json")["made_by"][0]
                          for name in ("ddpm5*", "ddim5*")),
                 load(tested, "guidance_scale/*/sweep.json")["made_by"][0]):  # fmt: skip
        for key in ("command", "device", "torch", "python", "diffusers", "commit"):
            assert made[key] in page.text
    assert "seeds: 0, 1; judge: trained on data; checkpoint of step 12" in page.text


def test_in_chinese_the_figures_are_the_same(copy, page):
    english, chinese = page, read(copy, "--language", "zh-TW")
    assert 'lang="zh-Hant-TW"' in (copy / "tiny" / "report.zh-TW.html").read_text()
    for name in ("figures", "narrow sweep"):
        values = [[row[1:] for row in page.tables[name][1:]] for page in (english, chinese)]
        assert values[0] == values[1]
    assert chinese.tables["figures"][1][0] == "課程準確率"
    assert "引導強度" in chinese.text and "What was trained" not in chinese.text


def test_every_text_is_translated_and_no_translation_is_left_over():
    found = environment("en").extract_translations(TEMPLATE.read_text(encoding="utf-8"))
    texts = {text if isinstance(text, str) else text[0] for _, _, text in found}
    words = json.loads(TEMPLATE.with_name("zh-TW.json").read_text(encoding="utf-8"))
    assert texts == words.keys()
    for text, word in words.items():  # with the same values in them
        names = [{part.split(")")[0] for part in t.split("%(")[1:]} for t in (text, word)]
        assert names[0] == names[1], text


def test_what_is_missing_is_named_with_its_command(trained, tmp_path):
    _, output, _ = trained
    shutil.copytree(output / "tiny", tmp_path / "tiny")
    log = tmp_path / "tiny" / "metrics.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:5]) + '\n3\n{"step": "x"}\n{"step": 9, "lo')
    (tmp_path / "tiny" / "samples" / "epoch_2.png").unlink()
    page = read(tmp_path)
    checkpoint = tmp_path / "tiny" / "checkpoints" / "model_epoch_4.pth"
    for command in (f"src/test.py --ckpt_path {checkpoint}", "--scheduler dpmpp",
                    f"src/guidance_scale.py --ckpt_path {checkpoint}", "--num_fd_samples 2048",
                    f"src/train.py --resume {tmp_path / 'tiny'}"):  # fmt: skip
        assert command in page.text
    assert "In training, or interrupted: step 4 of 12." in page.text
    assert "No preview yet." in page.text and "figures" not in page.tables
    log.unlink()
    shutil.rmtree(tmp_path / "tiny" / "checkpoints")
    page = read(tmp_path)
    assert "nothing was logged yet" in page.text and "src/train.py --run_name tiny" in page.text


def test_damaged_results_are_left_out_or_named(copy, capsys):
    folder = the(copy, "ddpm5*")
    picture = folder / "images" / "test" / "2.png"
    picture.write_bytes(picture.read_bytes()[:60])
    (folder / "images" / "new_test" / "0.png").unlink()
    (folder / "nearest.png").write_bytes(b"")
    (copy / "tiny" / "samples" / "epoch_2.png").write_bytes(b"no picture")
    change(copy, "ddpm5*/accuracies.json", seen=None)
    page = read(copy)
    assert [f[1] for f in page.figures if "missing or damaged" in f[1]][0].startswith("missing")
    assert "samples/epoch_2.png" in page.text and "was not written down" in page.text
    again = load(copy, "ddpm5*/accuracies.json")["made_by"][0]["command"]
    assert f"rm -rf {folder}/images {folder}/denoising.png {again}" in page.text
    capsys.readouterr()
    the(copy, "ddim5*/accuracies.json").write_text('{"figures": ')
    change(copy, "ddpm5*/accuracies.json", figures={"test": 3})
    change(copy, "guidance_scale/*/sweep.json", rows=[{"guidance_scale": 1}])
    page = read(copy)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("warning: left out: ") for line in errors)
    assert "Not tested yet." in page.text and "No sweep of the guidance scale yet." in page.text


def test_figures_that_older_results_lack_are_a_dash(copy, capsys):
    figures = load(copy, "ddim5*/accuracies.json")["figures"]
    for of in figures.values():
        del of["exact_once"]
    change(copy, "ddim5*/accuracies.json", figures=figures)
    _, *rows = read(copy).tables["tests"]
    (row,) = [row for row in rows if row[0].startswith("DDIM")]
    assert row[7:9] == ["-", "-"] and "-" not in row[3:7]
    assert "left out" not in capsys.readouterr().err


def test_results_of_another_checkpoint_are_marked(copy):
    (copy / "tiny" / "checkpoints" / "model_epoch_4.pth").unlink()
    page = read(copy)
    checkpoint = load(copy, "ddpm5*/accuracies.json")["checkpoint"]
    assert f"not of the run's latest checkpoint but of {checkpoint} (step 12)" in page.text
    assert "model_epoch_2.pth" in page.text and "another checkpoint" in page.tables["tests"][1][0]
    # Of the one that is asked for, they are.
    page = read(copy, "--ckpt_path", copy / "tiny" / "checkpoints" / "model_epoch_2.pth")
    assert "Trained for 6 steps" in page.text


def test_the_test_that_is_shown_can_be_named(copy):
    folder = the(copy, "ddim5*")
    page = read(copy, "--test", folder.name)
    assert page.tables["tests"][1][0] == "DDIM, 5 steps, guidance 3"
    message = error_of(report.main, ["--run_name", "tiny", "--output_dir", copy, "--test", "x"])
    assert "--test x" in message and folder.name in message


def test_text_of_files_is_text_in_the_page(copy):
    evil = '<script>alert("1")</script>'
    asked = {split: [[evil]] * 4 for split in ("test", "new_test")}
    change(copy, "ddpm5*/accuracies.json", asked=asked, seen=asked, judge=evil)
    (copy / "tiny" / "samples" / "epoch_2.png").unlink()
    log = copy / "tiny" / "metrics.jsonl"
    log.write_text(log.read_text().replace("samples/epoch_2.png", "<script>"))
    page = read(copy)
    assert "script" not in page.tags
    assert page.text.count(evil) >= 5


def test_bad_input_is_one_line(trained, tested, tmp_path, monkeypatch):
    _, output, _ = trained
    run = ["--run_name", "tiny", "--output_dir"]
    message = error_of(report.main, ["--output_dir", tested])
    assert "--run_name ddpm-cfg-v1: no such run" in message and "there: tiny" in message
    (tmp_path / "tiny").mkdir()
    assert "python src/train.py --run_name tiny trains it" in error_of(
        report.main, [*run, tmp_path]
    )
    for content in ("{", '{"lr": "x"}', "[]"):
        (tmp_path / "tiny" / "config.json").write_text(content)
        assert "config.json" in error_of(report.main, [*run, tmp_path])
    assert "ends in .html" in error_of(report.main, [*run, output, "--out", tmp_path / "a.pth"])
    (tmp_path / "file").touch()
    message = error_of(report.main, [*run, output, "--out", tmp_path / "file" / "a.html"])
    assert "another with --out" in message
    assert "none.pth: not found" in error_of(report.main, ["--ckpt_path", tmp_path / "none.pth"])
    monkeypatch.setattr(report, "BROWSERS", ("no-such-browser",))
    out = tmp_path / "a.html"
    assert "no Chromium here" in error_of(report.main, [*run, output, "--pdf", "--out", out])
    assert not out.exists()


def test_it_is_printed(tested, tmp_path, monkeypatch):
    """By a stand-in for Chromium, which fails the second time."""
    browser = tmp_path / "browser"
    browser.write_text(
        '#!/bin/sh\nfor a in "$@"; do case $a in --print-to-pdf=*) out=${a#*=};; esac; done\n'
        f'test -e {tmp_path}/used && {{ echo no screen >&2; exit 1; }}\n'
        f'touch {tmp_path}/used; echo %PDF of $a > "$out"\n'
    )  # fmt: skip
    browser.chmod(0o755)
    monkeypatch.setattr(report, "BROWSERS", (str(browser),))
    monkeypatch.setattr(report, "page", lambda *args: "<p>a page")
    out = tmp_path / "a b.html"
    argv = ["--run_name", "tiny", "--output_dir", tested, "--pdf", "--out", out]
    report.main([str(a) for a in argv])
    printed = (tmp_path / "a b.pdf").read_text()
    assert printed == f"%PDF of {out.as_uri()}\n"
    assert "no screen" in error_of(report.main, argv)
    assert (tmp_path / "a b.pdf").read_text() == printed and out.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"a b.html", "a b.pdf", "browser", "used"}


@pytest.mark.skipif(not any(map(shutil.which, report.BROWSERS)), reason="no Chromium")
def test_chromium_prints_it(tested, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "page", lambda *args: "<p>a page")
    read(tested, "--pdf", "--out", tmp_path / "a.html")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_an_interrupted_test_keeps_the_commands_that_made_it(tested, tmp_path):
    """Draws that are there are their own command's, whoever sums them up later."""
    shutil.copytree(tested / "result", tmp_path / "result")
    made = load(tested, "ddpm5*/accuracies.json")["made_by"]
    argv = made[0]["command"].replace(str(tested / "result"), str(tmp_path / "result")).split()[2:]
    folder = the(tmp_path, "ddpm5*")
    lines = (folder / "draws.jsonl").read_text().splitlines()
    (folder / "draws.jsonl").write_text("\n".join(lines[:-1]))
    found = test.main(argv)
    assert len(made) == 1 and found["made_by"][0] == made[0]
    assert [by["command"].count(str(tmp_path)) for by in found["made_by"]] == [0, 1]
    assert found["seen"] == load(tested, "ddpm5*/accuracies.json")["seen"]


@pytest.mark.parametrize("flags", [["--pretrained"], ["--quick"], []])
def test_the_demo_ends_with_one(flags, tmp_path, monkeypatch):
    """All its stages left out."""
    seen = []

    def reported(argv):
        seen.append(parse_args(report.ReportConfig, argv))
        raise StopIteration

    monkeypatch.setattr(demo, "stage", lambda *args, **kwargs: None)
    monkeypatch.setattr(demo, "latest_checkpoint", lambda run_dir: run_dir / "x.pth")
    monkeypatch.setattr(test, "main", lambda argv: None)
    monkeypatch.setattr(report, "main", reported)
    with pytest.raises(StopIteration):
        demo.main([*flags, "--output_dir", str(tmp_path / "a b")])
    (config,) = seen
    assert config.output_dir == tmp_path / "a b"
    if "--pretrained" in flags:
        assert config.ckpt_path == PRETRAINED
    else:
        assert config.run_name == ("demo-quick" if flags else "demo")
