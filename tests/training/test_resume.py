"""A training goes on as if never stopped; or starts from the weights of another."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from conftest import error_of, train_argv
from runs import auto, poison, records, same, stopped

import export
import train
import train_evaluator
from network.checkpoint import load_checkpoint, save_checkpoint
from runtime.signals import StopSignal
from training.run_folder import latest_checkpoint


@pytest.mark.parametrize(
    ("precision", "optimizer", "more"),
    [
        ("no", "adamw", []),
        ("no", "muon", []),
        ("no", "muon", ["--align_to", "TEACHER"]),
        ("no", "muon", ["--equal_levels", "--objects_power", 1, "--timestep_interval", 0.3, 0.9]),
        ("no", "adamw", ["--reward_model", "TEACHER", "--reward_steps", 5]),
        ("no", "adamw", ["--no-ema", "--gradient_accumulation_steps", 2, "--num_workers", 1]),
        ("fp16", "adamw", []),
        ("fp16", "muon", []),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    world, tmp_path, monkeypatch, precision, optimizer, more
):
    if "TEACHER" in more:
        more = [more[0], tmp_path / "teacher.pth", *more[2:]]
        train_evaluator.main(
            ["--data_dir", str(world), "--epochs", "1", "--device", "cpu", "--out", str(more[1])]
        )
    flags = ("--epochs", 4, "--dropout", 0.1, "--log_interval", 3, "--mixed_precision", precision,
             "--optimizer", optimizer, *more)  # fmt: skip
    if precision == "fp16":  # an overflow in the second step of both runs halves the loss scale
        poison(monkeypatch, {1, 13})
    whole = load_checkpoint(train.main(train_argv(world, tmp_path / "a", *flags)))
    # Stopped in the middle of the second epoch: 5 of 12 steps, with the same schedule to the end.
    parts = train_argv(world, tmp_path / "b", *flags)
    stopped(train.main, parts, after=5)
    assert load_checkpoint(latest_checkpoint(tmp_path / "b" / "r")).step == 5
    # What was logged after the checkpoint is gone from the metrics after resuming.
    with open(tmp_path / "b" / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 99}\n{"step": 7, "lo')  # the last line cut short
    resumed = load_checkpoint(train.main(auto(tmp_path / "b")))
    assert resumed.step == whole.step == 12
    assert same(resumed.model, whole.model) and same(resumed.ema or {}, whole.ema or {})
    assert (resumed.ema is None) == ("--no-ema" in more)
    ours, theirs = (x.training["optimizer"]["state"] for x in (resumed, whole))
    assert theirs and all(same(ours[number], state) for number, state in theirs.items())
    assert resumed.training["lr_scheduler"] == whole.training["lr_scheduler"]
    losses = [[r["loss"] for r in records(tmp_path / x / "r") if "loss" in r] for x in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    scaler = whole.training["scaler"]
    assert resumed.training["scaler"] == scaler
    if precision == "fp16":
        assert (scaler["scale"], scaler["_growth_tracker"]) == (2**15, 10)


def stopped_in_preview(argv, name: str) -> None:
    """Train until the preview `name` is drawn, which Ctrl-C then cuts short."""
    real = train.Preview.__call__

    def preview(self, model, path):
        if path.name == name:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the preview is cut short, not drawn to its end")
        return real(self, model, path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(train.Preview, "__call__", preview)
        train.main(argv)
    assert ended.value.code == 130


def test_stopping_during_a_preview_loses_nothing(world, tmp_path):
    flags = ("--epochs", 4, "--sample_interval", 1)
    stopped_in_preview(train_argv(world, tmp_path, *flags), "epoch_1.png")
    assert load_checkpoint(latest_checkpoint(tmp_path / "r")).step == 3
    # It is drawn when the run goes on; so is the last one, after which no step is left.
    stopped_in_preview(auto(tmp_path), "epoch_4.png")
    (tmp_path / "r" / "checkpoints" / ".tmp-model_epoch_9-x.pth").write_bytes(b"of a kill")
    train.main(auto(tmp_path))
    assert {path.name for path in (tmp_path / "r" / "checkpoints").iterdir()} == {
        "model_epoch_1.pth", "model_epoch_4.pth"
    }  # fmt: skip
    train.main(train_argv(world, tmp_path / "whole", *flags))
    run_dirs = (tmp_path / "r", tmp_path / "whole" / "r")
    logs = [[r for r in records(run_dir) if "picture" in r] for run_dir in run_dirs]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    for epoch in range(1, 5):
        ours, theirs = (run_dir / "samples" / f"epoch_{epoch}.png" for run_dir in run_dirs)
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_second_signal_stops_at_once_but_not_an_echo_of_the_first():
    with StopSignal() as stop:
        for _ in range(2):  # as a launcher and its whole group get it
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        stop.since -= 2
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143


@pytest.fixture
def terminal():
    """Not as under nohup, which has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_all_that_asks_for_an_end_saves_first(world, tmp_path, terminal, name):
    """A terminal that is gone, and what schedulers send."""
    stopped(train.main, train_argv(world, tmp_path), 2, getattr(signal, name))
    assert load_checkpoint(latest_checkpoint(tmp_path / "r")).step == 2


