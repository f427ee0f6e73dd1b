"""What the page shows, without a browser."""

import base64
import json
import re
from dataclasses import replace

import gradio as gr
import pytest
import torch
from conftest import error_of

import app
import test
from judging.bench import open_bench
from judging.drawing import Picture, plan
from judging.evaluator import judge_scores
from network.checkpoint import PRETRAINED
from page.cards import cards, picker, summary
from page.handlers import Handlers, Session
from page.results import last_results
from page.tabs import left_side
from runtime.settings import DataConfig, SamplingConfig, to_dict

NAMES = ["red sphere", "cyan cube"]
DDIM = SamplingConfig(scheduler="ddim", num_inference_steps=5)
CONTROLS = (", ".join(NAMES), "", 3, 2, DDIM, "ddim", 5, 3.0, 1, "joint")


@pytest.fixture(scope="module")
def handlers(trained):
    data, _, path = trained
    return Handlers(open_bench(path, DataConfig(data_dir=data), "cpu"))


def picture_of(handlers, found, too_many=0, **more):
    """A picture of NAMES in which the judge finds these objects, so many of a color too many."""
    index = handlers.objects
    labels, scores = torch.zeros(1, 24), torch.full((1, 24), 0.02)
    labels[0, [index[name] for name in NAMES]] = 1
    scores[0, [index[name] for name in found]] = 0.97
    found = judge_scores(scores, labels, 0.5, index)
    found = replace(found, too_many=torch.tensor([too_many]))
    drawing = plan(handlers.bench, NAMES, 3, DDIM)
    return Picture(drawing, torch.zeros(3, 16, 16), found, **more)


def files_of(html):
    """The files to take away, by their names."""
    found = re.findall(r'download="(.*?)" href="data:.*?;base64,(.*?)"', html)
    return {name: base64.b64decode(content) for name, content in found}


def test_right_and_wrong_are_marked(handlers):
    html = cards([picture_of(handlers, ["cyan cube", "gray cube"])], handlers.objects)
    assert 'class="card wrong"' in html and "1 missing, 1 extra" in html
    rows = re.findall(r'<li class="(\w+)".*?</i>(.*?)<b>(.*?)</b>', html)
    assert rows == [("right", "cyan cube", "0.97"), ("missing", "red sphere", "0.02"),
                    ("extra", "gray cube", "0.97")]  # fmt: skip
    assert "nearest" not in html
    html = cards([picture_of(handlers, NAMES, too_many=2)], handlers.objects)
    assert 'class="card wrong"' in html and "<b>2 there twice</b>" in html
    near = {"nearest": torch.ones(3, 64, 64), "rms": 7.25, "tries": 3}
    picture = picture_of(handlers, NAMES, **near)
    html = cards([picture], handlers.objects)
    assert 'class="card right"' in html and "right after 3 draws" in html
    assert "nearest training picture, 7.2 of 255 levels away" in html
    assert "<b>1 of 1</b> right, after 3 draws. Chosen by the judge" in summary([picture])


def test_files_come_with_the_last_picture(handlers):
    picture = picture_of(handlers, NAMES)
    assert "download" not in cards([picture, None], handlers.objects)
    files = files_of(cards([picture], handlers.objects))
    assert list(files) == [
        f"red-sphere_cyan-cube_seed3{end}" for end in (".png", "_512.png", ".json")
    ]
    described = json.loads(files["red-sphere_cyan-cube_seed3.json"])
    assert described == to_dict(picture.drawing)


def test_unknown_objects_are_chosen_by_their_names():
    html = picker({"red cube": 0, "<b> 'ball'": 1})
    assert ">&lt;b&gt; &#x27;ball&#x27;</button>" in html and "<b>" not in html
    assert 'data-name="red cube"' in html and ">red cube<" not in html


