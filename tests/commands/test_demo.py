"""src/demo.py's stages."""

import json
from dataclasses import replace

import pytest
from conftest import error_of

import demo
import guidance_scale
import render_iclevr
import test
from diffusion.samplers import check_steps
from runtime.files import write_json
from runtime.settings import parse_args, to_dict
from training.recipes import RECIPES
from training.resume import read_config


def test_demo_stages_are_commands_that_parse(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "latest_checkpoint", lambda _: tmp_path / "model.pth")
    for size in ([], ["--quick"]):
        stages = {}
        monkeypatch.setattr(demo, "stage", lambda s, f, *_, **__: stages.update({s.__name__: f}))  # noqa: B023
        monkeypatch.setattr(demo, "at_once", None)  # the report: all stages are over
        with pytest.raises(TypeError):
            demo.main([*size, "--output_dir", str(tmp_path)])
        flags = {name: [str(flag) for flag in of] for name, of in stages.items()}
        assert [*flags] == ["render_iclevr", "train", "test", "guidance_scale"]
        rendered = parse_args(render_iclevr.RenderConfig, flags["render_iclevr"])
        assert rendered.samples == demo.SAMPLES
        read_config(flags["train"])
        drawn = parse_args(test.TestConfig, flags["test"]).sampling
        assert (drawn.resample, drawn.resample_interval) == (4, (0.3, 0.9))
        assert parse_args(guidance_scale.SweepConfig, flags["guidance_scale"]).scale_step == 2


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("config.json", {"recipe": "small"}, "recipe"),
        ("config.json", to_dict(replace(RECIPES["tiny"], objects_power=1.0)), "objects_power"),
        ("data/render.json", {"samples": 16}, "samples"),
    ],
)
def test_a_run_of_an_older_demo_is_no_run_of_this_one(tmp_path, monkeypatch, name, content, what):
    monkeypatch.setattr(demo, "stage", None)  # nothing is begun
    path = tmp_path / "demo" / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    message = error_of(demo.main, ["--output_dir", tmp_path])
    assert f"{path}: of a version before ({what} differs)" in message
    assert [file for file in (tmp_path / "demo").rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize(
    ("content", "words"), [("[]", "not a dict"), ("", "delete"), ('{"recipe": "ti', "delete")]
)
def test_damaged_settings_of_a_run_end_the_demo(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr(demo, "stage", None)  # nothing is begun
    path = tmp_path / "demo" / "config.json"
    path.parent.mkdir()
    path.write_text(content)
    message = error_of(demo.main, ["--output_dir", tmp_path])
    assert message.startswith(f"{path}: ") and words in message


def test_a_run_of_this_demo_is_gone_on_with(tmp_path):
    """Whatever may differ: where it lies, how long it is."""
    flags = ["--recipe", "tiny", "--output_dir", str(tmp_path), "--max_train_steps", "5"]
    run_dir = tmp_path / "demo"
    run_dir.mkdir()
    write_json(run_dir / "config.json", to_dict(read_config(flags)[0]))
    demo.check_version(run_dir, run_dir / "data")


def test_demo_draws_in_steps_that_fit():
    for size in (demo.QUICK, demo.FULL):
        config, _ = read_config(["--recipe", "tiny", "--dry_run"])
        flags = ["--ckpt_path", "x", *demo.SAMPLER, *size["sweep"].split()]
        sweep = guidance_scale.parse_args(guidance_scale.SweepConfig, flags)
        assert check_steps(config.noise, sweep.sampling) == 12