def test_a_warning_and_then_sigterm_do_not_cut_the_saving_short(terminal):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.since -= 2
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed() and stop.number == signal.SIGUSR1
        with pytest.raises(SystemExit):  # someone at the keyboard
            os.kill(os.getpid(), signal.SIGINT)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_shell_starts_in_the_background_is_stopped_by_sigint():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.agreed()
    finally:
        signal.signal(signal.SIGINT, before)


def test_moved_run_goes_on_where_it_lies(world, tmp_path):
    train.main(train_argv(world, tmp_path / "old", "--epochs", 1))
    (tmp_path / "old").rename(tmp_path / "new")
    path = train.main(["--resume", str(tmp_path / "new" / "r"), "--epochs", "2"])
    assert path == tmp_path / "new" / "r" / "checkpoints" / "model_epoch_2.pth"
    assert not (tmp_path / "old").exists()


def test_resume_auto_starts_where_there_is_nothing_to_go_on_from(world, tmp_path, capsys):
    argv = train_argv(world, tmp_path, "--epochs", 1, "--resume", "auto")
    path = train.main(argv)
    assert "starting afresh" in capsys.readouterr().out
    assert load_checkpoint(path).step == 3
    argv[argv.index("--epochs") + 1] = "2"
    assert load_checkpoint(train.main(argv)).step == 6
    assert "starting afresh" not in capsys.readouterr().out


def test_a_finished_run_that_is_submitted_again_is_no_error(trained, capsys):
    """As in a job script that always says --resume auto."""
    _, output, checkpoint = trained
    before = {path: path.stat().st_mtime_ns for path in (output / "tiny").rglob("*")}
    argv = ["--output_dir", str(output), "--run_name", "tiny", "--resume", "auto"]
    assert train.main(argv) == checkpoint
    assert "all 12 steps are done; raise --epochs to go on" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (output / "tiny").rglob("*")} == before


def test_second_run_into_the_folder_is_refused(trained):
    data, output, _ = trained
    message = error_of(
        train.main, ["--data_dir", data, "--output_dir", output, "--run_name", "tiny"]
    )
    assert "--resume auto" in message and "--run_name" in message
    argv = ["--output_dir", output, "--run_name", "tiny", "--resume", "auto"]
    assert "--lr 0.5" in error_of(train.main, [*argv, "--lr", "0.5"])
    argv = ["--resume", output / "tiny"]
    assert "all 12 steps are done; raise --epochs" in error_of(train.main, argv)
    message = error_of(train.main, [*argv, "--max_train_steps", "5"])
    assert "all 12 steps are done; raise --max_train_steps" in message
    earlier = output / "tiny" / "checkpoints" / "model_epoch_2.pth"
    assert "holds later checkpoints" in error_of(train.main, ["--resume", earlier])
    assert "no checkpoint" in error_of(train.main, ["--resume", output / "x"])


