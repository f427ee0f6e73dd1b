"""Training on a tiny world, through src/train.py: what it writes, keeps, skips and resumes."""

import errno
import functools
import json
import os
import platform
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OBJECTS, SMALL_NETWORK, error_of, train_argv
from PIL import Image

import export
import test
import train
import train_evaluator
from diffusion.sampling import sample
from judging.evaluator import evaluate, load_evaluator
from network.checkpoint import damaged_part, load_checkpoint, load_model, save_checkpoint
from runtime.files import lock_folder
from runtime.seeds import picture_seeds
from runtime.settings import DataConfig, SamplingConfig, TrainConfig, UserError
from training import step, trainer
from training.recipes import RECIPES
from training.resume import checkpoints, latest_checkpoint, latest_whole_checkpoint, read_config
from training.step import update_ema
from training.stop_signal import StopSignal


def test_run_folder(trained):
    data, output, checkpoint = trained
    run_dir = output / "tiny"
    assert checkpoint == run_dir / "checkpoints" / "model_epoch_4.pth"
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {
        "model_epoch_2.pth", "model_epoch_4.pth",
    }  # fmt: skip
    for epoch in (2, 4):
        assert Image.open(run_dir / "samples" / f"epoch_{epoch}.png").size[0] > 128
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [r for r in records if "loss" in r]
    assert [r["step"] for r in losses] == list(range(1, 13))  # 12 pictures, batch 4, 4 epochs
    assert {"lr", "grad_norm", "images_per_s"} <= losses[0].keys()
    assert [r["epoch"] for r in records if "preview_accuracy" in r] == [2, 4]
    config = json.loads((run_dir / "config.json").read_text())
    assert config["batch_size"] == 4 and config["model"]["block_out_channels"] == [16, 32]