def test_bad_input_ends_in_a_sentence(handlers):
    for change, words in (
        ({0: "red ball"}, "Scene &#x27;red ball&#x27;: unknown object"),
        ({0: ""}, "an empty name"),
        ({1: "red ball"}, "Without &#x27;red ball&#x27;: unknown object"),
        ({1: ","}, "Without &#x27;,&#x27;: an empty name"),
        ({1: "gray cube, cyan cube"}, "&#x27;cyan cube&#x27; is asked for and must not come"),
        ({1: "gray cube", 7: 0}, "Without &#x27;gray cube&#x27;: does nothing with guidance 0"),
        ({2: None}, "Seed: is empty"),
        ({2: -5}, "seed -5"),
        ({6: 7}, "Steps 7: does not divide the 20 trained timesteps"),
        ({5: "dpmpp", 8: 2}, "Repeats 2: dpmpp"),
        ({7: None}, "Guidance None"),
        ({9: "all"}, "Objects asked for &#x27;all&#x27;"),
    ):
        controls = [change.get(i, value) for i, value in enumerate(CONTROLS)]
        for handler in (handlers.draw, handlers.keep):
            ((_, text, _),) = handler(Session(), *controls)
            assert 'role="alert"' in text and words.lower() in text.lower()
    ((_, text, _),) = handlers.compare("samplers", [], [], *CONTROLS)
    assert "Choose at least one" in text


def test_a_bad_file_ends_in_a_sentence(handlers, tmp_path):
    path = tmp_path / "picture.json"
    path.write_text("{")
    ((_, text, *_),) = handlers.open_file(str(path))
    assert "Picture.json: not valid JSON" in text and str(tmp_path) not in text


def test_a_file_sets_the_controls_and_what_has_none(handlers, tmp_path):
    sampling = SamplingConfig(scheduler="ddim", num_inference_steps=5, eta=0.5, guidance_scale=-20)
    sampling = replace(sampling, compose="both")
    drawing = plan(handlers.bench, NAMES, 9, sampling, ["gray cube"])
    (tmp_path / "p.json").write_text(json.dumps(to_dict(drawing)))
    *_, (_, text, session, names, *controls) = handlers.open_file(str(tmp_path / "p.json"))
    assert "guidance -20, eta 0.5, objects asked for both ways, without gray cube" in text
    assert session.drawings == (drawing,) and names == NAMES
    values = [getattr(control, "value", control) for control in controls]
    assert handlers.drawings(*values) == [drawing]
    assert controls[7].minimum == -20


def test_what_must_not_come_and_how_objects_are_asked_for(trained, handlers, tmp_path, monkeypatch):
    """Every way of drawing heeds both, with the bytes of the command."""
    data, _, path = trained
    controls = [*CONTROLS[:1], "gray cube, blue cube", *CONTROLS[2:-1], "objects"]
    *_, (html, text, session) = handlers.draw(Session(), *controls)
    assert "guidance 3, objects asked for one by one, without gray cube, blue cube." in text
    argv = [*f"--ckpt_path {path} --data_dir {data} --output_dir {tmp_path} --device cpu "
            "--scheduler ddim --num_inference_steps 5 --compose objects --seed 4".split(),
            "--prompt", ", ".join(NAMES), "--without", "gray cube, blue cube"]  # fmt: skip
    drawn = test.main(argv)
    files = files_of(html)
    for file in (drawn, drawn.with_suffix(".json")):
        assert files[file.name] == file.read_bytes()
    monkeypatch.setattr("judging.drawing.TRIES", 2)
    for handler, *more in (
        (handlers.keep, session), (handlers.compare, "guidance scales", [1, 2], []),
        (handlers.compare, "samplers", [], ["ddim", "unipc"]),
    ):  # fmt: skip
        *_, (_, text, session) = handler(*more, *controls)
        assert text.endswith(", without gray cube, blue cube.")
        for drawing in session.drawings:
            assert drawing.without == ("gray cube", "blue cube")
            assert drawing.sampling.compose == "objects"


def test_what_must_not_come_is_one_too_many(handlers, monkeypatch):
    scores = torch.full((1, 24), 0.02)
    scores[0, [handlers.objects[name] for name in (*NAMES, "gray cube")]] = 0.97
    monkeypatch.setattr(type(handlers.bench.judge), "scores", lambda *_: scores)
    *_, (html, _, _) = handlers.draw(Session(), CONTROLS[0], "gray cube", *CONTROLS[2:])
    assert "1 extra" in html and '<li class="extra"' in html and "missing" not in html


def test_side_by_side_begins_with_the_same_noise(handlers):
    frames = [*handlers.compare("guidance scales", [1, 2.5], [], *CONTROLS)]
    html, _, session = frames[-1]
    assert re.findall("<h3>(.*?)</h3>", html) == ["guidance 1", "guidance 2.5"]
    assert {d.seed for d in session.drawings} == {3}
    controls = [*CONTROLS[:5], "ddpm", 7, 3.0, 1, "joint"]
    *_, (html, _, _) = handlers.compare("samplers", [], ["ddpm", "ddim"], *controls)
    assert re.findall("<h3>(.*?)</h3>", html) == ["ddpm, 5 steps", "ddim, 5 steps"]


