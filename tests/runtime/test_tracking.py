"""Weights & Biases: offline, out of reach, not installed, failing."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from conftest import error_of, train_argv

import train
from judging.evaluator import build_evaluator


def found(folder: Path, pattern: str) -> list[Path]:
    """Files by wandb's own process, which writes them now and then late."""
    until = time.monotonic() + 60
    while not (paths := list(folder.glob(pattern))) and time.monotonic() < until:
        time.sleep(0.1)
    return paths


def test_wandb_offline_files_hold_the_run(world, tmp_path, monkeypatch):
    """wandb's real offline mode: the run's file holds losses, previews and accuracy."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(tmp_path))  # no login to be found
    torch.save({"model": build_evaluator().state_dict()}, world / "evaluator.pth")
    argv = train_argv(world, tmp_path / "out", "--epochs", 1, "--sample_interval", 1)
    train.main([*argv, "--wandb", "auto"])
    (run_dir,) = (tmp_path / "out" / "r" / "wandb").glob("offline-run-*")
    (file,) = found(run_dir, "*.wandb")
    keys = {b"loss", b"lr", b"grad_norm", b"images_per_s", b"preview_accuracy"}
    missing, until = keys, time.monotonic() + 60
    while missing and time.monotonic() < until:
        missing = {key for key in keys if key not in file.read_bytes()}
        time.sleep(0.1)
    assert not missing
    assert len(list((run_dir / "files" / "media" / "images").glob("preview_*.png"))) == 1


def test_wandb_online_without_login_is_a_user_error(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = train_argv(world, tmp_path / "out", "--epochs", 1, "--wandb", "online")
    assert "not logged in" in error_of(train.main, argv)


def test_without_wandb_installed_a_run_logs_to_its_folder(world, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it was not there
    argv = train_argv(world, tmp_path / "out", "--epochs", 1)
    train.main([*argv, "--wandb", "auto"])
    out, error = capsys.readouterr()
    assert (
        out.count("wandb: not installed; logging to files in") == 1
        and "warning: wandb" not in error
    )
    assert (tmp_path / "out" / "r" / "metrics.jsonl").read_text().count("loss")
    for mode in ("online", "offline"):
        argv = train_argv(world, tmp_path / mode, "--epochs", 1)
        assert "pip install wandb" in error_of(train.main, [*argv, "--wandb", mode])
    capsys.readouterr()
    train.main([*train_argv(world, tmp_path / "silent", "--epochs", 1), "--wandb", "disabled"])
    assert "not installed" not in capsys.readouterr().out


def test_wandb_out_of_reach_keeps_the_run_offline(tmp_path, monkeypatch, capsys):
    """Logged in, but the service doesn't answer."""
    import wandb

    from runtime.tracking import Tracker

    real, modes = wandb.init, []

    def init(mode, **options):
        modes.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no connection")
        return real(mode=mode, **options)

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    monkeypatch.setattr(wandb, "init", init)
    tracker = Tracker("auto", "p", "n", tmp_path, {})
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert modes == ["online", "offline"]
    assert found(tmp_path, "wandb/offline-run-*/*.wandb")
    assert "wandb: offline" in capsys.readouterr().out


def test_a_key_without_a_connection_keeps_the_run_offline(world, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    train.main([*train_argv(world, tmp_path, "--epochs", 1), "--wandb", "auto"])
    assert found(tmp_path, "r/wandb/offline-run-*/*.wandb")
    # Why, in wandb's words: on a busy machine it may give up before it is refused.
    assert f"wandb: offline, {tmp_path / 'r' / 'wandb'} (" in capsys.readouterr().out


def test_a_run_that_goes_on_is_the_same_run(tmp_path, monkeypatch):
    import wandb

    from runtime.tracking import Tracker

    seen = []

    def init(id, resume, **options):
        seen.append(id)
        assert resume == "allow" and len(options["name"]) <= 128
        raise OSError

    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setattr(wandb, "init", init)
    for name, fresh in (("a", True), ("a", False), ("a", True), ("b" * 300, False)):
        Tracker("offline", "p", name, tmp_path, {}, fresh)
    assert seen[0] == seen[1] and len(set(seen)) == 3
    (tmp_path / "wandb.json").write_text("[")
    Tracker("offline", "p", "a", tmp_path, {})
    assert len(set(seen)) == 4
    monkeypatch.setenv("WANDB_RUN_ID", "x")  # of a sweep's agent: wandb reads it itself
    monkeypatch.setattr(wandb, "init", lambda **options: seen.append("id" in options))
    Tracker("offline", "p", "a", tmp_path, {})
    assert seen[-1] is False


def test_resuming_goes_on_with_the_same_run(world, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    train.main(train_argv(world, tmp_path, "--epochs", 1, "--wandb", "offline"))
    train.main(["--resume", str(tmp_path / "r"), "--epochs", "2"])
    runs = list(tmp_path.glob("r/wandb/offline-run-*"))
    (known,) = json.loads((tmp_path / "r" / "wandb.json").read_text()).values()
    assert len(runs) == 2 and all(known in path.name for path in runs)


def test_trials_of_a_sweep_train_in_a_thread_and_in_folders_of_their_own(
    world, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    argv = train_argv(world, tmp_path, "--epochs=1", "--ema=False", "--keep_best=False")
    at = argv.index("--run_name")
    argv = argv[:at] + argv[at + 2 :]
    with ThreadPoolExecutor(1) as pool:
        for trial in ("one", "two"):
            monkeypatch.setenv("WANDB_RUN_ID", trial)
            path = pool.submit(train.main, argv).result()
            assert path.parents[1].name == f"ddpm-cfg-v1-{trial}"


def test_failing_tracker_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    from runtime.tracking import Tracker

    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker("auto", "p", "n", tmp_path, {})
    real_run = tracker.run

    def broken(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(real_run, "log", broken)
    tracker.log({"loss": 1.0}, 1)
    tracker.log({"loss": 1.0}, 2)
    assert capsys.readouterr().err.count("warning: wandb stopped (No space left") == 1
    real_run.finish()
