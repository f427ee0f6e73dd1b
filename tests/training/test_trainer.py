"""A training's files, figures and previews, through src/train.py on a tiny world."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import OBJECTS, SMALL_NETWORK, error_of, train_argv
from PIL import Image
from runs import records, same

import test
import train
from diffusion.sampling import sample
from judging.evaluator import evaluate, load_evaluator
from network.checkpoint import load_checkpoint, load_model
from runtime.seeds import picture_seeds
from runtime.settings import DataConfig, SamplingConfig, TrainConfig
from training import trainer
from training.recipes import RECIPES
from training.resume import read_config


def test_run_folder(trained):
    _, output, checkpoint = trained
    run_dir = output / "tiny"
    assert checkpoint == run_dir / "checkpoints" / "model_epoch_4.pth"
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {
        "model_epoch_2.pth", "model_epoch_4.pth",
    }  # fmt: skip
    for epoch in (2, 4):
        assert Image.open(run_dir / "samples" / f"epoch_{epoch}.png").size[0] > 128
    losses = [r for r in records(run_dir) if "loss" in r]
    assert [r["step"] for r in losses] == list(range(1, 13))  # 12 pictures, batch 4, 4 epochs
    assert {"lr", "grad_norm", "images_per_s"} <= losses[0].keys()
    assert [r["epoch"] for r in records(run_dir) if "preview_accuracy" in r] == [2, 4]
    config = json.loads((run_dir / "config.json").read_text())
    assert config["batch_size"] == 4 and config["model"]["block_out_channels"] == [16, 32]


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
    assert records(output / "tiny")[-1]["preview_accuracy"] == accuracy


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
    train.main(train_argv(world, tmp_path, "--epochs", 3, "--log_interval", 2))  # of 3 steps each
    logged = [values for values in records(tmp_path / "r") if "loss" in values]
    assert [values["step"] for values in logged] == [2, 4, 6, 8, 9]
    starts = [0, 2, 4, 6, 8]
    for values, start in zip(logged, starts, strict=True):
        end = values["step"]
        assert values["loss"] == pytest.approx(np.mean([x for x, _ in losses[start:end]]))
        assert values["grad_norm"] == pytest.approx(losses[end - 1][1])
        pictures = 4 * (end - start)
        assert values["images_per_s"] == pytest.approx(pictures / values["seconds"])


def test_bad_preview_steps_are_named_at_once(world, tmp_path):
    argv = [*train_argv(world, tmp_path), "--preview_steps", "7"]
    assert error_of(train.main, argv).startswith("--preview_steps 7")
    assert not (tmp_path / "r").exists()


def test_seed_decides_everything(world, tmp_path):
    def weights(name, seed):
        return load_checkpoint(
            train.main(train_argv(world, tmp_path / name, "--epochs", 1, "--seed", seed))
        ).model

    first, again, other = weights("a", 0), weights("b", 0), weights("c", 1)
    assert same(first, again)
    assert not torch.equal(first["unet.conv_in.weight"], other["unet.conv_in.weight"])


def test_training_learns(world, tmp_path):
    path = train.main(
        train_argv(world, tmp_path, "--epochs", 80, "--lr", 2e-3, "--lr_warmup_steps", 5,
                   "--save_interval", 1000)
    )  # fmt: skip
    losses = [r["loss"] for r in records(path.parents[1]) if "loss" in r]
    assert sum(losses[-20:]) / 20 < 0.6 * sum(losses[:20]) / 20


def test_no_ema_uses_the_plain_weights(world, tmp_path):
    path = train.main(train_argv(world, tmp_path, "--epochs", 1, "--no_ema"))
    checkpoint = load_checkpoint(path)
    assert checkpoint.ema is None
    model = load_model(checkpoint, path, torch.device("cpu"))
    assert torch.equal(model.unet.conv_in.weight, checkpoint.model["unet.conv_in.weight"])


def test_preview_reports_all_figures(trained, tmp_path):
    data, _, _ = trained
    train.main(
        ["--data_dir", str(data), "--output_dir", str(tmp_path), "--epochs", "1", "--wandb",
         "disabled", "--device", "cpu", "--preview_fd_samples", "6", *SMALL_NETWORK]
    )  # fmt: skip
    names = {"accuracy", "exact_sets", "exact_once", "missing", "extra", "color_errors",
             "shape_errors", "frechet_distance"}  # fmt: skip
    assert {f"preview_{name}" for name in names} <= records(tmp_path / "ddpm-cfg-v1")[-1].keys()


def test_recipe_sets_what_no_flag_says():
    config, _ = read_config(["--dry_run", "--recipe", "small", "--lr", "0.5"])
    small = RECIPES["small"]
    assert config == replace(small, lr=0.5, dry_run=True)
    assert config.model.patch_size == 2 and config.noise.prediction_type == "v_prediction"
    tiny = RECIPES["tiny"]
    assert tiny.model.patch_size == 4 and tiny.noise.prediction_type == "sample"
    assert tiny.equal_levels and tiny.objects_power == 2 and tiny.timestep_interval == (0.3, 0.9)
    assert tiny.noise.log_snr_shift == small.noise.log_snr_shift and not small.equal_levels
    original, _ = read_config(["--dry_run", "--recipe", "original"])
    assert original == read_config(["--dry_run"])[0] == TrainConfig(dry_run=True)
    for name, recipe in RECIPES.items():
        assert recipe.recipe == name
        train.DiffusionModel(recipe.model)