def test_keeping_what_is_right_begins_with_what_is_there(handlers, monkeypatch):
    *_, (_, _, session) = handlers.draw(Session(), *CONTROLS)
    monkeypatch.setattr("judging.drawing.TRIES", 2)
    real, drawn = handlers.bench.watch, []

    def watch(*args):
        drawn.append(args)
        return real(*args)

    monkeypatch.setattr(type(handlers.bench), "watch", lambda _, *args: watch(*args))
    wrong = sum(not picture.right for picture in session.shown)
    [*handlers.keep(session, *CONTROLS)]
    assert len(drawn) == wrong
    drawn.clear()
    [*handlers.keep(session, *CONTROLS[:2], 50, *CONTROLS[3:])]  # another seed: others are meant
    assert len(drawn) >= 2


def test_what_the_page_begins_with(handlers):
    """Guidance 2, where fewer objects come twice than with more; of 20 timesteps 10, not 12."""
    with gr.Blocks():
        controls = left_side(handlers)
    assert (controls.steps.value, controls.guidance.value, controls.repeats.value) == (10, 2, 1)
    assert controls.base.value.guidance_scale == 2


@pytest.fixture
def empty_ground(monkeypatch):
    """Nothing stands in the tiny world's pictures, which are of noise."""
    monkeypatch.setattr("diffusion.insertion.BUSY", 3)


def test_an_object_is_added_as_the_command_does(trained, handlers, tmp_path, empty_ground):
    """To a picture of the Draw tab, and to a file of which the judge says what it shows."""
    data, _, path = trained
    *_, (html, _, session) = handlers.draw(Session(), *CONTROLS)
    file = tmp_path / "red-sphere_cyan-cube_seed4.png"
    for name, content in files_of(html).items():
        (tmp_path / name).write_bytes(content)
    more = [replace(DDIM, eta=0.5), "ddim", 4, 2.0, 1, "both"]
    argv = [*f"--ckpt_path {path} --data_dir {data} --output_dir {tmp_path} --device cpu "
            "--scheduler ddim --num_inference_steps 4 --guidance_scale 2 --compose both --eta 0.5 "
            "--seed 8".split(), "--add", "gray cube, blue cube", "--to"]  # fmt: skip
    plain = tmp_path / "plain.png"
    plain.write_bytes(file.read_bytes())
    for shown, number, upload, there in (
        (file, 2, None, ""), (plain, None, str(plain), "red cube, gray sphere"),
    ):  # fmt: skip
        asked = session, number, upload, there, "gray cube, blue cube", 8, *more
        first, (html, text, _) = handlers.add(*asked)
        assert "Adding gray cube, blue cube" in first[1] and "download" not in first[0]
        written = test.main([*argv, str(shown), *(["--prompt", there] if there else [])])
        files, described = files_of(html), json.loads(written.with_suffix(".json").read_text())
        assert files[written.name] == written.read_bytes()
        assert json.loads(files[f"{written.stem}.json"]) == described | {"picture": shown.name}
        assert described["shows"] == (there.split(", ") if there else NAMES)
        assert re.findall("<h3>(.*?)</h3>", html) == ["Before", "Drawn anew", "After"]
        before = re.search(r'base64,(.*?)" alt="before"', html)[1]
        assert base64.b64decode(before) == file.read_bytes()
        assert "no value changed by more than 0 of 255" in text
        assert [*handlers.show_picture(*asked[:3])][0][0].count(before) == 1


