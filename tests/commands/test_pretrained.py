"""The network that comes with the repository, and the conditions that it is tested on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import OBJECTS, error_of

import demo
import guidance_scale
import report
import test
import train
from iclevr.scene import make_conditions, make_large_conditions
from network.checkpoint import PRETRAINED, load_checkpoint, save_checkpoint

STANDIN = PRETRAINED.parent


@pytest.fixture
def conditions(tmp_path):
    """What a fresh clone holds: the conditions without any picture."""
    for name in ("objects", "test", "new_test"):
        shutil.copy(STANDIN / f"{name}.json", tmp_path / f"{name}.json")
    return tmp_path


def test_conditions_are_the_renderer_s():
    read = {p: json.loads((STANDIN / f"{p}.json").read_text()) for p in ("test", "new_test")}
    assert [read["test"], read["new_test"]] == list(make_conditions(0))
    assert json.loads((STANDIN / "objects.json").read_text()) == OBJECTS
    for name, conditions in make_large_conditions(0).items():
        assert json.loads((STANDIN / f"{name}.json").read_text()) == conditions


def test_it_draws_what_is_asked_for(conditions, capsys):
    """Without --ckpt_path, and without any training picture at hand; it reaches more than this."""
    flags = ["--data_dir", str(conditions), "--output_dir", str(conditions), *demo.SAMPLING]
    report = test.main([*flags, "--wandb", "disabled", "--device", "cpu"])
    printed = capsys.readouterr()
    assert f"pretrained on the stand-in; {load_checkpoint(PRETRAINED).config.run_name}" in (
        printed.out
    )
    assert "no nearest.png: no training pictures here" in printed.out
    for split in ("test", "new_test"):
        assert report["accuracy"][split]["mean"] > 0.6


def test_its_report_says_how_long_it_was_trained(tmp_path):
    """As the demo ends; such a last training may have been shorter than an epoch."""
    checkpoint = load_checkpoint(PRETRAINED)
    words = f"Trained for {checkpoint.step} steps of {checkpoint.config.batch_size} pictures, "
    short = tmp_path / "short.pth"
    save_checkpoint(short, replace(checkpoint, epoch=0))
    for path, more in ((PRETRAINED, f"{checkpoint.epoch} epochs."), (short, "less than an epoch.")):
        page = report.main(["--ckpt_path", str(path), "--output_dir", str(tmp_path)])
        assert words + more in page.read_text("utf-8")


def test_the_sweep_takes_it_too():
    for config in (test.TestConfig(), guidance_scale.SweepConfig()):
        assert config.ckpt_path == PRETRAINED


def test_without_pictures_training_says_how_to_get_them(conditions):
    message = error_of(train.main, ["--data_dir", conditions, "--output_dir", conditions / "out"])
    assert "train.json: not found" in message and "python src/render_iclevr.py" in message


def test_it_is_small_and_names_no_folder():
    content = Path(PRETRAINED).read_bytes()
    assert len(content) <= 25e6
    config = load_checkpoint(PRETRAINED).config
    assert not config.output_dir.is_absolute()
    assert config.data.data_dir is config.align_to is config.init_from is None
    assert config.reward.reward_model is None
