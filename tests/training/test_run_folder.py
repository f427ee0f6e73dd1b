"""Checkpoints of a run: damaged ones, those that are kept; and one training at a time."""

import errno
import json
import os
import platform
from dataclasses import replace

import pytest
from conftest import error_of, train_argv
from runs import auto, damage_middle, same

import train
from network.checkpoint import damaged_part, load_checkpoint, save_checkpoint
from runtime.files import lock_folder
from runtime.settings import UserError
from training import trainer
from training.run_folder import best_accuracy, latest_checkpoint, latest_whole_checkpoint


def test_a_damaged_checkpoint_falls_back_to_the_one_before(world, tmp_path, capsys):
    train.main(train_argv(world, tmp_path, "--epochs", 3, "--save_interval", 1))
    folder = tmp_path / "r" / "checkpoints"
    whole = load_checkpoint(folder / "model_epoch_3.pth")
    damage_middle(folder / "model_epoch_3.pth")
    (folder / "model_epoch_2.pth").write_bytes(b"")
    path = train.main([*auto(tmp_path), "--keep_last", "1"])
    warnings = capsys.readouterr().err
    assert "model_epoch_3.pth: damaged" in warnings and "model_epoch_2.pth: damaged" in warnings
    assert "name a file" not in warnings  # nothing is for the user to do
    again = load_checkpoint(path)
    assert path.name == "model_epoch_3.pth" and again.step == whole.step
    assert same(again.model, whole.model)
    damage_middle(path)
    assert "misses its checksum" in error_of(train.main, auto(tmp_path))


def test_a_checkpoint_that_the_disk_cannot_give_back_counts_as_damaged(
    world, tmp_path, capsys, monkeypatch
):
    train.main(train_argv(world, tmp_path, "--epochs", 2, "--save_interval", 1))
    real, number = damaged_part, errno.EIO

    def bad_sector(path):
        if path.name == "model_epoch_2.pth":
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr("network.checkpoint.damaged_part", bad_sector)
    found = latest_whole_checkpoint(tmp_path / "r")
    assert found.path.name == "model_epoch_1.pth"
    warning = capsys.readouterr().err
    assert "model_epoch_2.pth: can't be read: Input/output error" in warning
    number = errno.EACCES  # a matter of rights: going on from an older one would lose steps
    with pytest.raises(UserError, match="model_epoch_2.pth: can't be read: Permission denied"):
        latest_whole_checkpoint(tmp_path / "r")


def test_only_the_last_and_the_best_are_kept(trained, tmp_path):
    data, _, _ = trained
    accuracies = iter([0.2, 0.6, 0.6, 0.1])

    def preview(self, model, path):
        return {"preview_accuracy": next(accuracies)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Preview, "__call__", preview)
        argv = train_argv(data, tmp_path, "--epochs", 4, "--save_interval", 1, "--keep_best",
                          "--keep_last", 2, "--sample_interval", 1)  # fmt: skip
        train.main(argv)
    folder = tmp_path / "r" / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {
        "model_epoch_3.pth", "model_epoch_4.pth", "best.pth",
    }  # fmt: skip
    best = load_checkpoint(folder / "best.pth")
    assert best.epoch == 2 and best.training["best"] == 0.6
    # Going on, a worse preview leaves it; a better one does not.
    for accuracy, epoch in ((0.5, 2), (0.7, 6)):
        accuracies = iter([accuracy])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Preview, "__call__", preview)
            epochs = str(5 if accuracy == 0.5 else 6)
            train.main(["--resume", str(tmp_path / "r"), "--epochs", epochs])
        assert load_checkpoint(folder / "best.pth").epoch == epoch


def test_best_may_be_all_there_is(trained, tmp_path):
    """Killed before the first --save_interval; and a damaged best.pth stops nothing."""
    data, _, _ = trained
    argv = train_argv(data, tmp_path, "--epochs", 4, "--sample_interval", 1, "--keep_best")
    real = trainer.train_step

    def killed(state, *args):
        if state.step == 5:
            raise KeyboardInterrupt
        return real(state, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "train_step", killed)
        train.main(argv)
    folder = tmp_path / "r" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["best.pth"]
    assert "holds a run already" in error_of(train.main, argv)
    train.main([*argv, "--resume", "auto"])
    assert load_checkpoint(folder / "model_epoch_4.pth").step == 12
    damage_middle(folder / "best.pth")
    train.main(["--resume", str(tmp_path / "r"), "--epochs", "5"])
    assert load_checkpoint(folder / "model_epoch_5.pth").step == 15
    assert load_checkpoint(folder / "best.pth").epoch == 5


@pytest.mark.parametrize("known, best", [({"best": 0.5}, 0.5), ({"best": "x"}, -1), ({}, -1)])
def test_the_best_so_far_is_a_number_whatever_a_file_says(trained, tmp_path, known, best):
    path = tmp_path / "checkpoints" / "best.pth"
    save_checkpoint(path, replace(load_checkpoint(trained[2]), training=known))
    assert best_accuracy(tmp_path) == best


def test_second_process_in_the_folder_is_refused(world, tmp_path):
    (tmp_path / "r").mkdir()
    lock = lock_folder(tmp_path / "r", "")
    message = error_of(train.main, train_argv(world, tmp_path, "--epochs", 1))
    assert f"process {os.getpid()} on {platform.node()} works here" in message
    assert set(os.listdir(tmp_path / "r")) == {".lock", ".lock-owner"}
    lock.release()
    train.main(train_argv(world, tmp_path, "--epochs", 1))


def test_a_run_that_another_process_has_begun_meanwhile_is_left_alone(world, tmp_path):
    """It looked before it had the lock: while it decoded, another one trained and ended."""
    argv = train_argv(world, tmp_path, "--epochs", 1)
    real = train.get_dataloader

    def overtaken(*args, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "get_dataloader", real)
            train.main([*argv, "--seed", "1"])
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "get_dataloader", overtaken)
        assert "another process has trained here" in error_of(train.main, argv)
    assert load_checkpoint(latest_checkpoint(tmp_path / "r")).config.seed == 1
    assert json.loads((tmp_path / "r" / "config.json").read_text())["seed"] == 1
