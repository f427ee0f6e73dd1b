"""An object added to a picture, by the command and for the page."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import error_of
from PIL import Image

import test
from judging.bench import open_bench
from judging.drawing import plan
from judging.figures import to_image, to_png
from judging.insertion import add, objects_in, open_picture
from runtime.settings import DataConfig, SamplingConfig, UserError

DDIM = SamplingConfig(scheduler="ddim", num_inference_steps=5)


@pytest.fixture(autouse=True)
def empty_ground(monkeypatch):
    """Nothing stands in the tiny world's pictures, which are of noise."""
    monkeypatch.setattr("diffusion.insertion.BUSY", 3)


@pytest.fixture(scope="module")
def bench(trained):
    data, _, path = trained
    return open_bench(path, DataConfig(data_dir=data), "cpu")


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


@pytest.mark.parametrize("guided", [0, 1])
def test_the_command_writes_what_is_computed(trained, bench, picture, tmp_path, guided):
    data, _, path = trained
    sampling = replace(DDIM, classifier_guidance_scale=guided)
    image = open_picture(picture, 16)
    drawn = add(bench, sampling, picture, image, ["red cube"], ["gray cube", "blue cube"], 7)
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
            "--scheduler", "ddim", "--num_inference_steps", 5, "--seed", 7, "--to", picture,
            "--add", "gray cube, blue cube", "--prompt", "red cube",
            "--classifier_guidance_scale", guided]  # fmt: skip
    written = test.main([str(a) for a in argv])
    assert written.name == f"{drawn.name}.png"
    assert drawn.name.startswith("scene_and_gray-cube_blue-cube-") and drawn.name.endswith("_seed7")
    assert written.read_bytes() == to_png(to_image(drawn.image))
    assert json.loads(written.with_suffix(".json").read_text()) == drawn.report
    assert drawn.report["judge"].endswith("guided by the judge") is bool(guided)
    assert 0 < drawn.share_drawn_anew < 0.5 and drawn.change_outside == 0
    for how, seed in ((sampling, 8), (replace(DDIM, classifier_guidance_scale=2), 7)):
        other = add(bench, how, picture, image, ["red cube"], ["gray cube", "blue cube"], seed)
        assert not torch.equal(other.image, drawn.image)


def test_more_can_be_added_to_what_was_written(trained, picture, tmp_path, capsys):
    data, _, path = trained
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
            "--scheduler", "ddim", "--num_inference_steps", 5]  # fmt: skip
    first = test.main([str(a) for a in [*argv, "--add", "gray cube", "--prompt", "red cube",
                                        "--to", picture]])  # fmt: skip
    second = test.main([str(a) for a in [*argv, "--add", "blue cube", "--to", first]])
    assert "the picture shows: red cube, gray cube (its JSON)" in capsys.readouterr().out
    written = json.loads(second.with_suffix(".json").read_text())
    assert written["shows"] == ["red cube", "gray cube"] and written["added"] == ["blue cube"]
    # Another picture of the same name, or the same said to show something else: other files.
    other = tmp_path / "other" / picture.name
    other.parent.mkdir()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(other)
    for scene, shows in ((other, "red cube"), (picture, "blue sphere")):
        again = [*argv, "--add", "gray cube", "--prompt", shows, "--to", scene]
        assert test.main([str(a) for a in again]) != first
    first.with_suffix(".json").write_text('{"camera": "mine"}')
    message = error_of(test.main, [*argv, "--add", "blue cube", "--to", first])
    assert "describes no picture" in message and "--prompt" in message


def test_what_became_of_it_is_said(bench, picture):
    drawn = add(bench, DDIM, picture, open_picture(picture, 16), ["red cube"], ["gray cube"], 7)
    for before, seen, failures in (
        (("red cube",), ("red cube", "gray cube", "blue cube"), {}),
        (("red cube",), ("red cube",), {"not added": ["gray cube"]}),
        (("red cube",), ("gray cube",), {"no longer there": ["red cube"]}),
        (("blue cube",), (), {"not there, as before": ["red cube"], "not added": ["gray cube"]}),
    ):
        assert replace(drawn, seen_before=before, seen=seen).failures == failures
    unjudged = add(replace(bench, judge=None), DDIM, picture, drawn.before, ["red cube"],
                   ["gray cube"], 7)  # fmt: skip
    assert not unjudged.failures and "seen" not in unjudged.report
    changed = replace(drawn, image=torch.where(drawn.free == 0, -drawn.before, drawn.image))
    assert "no value changed by more than 255 of 255" in changed.outside


def test_what_cannot_be_added_ends_in_a_sentence(bench, picture):
    image = open_picture(picture, 16)
    for shows, added, seed, words in (
        (["red cube"], ["red cube"], 0, "--add 'red cube': 'red cube' is in the picture already"),
        (["red cube"], ["red ball"], 0, "unknown object 'red ball'"),
        (["red cube"], ["gray cube"], -1, "seed -1"),
    ):
        with pytest.raises(UserError, match=words):
            add(bench, DDIM, picture, image, shows, added, seed)


def test_who_says_what_a_picture_shows(bench, picture, monkeypatch):
    image, drawing = open_picture(picture, 16), plan(bench, ["red cube"], 0, DDIM)
    scores = torch.zeros(1, 24)
    monkeypatch.setattr(type(bench.judge), "scores", lambda *_: scores)
    assert objects_in(bench, picture, image, "gray cube", drawing.objects) == (["gray cube"], "")
    assert objects_in(bench, picture, image, None, drawing.objects) == (["red cube"], "its JSON")
    with pytest.raises(UserError, match="scene.png: the judge sees no object in it; fill in --x"):
        objects_in(bench, picture, image, None, None, "--x")
    scores[0, bench.checkpoint.objects["blue sphere"]] = 1
    found, who = objects_in(bench, picture, image, None, None)
    assert found == ["blue sphere"] and who.startswith("judge: ")
    with pytest.raises(UserError, match="no JSON beside it and no judge; fill in --prompt"):
        objects_in(replace(bench, judge=None), picture, image, None, None)
