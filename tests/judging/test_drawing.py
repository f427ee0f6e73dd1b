"""A picture, drawn, judged, and drawn again from its JSON."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import error_of

import test
from judging import drawing
from judging.bench import open_bench, with_reference
from judging.drawing import (
    Picture,
    check_origin,
    draw_all,
    plan,
    read_drawing,
    seen,
    until_right,
    with_steps,
)
from judging.evaluator import judge_scores
from judging.figures import to_image, to_png
from judging.insertion import described_objects
from judging.realism import nearest
from network.checkpoint import load_checkpoint, save_checkpoint
from runtime.settings import DataConfig, SamplingConfig, SchedulerConfig, UserError, to_dict

DDIM = SamplingConfig(scheduler="ddim", num_inference_steps=5)
NAMES = ["red sphere", "cyan cube"]


@pytest.fixture(scope="module")
def bench(trained):
    data, _, path = trained
    return open_bench(path, DataConfig(data_dir=data), "cpu")


def argv_of(trained, output, *more):
    data, _, path = trained
    return [str(a) for a in ["--ckpt_path", path, "--data_dir", data, "--output_dir", output,
                             "--device", "cpu", *more]]  # fmt: skip


def test_pictures_have_the_bytes_of_a_prompt_s(trained, bench, tmp_path):
    """Whatever is drawn beside them; and each comes again from its JSON, and only as told."""
    unwanted = next(name for name in bench.checkpoint.objects if name not in NAMES)
    drawings = [plan(bench, NAMES, 3, DDIM), plan(bench, NAMES, 4, DDIM, [unwanted])]
    frames = list(draw_all(bench, drawings))
    assert [type(what) for what in frames[7]] == [Picture, torch.Tensor]
    assert len({frame[1].sum().item() for frame in frames[7:13]}) == 6  # it changes at every step
    for picture in frames[-1]:
        ours = to_png(to_image(picture.image))
        flags = ["--scheduler", "ddim", "--num_inference_steps", 5, "--seed", picture.drawing.seed]
        flags += ["--without", unwanted] if picture.drawing.without else []
        argv = argv_of(trained, tmp_path / "prompt", "--prompt", ", ".join(NAMES), *flags)
        path = test.main(argv)
        assert path.read_bytes() == ours
        described = path.with_suffix(".json")
        assert json.loads(described.read_text()) == to_dict(picture.drawing)
        argv = argv_of(trained, tmp_path / "again", "--from_json", described)
        assert test.main(argv).read_bytes() == ours
        assert test.main([*argv, "--guidance_scale", "1"]).read_bytes() != ours


def test_a_json_of_something_else_is_refused(trained, bench, tmp_path):
    _, _, path = trained
    file, good = tmp_path / "picture.json", to_dict(plan(bench, NAMES, 0, DDIM))

    before = good | {"format": "iclevr-picture-1"}

    def read(content):
        file.write_text(json.dumps(content))
        return check_origin(read_drawing(file), bench, "picture.json")

    for bad, words in (
        ([], "describes no picture"),
        (good | {"format": "x"}, "format 'x'"),
        (good | {"seed": -1}, "seed -1"),
        (good | {"checkpoint": "0" * 40}, "another network, whose file has git's hash 0000000000"),
        (good | {"guide": "0" * 40}, "another judge"),
        (good | {"objects": ["red ball"]}, "unknown object 'red ball'"),
        (before | {"without": ["gray cube"]}, "guided away from 'gray cube' in another way"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            read(bad)
    assert "drawn on cuda None, here on cpu" in read(good | {"arithmetic": "cuda None"})
    assert not read(good) and not read(before)
    assert read_drawing(file) == plan(bench, NAMES, 0, DDIM)  # as if it were new
    file.write_text(json.dumps(before | {"without": ["gray cube"]}))
    assert described_objects(file) == NAMES  # what it shows is no matter of how it was drawn
    file.write_text(json.dumps(good))
    checkpoint = load_checkpoint(path)
    save_checkpoint(tmp_path / "c.pth", replace(checkpoint, step=checkpoint.step + 1))
    argv = argv_of(trained, tmp_path, "--from_json", file, "--ckpt_path", tmp_path / "c.pth")
    assert "name it with --ckpt_path" in error_of(test.main, argv)


def judged(bench, asked, found, too_many=0):
    """A picture in which the judge finds these objects, and so many of a color too many."""
    index = bench.checkpoint.objects
    labels, scores = torch.zeros(1, 24), torch.full((1, 24), 0.02)
    labels[0, [index[name] for name in asked]] = 1
    scores[0, [index[name] for name in found]] = 0.97
    found = judge_scores(scores, labels, 0.5, index)
    found = replace(found, too_many=torch.tensor([too_many]))
    return Picture(plan(bench, asked, 0, DDIM), torch.zeros(3, 16, 16), found)


def test_what_the_judge_sees_is_named_with_scores(bench):
    picture = judged(bench, NAMES, ["cyan cube", "gray cube"])
    found = [
        (name, round(score, 2), kind) for name, score, kind in seen(picture, bench.guide.objects)
    ]
    assert found == [("cyan cube", 0.97, "right"), ("red sphere", 0.02, "missing"),
                     ("gray cube", 0.97, "extra")]  # fmt: skip
    assert not picture.right and judged(bench, NAMES, NAMES).right
    assert not judged(bench, NAMES, NAMES, too_many=1).right  # one stands there twice


def test_what_is_right_is_kept_and_the_rest_drawn_again(bench, monkeypatch):
    """The second picture comes right with seed 7, the third never does."""
    drawn = []

    def draw(bench, what):
        drawn.append(what.seed)
        yield torch.zeros(3, 16, 16)
        right = what.seed in (0, 7)
        return replace(judged(bench, NAMES, NAMES if right else []), drawing=what)

    monkeypatch.setattr(drawing, "draw", draw)
    *_, first = draw_all(bench, [plan(bench, NAMES, seed, DDIM) for seed in range(3)])
    *_, last = until_right(bench, first)
    assert last[0] is not None and last[0].image is first[0].image
    assert [picture.right for picture in last] == [True, True, False]
    assert [picture.tries for picture in last] == [1, 3, 8]
    assert drawn == [0, 1, 2, 4, 7, 5, 8, 11, 14, 17, 20, 23]
    *_, more = until_right(bench, last)  # goes on with seeds not yet drawn
    assert more[2].drawing.seed == 23 + 3 * 7 and more[2].tries == 8


def test_the_nearest_training_picture_is_shown_where_there_is_one(bench):
    drawings = [plan(bench, NAMES, 3, DDIM)]
    *_, (without,) = draw_all(bench, drawings)
    assert without.nearest is None
    there = with_reference(bench)
    *_, (picture,) = draw_all(there, drawings)
    (image,), (rms,) = nearest(picture.image[None], there.reference)
    assert torch.equal(picture.nearest, image) and picture.rms == float(rms) > 0


def test_steps_that_a_sampler_can_not_take_become_the_nearest_it_can():
    noise = SchedulerConfig()  # 500 timesteps
    found = with_steps(noise, SamplingConfig(scheduler="ddim", num_inference_steps=12))
    assert found == SamplingConfig(scheduler="ddim", num_inference_steps=10)
    with pytest.raises(UserError, match="only --scheduler ddim"):  # nothing else is mended
        with_steps(noise, SamplingConfig(eta=1.0))


def test_what_must_not_come_needs_guidance(trained, bench, tmp_path):
    argv = argv_of(trained, tmp_path, "--prompt", "red sphere", "--without", "gray cube",
                   "--guidance_scale", 0)  # fmt: skip
    assert "--without 'gray cube': does nothing with --guidance_scale 0" in error_of(
        test.main, argv
    )
    heeded = replace(DDIM, guidance_scale=0, guidance_interval=(0.5, 1))  # 1 in the other half
    assert plan(bench, NAMES, 0, heeded, ["gray cube"]).without == ("gray cube",)
    assert plan(bench, NAMES, 0, replace(DDIM, guidance_scale=0)).sampling.guidance_scale == 0


def test_names_of_files_are_short_enough(bench):
    few = plan(bench, NAMES, 7, DDIM)
    assert few.name == "red-sphere_cyan-cube_seed7"
    assert plan(bench, list(bench.checkpoint.objects), 7, DDIM).name.startswith("24-objects-")