def test_checkpoint_explains_itself(trained):
    data, _, path = trained
    content = torch.load(path, weights_only=True)
    assert content["config"]["noise"]["num_train_timesteps"] == 20
    checkpoint = load_checkpoint(path)
    assert checkpoint.epoch == 4 and checkpoint.step == 12 and checkpoint.objects["red cube"] == 1
    model = load_model(checkpoint, path, torch.device("cpu"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint.ema[name])
    assert any(not torch.equal(checkpoint.ema[n], v) for n, v in checkpoint.model.items())


def test_preview_is_sampled_and_scored_by_the_one_function(trained):
    """The last preview's accuracy is that of test pictures drawn with the same settings."""
    data, output, path = trained
    checkpoint = load_checkpoint(path)
    labels = torch.stack(
        list(test.open_bench(path, DataConfig(data_dir=data), "cpu").labels["test"])
    )
    sampling = SamplingConfig(scheduler="ddim", num_inference_steps=5, guidance_scale=3.0)
    model = load_model(checkpoint, path, torch.device("cpu"))
    images, _ = sample(
        model, checkpoint.config.noise, labels, picture_seeds(0, 4), sampling, progress=False
    )
    accuracy = evaluate(load_evaluator(data / "evaluator.pth", OBJECTS), images, labels).accuracy
    records = map(json.loads, (output / "tiny" / "metrics.jsonl").read_text().splitlines())
    assert [r["preview_accuracy"] for r in records if "preview_accuracy" in r][-1] == accuracy


@pytest.mark.parametrize(
    ("precision", "optimizer", "more"),
    [
        ("no", "adamw", []),
        ("no", "muon", []),
        ("no", "muon", ["--align_to", "TEACHER"]),
        ("no", "adamw", ["--no-ema", "--gradient_accumulation_steps", 2, "--num_workers", 1]),
        ("fp16", "adamw", []),
        ("fp16", "muon", []),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(
    world, tmp_path, monkeypatch, precision, optimizer, more
):
    if "TEACHER" in more:
        more = ["--align_to", tmp_path / "teacher.pth"]
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
    real_step = trainer.train_step
    calls = []

    def stop_after_5(*args):
        calls.append(1)
        result = real_step(*args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(trainer, "train_step", stop_after_5)
        train.main(parts)
    assert stopped.value.code == 143
    stored = load_checkpoint(latest_checkpoint(tmp_path / "b" / "r"))
    assert stored.step == 5
    # What was logged after the checkpoint is gone from the metrics after resuming.
    with open(tmp_path / "b" / "r" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 99}\n{"step": 7, "lo')  # the last line cut short
    resumed = load_checkpoint(
        train.main(["--output_dir", str(tmp_path / "b"), "--run_name", "r", "--resume", "auto"])
    )
    assert resumed.step == whole.step == 12
    for ours, theirs in ((resumed.model, whole.model), (resumed.ema or {}, whole.ema or {})):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (resumed.ema is None) == ("--no-ema" in more)
    ours, theirs = (x.training["optimizer"]["state"] for x in (resumed, whole))
    for number, state in theirs.items():
        assert all(torch.equal(ours[number][key], value) for key, value in state.items())
    assert resumed.training["lr_scheduler"] == whole.training["lr_scheduler"]
    losses = [
        [
            r["loss"]
            for r in map(json.loads, (tmp_path / x / "r" / "metrics.jsonl").open())
            if "loss" in r
        ]
        for x in "ab"
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    scaler = whole.training["scaler"]
    assert resumed.training["scaler"] == scaler
    if precision == "fp16":
        assert (scaler["scale"], scaler["_growth_tracker"]) == (2**15, 10)


def test_stopping_during_a_preview_loses_nothing(world, tmp_path):
    real, calls = train.Preview.__call__, []

    def stopped_preview(self, *args):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the preview is cut short, not drawn to its end")
        return real(self, *args)

    argv = train_argv(world, tmp_path, "--epochs", 4)
    argv[argv.index("--sample_interval") + 1] = "1"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train.Preview, "__call__", stopped_preview)
        train.main(argv)
    assert stopped.value.code == 130
    assert load_checkpoint(latest_checkpoint(tmp_path / "r")).step == 3
    # It is drawn when the run goes on; so is the last one, after which no step is left.
    argv = ["--output_dir", str(tmp_path), "--run_name", "r", "--resume", "auto"]

    def last_is_stopped(self, *args):
        if args[1].name == "epoch_4.png":
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("the preview is cut short, not drawn to its end")
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(train.Preview, "__call__", last_is_stopped)
        train.main(argv)
    assert stopped.value.code == 130
    (tmp_path / "r" / "checkpoints" / ".tmp-model_epoch_9-x.pth").write_bytes(b"of a kill")
    train.main(argv)
    assert {path.name for path in (tmp_path / "r" / "checkpoints").iterdir()} == {
        "model_epoch_1.pth", "model_epoch_4.pth"
    }  # fmt: skip
    whole = train_argv(world, tmp_path / "whole", "--epochs", 4)
    whole[whole.index("--sample_interval") + 1] = "1"
    train.main(whole)
    logs = [
        [line for line in (folder / "r" / "metrics.jsonl").read_text().splitlines()
         if '"picture"' in line]
        for folder in (tmp_path, tmp_path / "whole")
    ]  # fmt: skip
    assert logs[0] == logs[1] and len(logs[0]) == 4
    for epoch in range(1, 5):
        pictures = [folder / "r" / "samples" / f"epoch_{epoch}.png"
                    for folder in (tmp_path, tmp_path / "whole")]  # fmt: skip
        assert pictures[0].read_bytes() == pictures[1].read_bytes()


def damage_middle(path: Path) -> None:
    """Flip a bit among the weights: torch alone would read them without complaint."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(world, tmp_path, capsys):
    train.main(train_argv(world, tmp_path, "--epochs", 3, "--save_interval", 1))
    folder = tmp_path / "r" / "checkpoints"
    whole = load_checkpoint(folder / "model_epoch_3.pth")
    damage_middle(folder / "model_epoch_3.pth")
    (folder / "model_epoch_2.pth").write_bytes(b"")
    argv = ["--output_dir", str(tmp_path), "--run_name", "r", "--resume", "auto"]
    path = train.main([*argv, "--keep_last", "1"])
    warnings = capsys.readouterr().err
    assert "model_epoch_3.pth: damaged" in warnings and "model_epoch_2.pth: damaged" in warnings
    assert "name a file" not in warnings  # nothing is for the user to do
    again = load_checkpoint(path)
    assert path.name == "model_epoch_3.pth" and again.step == whole.step
    assert all(torch.equal(again.model[name], whole.model[name]) for name in whole.model)
    damage_middle(path)
    assert "misses its checksum" in error_of(train.main, argv)


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


def test_a_checkpoint_that_comes_out_damaged_leaves_the_old_one(trained, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(trained[2])
    path = tmp_path / "model.pth"
    save_checkpoint(path, checkpoint)
    real = torch.save

    def cut_short(path):
        path.write_bytes(path.read_bytes()[:-100])

    for harm in (damage_middle, cut_short):

        def failing_disk(content, file, harm=harm):
            real(content, file)
            file.flush()
            harm(Path(file.name))

        monkeypatch.setattr(torch, "save", failing_disk)
        with pytest.raises(UserError, match="came out damaged; check the disk"):
            save_checkpoint(path, replace(checkpoint, step=99))
    assert load_checkpoint(path).step == checkpoint.step
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


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


def test_moved_run_goes_on_where_it_lies(world, tmp_path):
    train.main(train_argv(world, tmp_path / "old", "--epochs", 1))
    (tmp_path / "old").rename(tmp_path / "new")
    path = train.main(["--resume", str(tmp_path / "new" / "r"), "--epochs", "2"])
    assert path == tmp_path / "new" / "r" / "checkpoints" / "model_epoch_2.pth"
    assert not (tmp_path / "old").exists()


def test_a_run_starts_from_the_weights_of_another(trained, tmp_path):
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
    # Once begun, it goes on without the file that it started from.
    half.unlink()
    train.main(["--resume", str(tmp_path / "half"), "--max_train_steps", "2"])


def test_a_compiled_network_trains_the_same(world, tmp_path, monkeypatch):
    plain = load_checkpoint(train.main(train_argv(world, tmp_path / "a", "--epochs", 1)))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    argv = train_argv(world, tmp_path / "b", "--epochs", 1, "--compile")
    compiled = load_checkpoint(train.main(argv))
    assert compiled.model.keys() == plain.model.keys()
    for name, value in plain.model.items():
        torch.testing.assert_close(compiled.model[name], value)

    def no_compiler(*args, **kwargs):
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch, "compile", no_compiler)
    argv = train_argv(world, tmp_path / "c", "--epochs", 1, "--compile")
    assert "--compile: torch.compile fails here (no compiler found)" in error_of(train.main, argv)
    assert not (tmp_path / "c").exists()


def test_without_a_judge_previews_are_not_scored(world, tmp_path, capsys):
    """The stand-in's judge knows no other objects than the stand-in's, or another order."""
    (world / "evaluator.pth").unlink(missing_ok=True)
    objects = json.loads((world / "objects.json").read_text())
    first, second, *_ = objects
    objects |= {first: objects[second], second: objects[first]}
    (world / "objects.json").write_text(json.dumps(objects))
    argv = train_argv(world, tmp_path, "--epochs", 1)
    for flag in (["--keep_best"], ["--preview_fd_samples", 4]):
        message = error_of(train.main, [*argv, *flag])
        assert message == f"{flag[0]}: needs a judge; name one with --evaluator"
    assert not (tmp_path / "r").exists()
    train.main(argv)
    assert "judge: none, previews get no accuracy" in capsys.readouterr().out
    assert (tmp_path / "r" / "samples" / "epoch_1.png").exists()
    assert "accuracy" not in (tmp_path / "r" / "metrics.jsonl").read_text()


def test_a_line_is_about_the_steps_since_the_one_before(world, tmp_path, monkeypatch):
    real_step, losses = trainer.train_step, []

    def noted_step(*args):
        loss, norm = real_step(*args)
        losses.append((loss.item(), norm.item()))
        return loss, norm

    monkeypatch.setattr(trainer, "train_step", noted_step)
    argv = train_argv(world, tmp_path, "--epochs", 3)  # of 3 steps each
    argv[argv.index("--log_interval") + 1] = "2"
    train.main(argv)
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    logged = [values for line in lines if "loss" in (values := json.loads(line))]
    assert [values["step"] for values in logged] == [2, 4, 6, 8, 9]
    starts = [0, 2, 4, 6, 8]
    for values, start in zip(logged, starts, strict=True):
        end = values["step"]
        assert values["loss"] == pytest.approx(np.mean([x for x, _ in losses[start:end]]))
        assert values["grad_norm"] == pytest.approx(losses[end - 1][1])
        pictures = 4 * (end - start)
        assert values["images_per_s"] == pytest.approx(pictures / values["seconds"])


def test_resuming_on_other_pictures_is_refused(world, tmp_path):
    train.main(train_argv(world, tmp_path, "--epochs", 1))
    entries = json.loads((world / "train.json").read_text())
    first = next(iter(entries))
    entries[first] = ["yellow cylinder"] if entries[first] == ["gray cube"] else ["gray cube"]
    (world / "train.json").write_text(json.dumps(entries))
    message = error_of(train.main, ["--resume", tmp_path / "r", "--epochs", "2"])
    assert "other pictures" in message


def poison(monkeypatch, steps):
    """The training loss of these steps is NaN."""
    real = train.training_loss
    count = iter(range(10**6))

    def poisoned(*args, **kwargs):
        loss = real(*args, **kwargs)
        return loss * float("nan") if next(count) in steps else loss

    monkeypatch.setattr(step, "training_loss", poisoned)


def test_a_step_with_nan_is_skipped_and_counted(world, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2})
    kept = []
    real_step = trainer.train_step

    def everything(state):
        """Weights, and the optimiser's moments and step counts (none before the first step)."""
        moments = [v.clone() for values in state.optimizer.state.values() for v in values.values()]
        return [p.detach().clone() for p in state.model.parameters()], moments

    def watched(state, *args):
        before = everything(state)
        result = real_step(state, *args)
        after = everything(state)
        kept.append(
            [len(a) == len(b) and all(map(torch.equal, a, b))
             for a, b in zip(before, after, strict=True)]
        )  # fmt: skip
        return result

    monkeypatch.setattr(trainer, "train_step", watched)
    path = train.main(train_argv(world, tmp_path, "--epochs", 2, "--lr_warmup_steps", 0))
    assert kept == [[False] * 2] + [[True] * 2] * 2 + [[False] * 2] * 3
    records = map(json.loads, (tmp_path / "r" / "metrics.jsonl").read_text().splitlines())
    lines = [r for r in records if "skipped_steps" in r]
    assert [r["skipped_steps"] for r in lines] == [0, 1, 2, 2, 2, 2]
    assert ["loss" in r for r in lines] == [True, False, False, True, True, True]
    weights = load_checkpoint(path)
    assert all(v.isfinite().all() for v in [*weights.model.values(), *weights.ema.values()])
    assert weights.training["skipped"].tolist() == [2, 0]


def test_a_skipped_last_step_ends_the_run_as_any_other(world, tmp_path, monkeypatch):
    poison(monkeypatch, {2})
    checkpoint = load_checkpoint(train.main(train_argv(world, tmp_path, "--epochs", 1)))
    assert checkpoint.step == 3 and checkpoint.training["skipped"].tolist() == [1, 1]


def test_many_nan_in_a_row_stop_with_the_last_good_checkpoint(world, tmp_path):
    argv = train_argv(world, tmp_path, "--epochs", 9, "--save_interval", 1)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, range(4, 100))
        message = error_of(train.main, [*argv, "--max_skipped_steps", 4])
    assert "the last 4 steps before step 8 had NaN" in message
    assert "model_epoch_1.pth" in message  # none is written within the streak
    assert load_checkpoint(latest_checkpoint(tmp_path / "r")).step == 3
    argv = ["--output_dir", str(tmp_path), "--run_name", "r", "--resume", "auto"]
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, range(5))  # steps 4 to 8: past the end of epoch 2
        train.main([*argv, "--max_skipped_steps", "9", "--save_interval", "2"])
    assert [path.name for path in checkpoints(tmp_path / "r")] == [
        f"model_epoch_{epoch}.pth" for epoch in (1, 3, 4, 6, 8, 9)
    ]  # that of epoch 2 was put off


def test_the_count_of_skipped_steps_goes_on_when_resumed(world, tmp_path, monkeypatch):
    poison(monkeypatch, range(4, 10**6))
    real_step = trainer.train_step

    def stop_after_6(state, *args):
        result = real_step(state, *args)
        if state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    argv = train_argv(world, tmp_path, "--epochs", 9, "--max_skipped_steps", 4)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(trainer, "train_step", stop_after_6)
        train.main(argv)
    argv = ["--output_dir", tmp_path, "--run_name", "r", "--resume", "auto"]
    assert "the last 4 steps before step 8 had NaN" in error_of(train.main, argv)


def test_diverged_training_stops_and_saves_nothing(world, tmp_path):
    argv = train_argv(world, tmp_path, "--epochs", 4, "--lr", 1e30, "--lr_warmup_steps", 0,
                      "--save_interval", 1)  # fmt: skip
    message = error_of(train.main, argv)
    assert "had NaN or infinite gradients" in message and "--lr" in message
    assert latest_checkpoint(tmp_path / "r") is None


def test_bad_preview_steps_are_named_at_once(world, tmp_path):
    argv = [*train_argv(world, tmp_path), "--preview_steps", "7"]
    assert error_of(train.main, argv).startswith("--preview_steps 7")
    assert not (tmp_path / "r").exists()


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


def test_a_second_signal_stops_at_once_but_not_an_echo_of_the_first():
    with StopSignal() as stop:
        for _ in range(2):  # as a launcher and its whole group get it
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        stop.since -= 2
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143


def test_copied_checkpoint_is_not_resumed(trained, tmp_path):
    _, _, path = trained
    copy = tmp_path / "model_epoch_4.pth"
    copy.write_bytes(path.read_bytes())
    assert "must lie in a run's folder" in error_of(train.main, ["--resume", copy])


def test_seed_decides_everything(world, tmp_path):
    def weights(name, seed):
        return load_checkpoint(
            train.main(train_argv(world, tmp_path / name, "--epochs", 1, "--seed", seed))
        ).model

    first, again, other = weights("a", 0), weights("b", 0), weights("c", 1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["unet.conv_in.weight"], other["unet.conv_in.weight"])


def test_training_learns(world, tmp_path):
    path = train.main(
        train_argv(world, tmp_path, "--epochs", 80, "--lr", 2e-3, "--lr_warmup_steps", 5,
                   "--save_interval", 1000)
    )  # fmt: skip
    lines = (path.parents[1] / "metrics.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if "loss" in r]
    assert sum(losses[-20:]) / 20 < 0.6 * sum(losses[:20]) / 20


def test_no_ema_uses_the_plain_weights(world, tmp_path):
    path = train.main(train_argv(world, tmp_path, "--epochs", 1, "--no_ema"))
    checkpoint = load_checkpoint(path)
    assert checkpoint.ema is None
    model = load_model(checkpoint, path, torch.device("cpu"))
    assert torch.equal(model.unet.conv_in.weight, checkpoint.model["unet.conv_in.weight"])


def test_ema_update():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * a.weight + 0.1 * b.weight
    update_ema(a, b, 0.9)
    torch.testing.assert_close(a.weight, expected)


def test_gradients_are_clipped(world, tmp_path, monkeypatch):
    """With a tiny limit, SGD's step is as long as the limit times the learning rate."""
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda p, lr, *_, **__: torch.optim.SGD(p, lr, fused=True)
    )
    moves = []
    real_step = trainer.train_step

    def measure(state, *args):
        before = [p.detach().clone() for p in state.model.parameters()]
        lr = state.lr_scheduler.get_last_lr()[0]
        result = real_step(state, *args)
        move = sum(
            (p - q).square().sum() for p, q in zip(state.model.parameters(), before, strict=True)
        )
        moves.append((move.sqrt().item(), lr))
        return result

    monkeypatch.setattr(trainer, "train_step", measure)
    train.main(train_argv(world, tmp_path, "--epochs", 1, "--max_grad_norm", 0.01, "--lr", 1.0,
                          "--lr_warmup_steps", 0))  # fmt: skip
    for move, lr in moves:
        assert move == pytest.approx(0.01 * lr, rel=0.05)


@pytest.mark.parametrize("known, best", [({"best": 0.5}, 0.5), ({"best": "x"}, -1), ({}, -1)])
def test_the_best_so_far_is_a_number_whatever_a_file_says(trained, tmp_path, known, best):
    path = tmp_path / "checkpoints" / "best.pth"
    save_checkpoint(path, replace(load_checkpoint(trained[2]), training=known))
    assert train.best_accuracy(tmp_path) == best


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


def test_resume_auto_starts_where_there_is_nothing_to_go_on_from(world, tmp_path, capsys):
    argv = train_argv(world, tmp_path, "--epochs", 1, "--resume", "auto")
    path = train.main(argv)
    assert "starting afresh" in capsys.readouterr().out
    assert load_checkpoint(path).step == 3
    argv[argv.index("--epochs") + 1] = "2"
    assert load_checkpoint(train.main(argv)).step == 6
    assert "starting afresh" not in capsys.readouterr().out


def test_preview_reports_all_figures(trained, tmp_path):
    data, _, _ = trained
    train.main(
        ["--data_dir", str(data), "--output_dir", str(tmp_path), "--epochs", "1", "--wandb",
         "disabled", "--device", "cpu", "--preview_fd_samples", "6", *SMALL_NETWORK]
    )  # fmt: skip
    lines = (tmp_path / "ddpm-cfg-v1" / "metrics.jsonl").read_text().splitlines()
    names = {"accuracy", "exact_sets", "missing", "extra", "color_errors", "shape_errors",
             "frechet_distance"}  # fmt: skip
    assert {f"preview_{name}" for name in names} <= json.loads(lines[-1]).keys()


def test_recipe_sets_what_no_flag_says():
    config, _ = read_config(["--dry_run", "--recipe", "small", "--lr", "0.5"])
    small = RECIPES["small"]
    assert config == replace(small, lr=0.5, dry_run=True)
    assert config.model.patch_size == 2 and config.noise.prediction_type == "v_prediction"
    original, _ = read_config(["--dry_run", "--recipe", "original"])
    assert original == read_config(["--dry_run"])[0] == TrainConfig(dry_run=True)
    for name, recipe in RECIPES.items():
        assert recipe.recipe == name
        train.DiffusionModel(recipe.model)