def test_copied_checkpoint_is_not_resumed(trained, tmp_path):
    _, _, path = trained
    copy = tmp_path / "model_epoch_4.pth"
    copy.write_bytes(path.read_bytes())
    assert "must lie in a run's folder" in error_of(train.main, ["--resume", copy])


def test_resuming_on_other_pictures_is_refused(world, tmp_path):
    train.main(train_argv(world, tmp_path, "--epochs", 1))
    entries = json.loads((world / "train.json").read_text())
    first = next(iter(entries))
    entries[first] = ["yellow cylinder"] if entries[first] == ["gray cube"] else ["gray cube"]
    (world / "train.json").write_text(json.dumps(entries))
    message = error_of(train.main, ["--resume", tmp_path / "r", "--epochs", "2"])
    assert "other pictures" in message


@pytest.mark.parametrize(
    "harm", [{"optimizer": 3}, {"optimizer": {}}, {"losses": 3}, {"losses": [3]}]
)
def test_what_a_stranger_says_of_the_optimiser_is_checked(trained, tmp_path, harm):
    data, _, path = trained
    checkpoint = load_checkpoint(path)
    strange = tmp_path / "r" / "checkpoints" / "model_epoch_4.pth"
    save_checkpoint(strange, replace(checkpoint, training=checkpoint.training | harm))
    argv = ["--resume", tmp_path / "r", "--data_dir", data, "--epochs", 9]
    message = error_of(train.main, argv)
    assert message.startswith(f"{strange}: what it holds of the optimiser doesn't fit")


def test_a_run_starts_from_the_weights_of_another(trained, tmp_path, monkeypatch):
    data, _, path = trained
    half = tmp_path / "h.pth"
    export.main(["--to", "half", "--ckpt_path", str(path), "--out", str(half)])
    argv = ["--data_dir", data, "--output_dir", tmp_path, "--device", "cpu", "--wandb", "disabled",
            "--max_train_steps", 1, "--preview_steps", 5, "--lr_warmup_steps", 0,
            "--lr", 1e-9, "--weight_decay", 0]  # fmt: skip
    for name, source in (("whole", path), ("half", half)):
        flags = [*argv, "--init_from", source, "--run_name"]
        begun = load_checkpoint(train.main([str(a) for a in [*flags, name]]))
        start = load_checkpoint(source)
        assert begun.step == 1
        assert begun.config.model == start.config.model  # without its flags
        weights = start.ema or start.model
        for key, value in begun.ema.items():
            torch.testing.assert_close(value, weights[key].float(), atol=1e-6, rtol=0)
    message = error_of(train.main, [*flags, "x", "--norm_num_groups", 4])
    assert "--norm_num_groups 4" in message and "leave the flag out" in message
    message = error_of(train.main, [*flags, "x", "--prediction_type", "sample"])
    assert "--prediction_type sample" in message
    assert "not found" in error_of(train.main, [*argv, "--init_from", tmp_path / "nothing.pth"])
    assert not (tmp_path / "x").exists()
    wide = load_checkpoint(train.main([str(a) for a in [*flags, "w", "--time_embedding_dim", 80]]))
    assert wide.config.model.time_embedding_dim == 80
    name = "unet.time_embedding.linear_1.weight"
    torch.testing.assert_close(wide.ema[name][:64], weights[name].float(), atol=1e-6, rtol=0)
    message = error_of(train.main, [*flags, "x", "--time_embedding_dim", 60])
    assert "--time_embedding_dim 60" in message and "wider" in message
    # The same command goes on with its run, where the file is named from the working folder, too.
    monkeypatch.chdir(tmp_path)
    flags = [*argv, "--init_from", "h.pth", "--run_name", "again", "--resume", "auto"]
    for steps in 1, 2:
        last = train.main([str(a) for a in [*flags, "--max_train_steps", steps]])
        assert load_checkpoint(last).step == steps
    # Once begun, it goes on without the file that it started from.
    half.unlink()
    train.main(["--resume", str(tmp_path / "half"), "--max_train_steps", "2"])