def test_whether_it_was_added_is_said(handlers, empty_ground, monkeypatch):
    *_, (_, _, session) = handlers.draw(Session(), *CONTROLS)
    sees = {}
    monkeypatch.setattr(type(handlers.bench.judge), "scores", lambda *_: sees["scores"])
    monkeypatch.setattr("judging.evaluator.too_many", lambda *_: torch.tensor([sees["twice"] + 1]))
    monkeypatch.setattr("judging.insertion.too_many", lambda *_: torch.tensor([1]))  # before
    added = "<b>Added</b>: gray cube; what was there still is"
    for twice, seen, words, kinds in (
        (0, [*NAMES, "gray cube"], f"{added}. Outside", ["right"] * 3),
        (2, [*NAMES, "gray cube"],
         "<b>Of a color that should be there have come 2 too many</b>; Again", ["right"] * 3),
        (0, [*NAMES, "blue cube"], "<b>Not added: gray cube</b>; Again tries the next seed.",
         ["right", "right", "missing", "extra"]),
        (0, [NAMES[0], "gray cube"], "<b>Not there, as before: cyan cube</b>. Outside",
         ["right", "right", "missing"]),
    ):  # fmt: skip
        sees["scores"], sees["twice"] = torch.full((1, 24), 0.02), twice
        sees["scores"][0, [handlers.objects[name] for name in seen]] = 0.97
        *_, (html, text, _) = handlers.add(session, 1, None, "", "gray cube", 0, *CONTROLS[4:])
        assert text.startswith(words)
        assert re.findall('<li class="(.*?)"', html) == kinds
        assert ('class="card right"' in html) is (set(kinds) == {"right"} and not twice)


def test_what_cannot_be_added_ends_in_a_sentence(handlers, tmp_path):
    *_, (_, _, session) = handlers.draw(Session(), *CONTROLS)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for change, words in (
        ({1: 0}, "Picture 0: is not in the Draw tab"),
        ({1: 3}, "Picture 3: is not in the Draw tab"),
        ({0: Session(session.drawings, (None, None))}, "Picture 1: is not in the Draw tab"),
        ({1: None}, "Picture: is empty"),
        ({1: None, 2: str(broken)}, "Broken.png: not a readable picture"),
        ({3: "red ball"}, "What is there &#x27;red ball&#x27;: unknown object"),
        ({4: "red ball"}, "Add &#x27;red ball&#x27;: unknown object"),
        ({4: ""}, "an empty name"),
        (
            {4: "cyan cube"},
            "&#x27;cyan cube&#x27; is in the picture already; if it is not, fill in what",
        ),
        ({5: None}, "Seed: is empty"),
        ({5: -1}, "Seed -1"),
        ({8: 7}, "Steps 7: does not divide"),
    ):
        usual = [session, 1, None, "", "gray cube", 0, *CONTROLS[4:]]
        *_, (_, text, _) = handlers.add(*(change.get(i, value) for i, value in enumerate(usual)))
        assert 'role="alert"' in text and words in text and str(tmp_path) not in text
        assert "render_iclevr" not in text  # a remedy for training pictures


def test_results_or_the_command_that_makes_them(trained, handlers, tmp_path):
    data, _, path = trained
    config = DataConfig(data_dir=data)
    words, charts, sweep, _ = last_results(handlers.bench, path, config, tmp_path)
    flags = f"--ckpt_path {path} --data_dir {data} --output_dir {tmp_path} --scheduler dpmpp"
    assert f"python src/test.py {flags}" in words and not charts
    assert f"python src/guidance_scale.py {flags}" in sweep
    argv = [*flags.split(), "--device", "cpu", "--wandb", "disabled"]
    test.main(argv)
    words, charts, sweep, _ = last_results(handlers.bench, path, config, tmp_path)
    assert "exact_sets" in words and "dpmpp9-guidance3" in words
    assert re.findall('figure class="(.*?)"', charts) == [
        "test_grid", "new_test_grid", "confusion", "nearest", "denoising",
    ]  # fmt: skip
    assert "None yet" in sweep
    own = [tmp_path / f"{name}.json" for name in ("pairs", "a&b")]
    for file in own:
        file.write_text(json.dumps([["red cube", "gray cube"]]))
    test.main([*argv, "--conditions", *map(str, own)])
    _, charts, _, _ = last_results(handlers.bench, path, config, tmp_path)
    assert re.findall('figure class="(.*?)".*?<figcaption>(.*?)<', charts)[:3] == [
        ("own", "a&amp;b.json"), ("own", "pairs.json"),
        ("confusion", "what came instead of what was asked for"),
    ]  # fmt: skip
    of_pretrained = last_results(handlers.bench, PRETRAINED, DataConfig(), app.AppConfig.output_dir)
    assert "python src/test.py --scheduler dpmpp\n" in of_pretrained[0]


def test_a_port_that_is_taken(handlers, trained):
    import socket

    data, _, path = trained
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        argv = ["--ckpt_path", path, "--data_dir", data, "--device", "cpu", "--port", port]
        assert f"--port {port}: can't listen there" in error_of(app.serve, argv)
