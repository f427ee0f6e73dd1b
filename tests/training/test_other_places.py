"""A run goes on under another name, from another folder, on another machine."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import error_of, train_argv
from runs import auto, records

import export
import test
import train
from network.checkpoint import load_checkpoint, save_checkpoint
from runtime.settings import TrainConfig, UserError
from training import resume as resuming


def how_to_test(path: Path | str, *more) -> list[str]:
    """Flags of a quick src/test.py for a checkpoint."""
    return ["--ckpt_path", str(path), "--device", "cpu", "--wandb", "disabled", "--scheduler",
            "ddim", "--num_inference_steps", "5", *map(str, more)]  # fmt: skip


@pytest.mark.parametrize("name", ["base - Copy", ".hidden", "b\u00e4se (2)", "12:30 $^^$"])
def test_a_copied_run_goes_on_under_any_name(trained, tmp_path, name):
    """And what it saves can be tested, resumed and exported."""
    data, output, _ = trained
    shutil.copytree(output / "tiny", tmp_path / name)
    path = train.main(["--resume", str(tmp_path / name), "--epochs", "5"])
    assert path == tmp_path / name / "checkpoints" / "model_epoch_5.pth"
    test.main(how_to_test(path, "--data_dir", data, "--output_dir", tmp_path / "result"))
    assert (tmp_path / "result" / name / "accuracies.md").exists()
    folder = export.main(["--ckpt_path", str(path), "--out", str(tmp_path / "export")])
    back = ["--to", "checkpoint", "--ckpt_path", str(folder), "--out", str(tmp_path / "back.pth")]
    assert load_checkpoint(export.main(back)).config.run_name == name
    assert "all 15 steps are done" in error_of(train.main, ["--resume", tmp_path / name])


def test_a_run_goes_on_from_inside_its_folder_and_by_links(trained, tmp_path, monkeypatch):
    _, output, _ = trained
    run_dir = tmp_path / "runs" / "base"
    shutil.copytree(output / "tiny", run_dir)
    checkpoints = run_dir / "checkpoints"
    (tmp_path / "link").symlink_to(run_dir)
    (tmp_path / "last.pth").symlink_to(checkpoints / "model_epoch_4.pth")
    (checkpoints / "latest.pth").symlink_to("model_epoch_4.pth")
    monkeypatch.chdir(checkpoints)
    for resume in ("..", "../../base/.", tmp_path / "link", "model_epoch_4.pth", "latest.pth",
                   tmp_path / "last.pth", "../checkpoints/latest.pth"):  # fmt: skip
        config, source = train.read_config(["--resume", str(resume)])
        assert (config.output_dir, config.run_name) == (tmp_path / "runs", "base")
        assert source.checkpoint.step == 12
    (checkpoints / "latest.pth").unlink()
    checkpoints.rename(tmp_path / "big disk")  # the folder of the checkpoints is a link itself
    checkpoints.symlink_to(tmp_path / "big disk")
    resume = str(checkpoints / "model_epoch_4.pth")
    assert train.read_config(["--resume", resume])[0].run_dir == run_dir


def test_what_is_said_of_other_checkpoints_is_true(trained, tmp_path):
    _, output, _ = trained
    run_dir = tmp_path / "base"
    shutil.copytree(output / "tiny", run_dir)
    first, second = (run_dir / "checkpoints" / f"model_epoch_{epoch}.pth" for epoch in (2, 4))
    assert "holds later checkpoints, such as model_epoch_4.pth" in error_of(
        train.main, ["--resume", first]
    )
    renamed = first.rename(first.with_name("mine.pth"))
    assert "holds checkpoints beside it, such as model_epoch_4.pth" in error_of(
        train.main, ["--resume", renamed]
    )
    second.unlink()
    path = train.main(["--resume", str(renamed), "--epochs", "3"])  # the only one, renamed
    assert load_checkpoint(path).step == 9


def test_nothing_is_written_that_the_reader_refuses(trained, tmp_path):
    checkpoint = load_checkpoint(trained[2])
    for harm in ({"config": replace(checkpoint.config, run_name="a/b")}, {"step": 1.5},
                 {"config": replace(checkpoint.config, lr=-1.0)},
                 {"objects": {"red cube": 0}}):  # fmt: skip
        with pytest.raises(UserError, match="c.pth"):
            save_checkpoint(tmp_path / "c.pth", replace(checkpoint, **harm))
    folder = Path(export.main(["--ckpt_path", str(trained[2]), "--out", str(tmp_path / "e")]))
    settings = json.loads((folder / "settings.json").read_text())
    back = ["--to", "checkpoint", "--ckpt_path", folder, "--out", tmp_path / "c.pth"]
    (folder / "settings.json").write_text(json.dumps(settings | {"epoch": "3"}))
    assert "settings.json: epoch is a str" in error_of(export.main, back)
    assert not (tmp_path / "c.pth").exists()
    # Windows would take the one for two folders, the other is no text.
    for name, words in (("a\\b", "it names a folder"), (os.fsdecode(b"a\xff"), "string")):
        bad = tmp_path / name
        shutil.copytree(trained[1] / "tiny", bad)
        before = sorted(bad.rglob("*"))
        assert words in error_of(train.main, ["--resume", bad, "--epochs", 5])
        assert sorted(bad.rglob("*")) == before


def test_a_run_with_relative_paths_goes_on_from_another_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(train_argv(Path("data"), Path("out"), "--epochs", 1, "--image_dir", "data/iclevr"))
    stored = json.loads(Path("out/r/config.json").read_text())
    assert stored["data"]["image_dir"] == str(world / "iclevr")
    assert stored["output_dir"] == str(tmp_path / "out")
    monkeypatch.chdir(world)
    train.main(["--resume", "../out/r", "--epochs", "2"])
    world.rename(tmp_path / "moved")
    message = error_of(train.main, ["--resume", tmp_path / "out" / "r", "--epochs", 3])
    assert "model_epoch_2.pth: was trained with --data_dir" in message
    assert message.endswith("which is not there; name another with --data_dir")
    flags = ["--data_dir", str(tmp_path / "moved"), "--image_dir", str(tmp_path / "moved/iclevr")]
    train.main(["--resume", str(tmp_path / "out" / "r"), "--epochs", "3", *flags])


def test_home_is_expanded_in_every_path(trained, tmp_path, monkeypatch):
    data, output, _ = trained
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(output / "tiny", tmp_path / "base")
    (tmp_path / "data").symlink_to(data)
    path = train.main(["--resume=~/base", "--epochs=5", "--data_dir=~/data", "--cache_dir=~/cache"])
    test.main(how_to_test("~/base/checkpoints/model_epoch_5.pth", "--output_dir=~/result",
                        "--data_dir=~/data", "--evaluator=~/data/evaluator.pth"))  # fmt: skip
    export.main(["--ckpt_path=~/base/checkpoints/model_epoch_5.pth", "--out=~/export"])
    assert path.parents[1] == tmp_path / "base"
    assert {"result", "export", "cache"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "~").exists()


def test_what_belongs_to_a_machine_is_not_taken_from_the_checkpoint(trained, tmp_path):
    plain = TrainConfig()
    data = replace(plain.data, image_dir=Path("/x"))
    stored = replace(plain, device="cuda:7", compile=True, num_workers=99, wandb="online",
                     data=replace(data, cache_dir=Path("/nowhere")))  # fmt: skip
    assert resuming.on_this_machine(stored) == replace(plain, data=data)
    for wandb in ("disabled", "offline"):  # as good anywhere
        assert resuming.on_this_machine(replace(plain, wandb=wandb)).wandb == wandb
    run_dir = tmp_path / "r"
    shutil.copytree(trained[1] / "tiny", run_dir)
    path = run_dir / "checkpoints" / "model_epoch_4.pth"
    checkpoint = load_checkpoint(path)
    config = replace(checkpoint.config, device="cuda:7", compile=True, num_workers=99)
    save_checkpoint(path, replace(checkpoint, config=config))
    train.main(["--resume", str(run_dir), "--epochs", "5"])


def test_the_number_format_may_change_on_the_way(world, tmp_path):
    """A card without bfloat16 goes on in float16, and back."""
    train.main(train_argv(world, tmp_path, "--epochs", 1))
    for epochs, precision in (("2", "fp16"), ("3", "no")):
        train.main([*auto(tmp_path), "--epochs", epochs, "--mixed_precision", precision])


def test_a_longer_training_says_what_becomes_of_the_learning_rate(world, tmp_path, capsys):
    flags = ("--epochs", 2, "--lr_warmup_steps", 2, "--lr", 1e-3)
    train.main(train_argv(world, tmp_path, *flags))
    assert "learning rate" not in capsys.readouterr().err
    train.main([*auto(tmp_path), "--epochs", "4"])
    assert "warning: the learning rate goes from 0 to 0.00065: " in capsys.readouterr().err
    rates = [r["lr"] for r in records(tmp_path / "r") if "lr" in r]
    assert len(rates) == 12 and min(rates) > 0  # no step is taken in vain
    assert rates[2] == 1e-3 == max(rates)
    assert rates[6] == pytest.approx(0.65e-3, rel=0.01)
