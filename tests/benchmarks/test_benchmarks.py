"""What the benchmarks' figures hang on: flags, time, and the scripts that train at toy size."""

import importlib
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL_NETWORK, error_of
from PIL import Image

import ablations
import adding
import composition
import drawn_twice
import first_picture
import input_pipeline
import page_pictures
import sampling_steps
import time_to_accuracy
import training_runs
import training_step
import two_checkouts
import without
from common import model_flags

from network.checkpoint import load_checkpoint, save_checkpoint
from runtime.seeds import picture_seeds
from runtime.settings import ModelConfig, SamplingConfig, TrainConfig, parse_args
from training.recipes import RECIPES

SCRIPTS = {path.stem for path in Path(ablations.__file__).parent.glob("*.py")}
NO_SCRIPTS = {"common", "training_runs", "gpu_job", "gpu_speed", "gpu_training"}


@pytest.mark.parametrize("name", sorted(SCRIPTS - NO_SCRIPTS))
def test_every_benchmark_starts(name):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize(
    "model",
    [
        RECIPES["small"].model,
        RECIPES["original"].model,
        ModelConfig(halve_every_block=True, norm_num_groups=8, dropout=0.1),
    ],
)
def test_flags_of_a_network_make_the_network(model):
    assert parse_args(TrainConfig, shlex.split(model_flags(model))).model == model


@pytest.mark.parametrize("recipe", ablations.VARIANTS)
def test_variants_change_what_they_say(recipe):
    """Every flag is one of src/train.py's, and none repeats what the recipe has anyway."""
    base = RECIPES[recipe]
    for name, (flags, _) in ablations.VARIANTS[recipe].items():
        config = parse_args(TrainConfig, shlex.split(flags), base)
        assert (config == base) is (name == ablations.BASE)


def test_ablations_train_the_recipe_and_its_variants(tmp_path, monkeypatch):
    trained = {}
    monkeypatch.setattr(ablations, "train_equally_long", lambda flags, *_: trained.update(flags))
    monkeypatch.setattr(ablations, "latest_checkpoint", lambda folder: folder / "x.pth")
    share = {"mean": 0.5, "low": 0.4, "high": 0.6}

    def score_all(found, data, sampling, num_seeds, path, notes):
        assert found["v"] == tmp_path / "tiny" / "v" / "x.pth" and path.parent == tmp_path / "tiny"
        base = {"accuracy": share, "exact_sets": share, "minutes": 7, "pictures": 64}
        points = {name: base | {"draws": {"accuracy": [0.4, 0.6]}} for name in found}
        return {"points": points, "judge": "j", "machine": {"device": "cpu"}, "seeds": num_seeds}

    monkeypatch.setattr(ablations, "score_all", score_all)
    argv = ["--recipe", "tiny", "--output_dir", str(tmp_path)]
    ablations.main(argv)
    assert trained == {
        name: f"--recipe tiny {flags}" for name, (flags, _) in ablations.OF_TINY.items()
    }
    trained.clear()
    ablations.main([*argv, "--variants", "v"])
    assert [*trained] == [ablations.BASE, "v"]
    assert "predicts v" in (tmp_path / "tiny" / "ablations.md").read_text()
    assert "adamw: unknown for --recipe tiny" in error_of(
        ablations.main, [*argv, "--variants", "adamw"]
    )


def test_time_is_that_of_the_steps(tmp_path):
    """A run that was resumed: the seconds of its records, wherever the steps between them went."""
    lines = [
        {"step": 20, "images_per_s": 32.0, "seconds": 10.0},
        {"step": 20, "preview_accuracy": 0.5},
        {"step": 40, "images_per_s": 1.6, "seconds": 20.0},
        {"step": 60, "images_per_s": 64.0, "seconds": 30.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert training_runs.minutes_trained(tmp_path) == 1
    assert training_runs.minutes_trained(tmp_path, until=59) == 0.5
    assert [r["minutes"] for r in training_runs.records(tmp_path)] == [1 / 6, 1 / 6, 0.5, 1]


def test_both_recipes_are_trained_and_scored(trained, tmp_path, monkeypatch):
    data, _, _ = trained
    monkeypatch.setattr(training_runs, "PROBED_STEPS", 2)
    network = shlex.join(SMALL_NETWORK[: SMALL_NETWORK.index("--preview_steps")])
    argv = ["--minutes", 0.01, "--num_checkpoints", 1, "--num_seeds", 2, "--data_dir", data,
            "--output_dir", tmp_path / "out", "--num_inference_steps", 5,
            f"--network={network} --preview_steps 5 --lr_warmup_steps 0"]  # fmt: skip
    report = time_to_accuracy.main([str(a) for a in argv])
    assert {name.split("/")[0] for name in report["points"]} == {"original", "ours"}
    for recipe in time_to_accuracy.FLAGS:
        points = time_to_accuracy.points(report, recipe)
        assert points[-1]["minutes"] > 0 and 0 <= points[-1]["accuracy"]["mean"] <= 1
    assert (tmp_path / "out" / "time_to_accuracy.png").exists()
    # A second start trains and draws nothing.
    monkeypatch.setattr(training_runs, "draw_splits", None)
    monkeypatch.setattr(training_runs.subprocess, "Popen", type("NoProcess", (), {}))
    assert time_to_accuracy.main([str(a) for a in argv]) == report
    argv[1] = 0.02
    assert "other settings" in error_of(time_to_accuracy.main, argv)


def test_two_checkouts_take_turns(trained, tmp_path):
    data, _, _ = trained
    argv = ["--other", two_checkouts.ROOT, "--rounds", 1, "--steps", 5, "--data_dir", data,
            f"--more={shlex.join(SMALL_NETWORK)} --epochs 50",
            "--out", tmp_path / "out.json"]  # fmt: skip
    report = two_checkouts.main([str(a) for a in argv])
    assert report["times_as_fast"]["median"] > 0 and (tmp_path / "out.json").exists()
    assert "no checkout" in error_of(two_checkouts.main, ["--other", tmp_path])
    argv[-3] = "--more=--lr 0"
    assert "training ends with" in error_of(two_checkouts.main, argv)


NETWORK = SMALL_NETWORK[: SMALL_NETWORK.index("--num_train_timesteps")]


@pytest.mark.parametrize("more", [[], ["--num_pictures", 6, "--num_workers", 1]])
def test_steps_and_loaders_are_measured(more, tmp_path):
    benchmark, key = (input_pipeline, "ratio") if more else (training_step, "variants")
    argv = ["--batch_size", 2, "--rounds", 1, "--steps", 1, "--device", "cpu", *NETWORK, *more,
            "--out", tmp_path / "out.json"]  # fmt: skip
    benchmark.main([str(a) for a in argv])
    assert json.loads((tmp_path / "out.json").read_text())[key]


def test_a_failed_training_is_named_and_the_others_go_on(trained, tmp_path):
    data, _, _ = trained
    rest = shlex.join(SMALL_NETWORK) + " --device cpu --max_train_steps 1"
    runs = {
        "bad": training_runs.Run(f"--lr_warmup_steps -1 {rest}", 1),
        "good": training_runs.Run(rest, 1),
    }
    config = training_runs.DataConfig(data_dir=data)
    with pytest.raises(training_runs.UserError, match=r"bad \(2\)$"):
        training_runs.train_all(runs, tmp_path, config)
    assert training_runs.latest_whole_checkpoint(tmp_path / "good")


def test_samplers_are_compared_and_draws_kept(trained, tmp_path, monkeypatch):
    data, _, path = trained
    checkpoint = load_checkpoint(path)
    noise = replace(checkpoint.config.noise, num_train_timesteps=100)
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, noise=noise))
    save_checkpoint(tmp_path / "100.pth", checkpoint)
    steps = {"ddpm": (50, 20), "ddim": (10, 7), "dpmpp": (5,)}
    monkeypatch.setattr(sampling_steps, "STEPS", steps)
    monkeypatch.setattr(sampling_steps, "LONG", 20)
    again = {"ddpm 5, again": {"num_inference_steps": 5, "resample": 2},
             "ddpm 5, best of 2": {"num_inference_steps": 5, "best_of": 2}}  # fmt: skip
    monkeypatch.setattr(sampling_steps, "RESAMPLED", again)
    argv = ["--ckpt_path", tmp_path / "100.pth", "--data_dir", data, "--output_dir", tmp_path,
            "--device", "cpu", "--num_seeds", 2, "--num_fd_samples", 4, "--rounds", 1,
            "--timed_pictures", 1, "--max_evaluations", 60]  # fmt: skip
    report = sampling_steps.main([str(a) for a in argv])
    # 50 steps take too many; 7 do not divide 100; a guided step counts twice, in the interval only.
    assert {name: row["evaluations"] for name, row in report["rows"].items()} == {
        "ddpm 20": 40, "ddim 10": 20, "dpmpp 5": 10, "dpmpp 5, guided in 0.2-1": 9,
        "dpmpp 5, guided in 0.4-1": 8, "ddpm 5, again": 20,
        "ddpm 5, best of 2": 2 * (10 + 6 * (1 + 15 / 8)),
    }  # fmt: skip
    for row in report["rows"].values():
        assert 0 <= row["accuracy"]["mean"] <= 1 and row["frechet_distance"]["mean"] > 0
    best = report["rows"][report["best_long"]]
    assert best["accuracy_minus_best_long"]["mean"] == 0
    assert report["ratio"]["median"] > 0
    (picture,) = tmp_path.rglob("sampling_steps.png")
    assert picture.parent.name.startswith("tiny-guidance3-")
    monkeypatch.setattr(sampling_steps, "draw_splits", None)  # a second start draws nothing
    assert sampling_steps.main([str(a) for a in argv])["rows"] == report["rows"]


def test_composition_at_equal_evaluations(trained, tmp_path, monkeypatch):
    data, _, path = trained
    copy = shutil.copytree(data, tmp_path / "data")
    two = [["red cube", "cyan sphere"], ["gray cube", "blue sphere"]]
    (copy / "unseen.json").write_text(json.dumps([["red cube"], *two, *two]))
    (copy / "four.json").write_text(json.dumps([two[0] + two[1]]))
    checkpoint = load_checkpoint(path)
    noise = replace(checkpoint.config.noise, num_train_timesteps=100)
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, noise=noise))
    save_checkpoint(tmp_path / "100.pth", checkpoint)
    argv = ["--ckpt_path", tmp_path / "100.pth", "--data_dir", copy, "--output_dir", tmp_path,
            "--device", "cpu", "--num_seeds", 2, "--budget", 80, "--max_conditions", 4]  # fmt: skip
    report = composition.main([str(a) for a in argv])
    assert list(report["rows"]) == ["unseen", "four"]
    rows = report["rows"]["four"]
    assert {way: (row["steps"], row["evaluations"]) for way, row in rows.items()} == {
        "joint": (25, 50), "objects": (10, 50), "both": (10, 60), "each step 4 times": (10, 80),
        "best of 2": (5, 2 * (10 + 6 * 5)),
    }  # fmt: skip
    assert rows["joint"]["minus_joint"]["accuracy"]["mean"] == 0
    assert report["rows"]["unseen"]["both"]["conditions"] == 4
    with Image.open(next(tmp_path.rglob("composition.png"))) as picture:
        assert picture.size[0] > 800
    monkeypatch.setattr(composition, "draw_splits", None)  # a second start draws nothing
    assert composition.main([str(a) for a in argv])["rows"] == report["rows"]


def test_objects_are_added(trained, tmp_path, monkeypatch):
    data, _, path = trained
    one = {"each step once": adding.SamplingConfig(scheduler="ddim", num_inference_steps=4)}
    monkeypatch.setattr(adding, "WAYS", one)
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
            "--num_seeds", 2, "--num_pictures", 3]  # fmt: skip
    # The tiny world's pictures are noise, in which no place is free; and its labels no sequences.
    copy = shutil.copytree(data, tmp_path / "data")
    argv[3] = copy
    assert "no sequence" in error_of(adding.main, argv)
    train = json.loads((copy / "train.json").read_text())
    names = ["red cube", "cyan sphere", "gray cube"]
    for i, name in enumerate(train):
        train[name] = names[: i % 3 + 1]
        Image.new("RGB", (20, 15), (120, 120, 120)).save(copy / "iclevr" / name)
    (copy / "train.json").write_text(json.dumps(train))
    report = adding.main([str(a) for a in argv])
    row = report["rows"]["each step once"]
    assert row["evaluations"] == 8 and all(0 <= row[name]["mean"] <= 1 for name in adding.FIGURES)
    assert [*tmp_path.rglob("each_step_once.png")] and [*tmp_path.rglob("adding.md")]


def test_drawn_twice_compares_ways_of_sampling(trained, tmp_path):
    data, _, path = trained
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
            "--num_seeds", 2, "--guidance_scales", 2, "--resamples", 1, 2,
            "--num_inference_steps", 5, 10, "--max_evaluations", 20]  # fmt: skip
    report = drawn_twice.main([str(a) for a in argv])
    assert {way: row["evaluations"] for way, row in report["rows"].items()} == {
        "5 steps, guidance 2, each step 1 times": 10,
        "5 steps, guidance 2, each step 2 times": 20,
        "10 steps, guidance 2, each step 1 times": 20,
    }
    for row in report["rows"].values():
        assert 0 <= row["right"]["mean"] <= min(row["exact"]["mean"], 1 - row["twice"]["mean"])
    assert report["training_pictures"]["low"] >= 0
    assert len([*tmp_path.rglob("*.png")]) == 3 and [*tmp_path.rglob("drawn_twice.md")]
    (tmp_path / "gray.json").write_text('[["gray cube", "red cube"]]')
    message = error_of(drawn_twice.main, [*argv, "--conditions", tmp_path / "gray.json"])
    assert message.startswith("--conditions: all hold gray objects")
    message = error_of(drawn_twice.main, [*argv, "--max_evaluations", 9])
    assert message == "--max_evaluations 9: leaves nothing to compare"


def test_what_without_keeps_out_is_measured(trained, tmp_path):
    data, _, path = trained
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
            "--num_seeds", 2, "--num_inference_steps", 5]  # fmt: skip
    rows = without.main([str(a) for a in argv])["rows"]
    assert rows.keys() == without.FIGURES.keys()
    for row in rows.values():
        less = row["--without"]["mean"] - row["plain"]["mean"]
        assert row["difference"]["mean"] == pytest.approx(less)
    assert len([*tmp_path.rglob("without.*")]) == 2
    assert "heeds nothing" in error_of(without.main, [*argv, "--guidance_scale", 0])


def test_what_came_unasked_is_drawn_again_without_it_and_from_other_noise():
    """A network that draws what it should and, from seed 0's noise, object 3 unless unwanted."""
    asked = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]])
    drawn = []

    def sample(labels, seeds, _):
        drawn.append((labels, seeds))
        shown = labels.clamp(min=0)
        if seeds == picture_seeds(0, 3):
            shown[:, 3] = (labels[:, 3] >= 0).float()
        return (shown[:, None, None, :] - 0.5).expand(-1, 3, 1, -1), None

    judge = SimpleNamespace(
        scores=lambda images: images[:, 0, 0] + 0.5, threshold=0.5,
        objects=dict(zip("abcd", range(4), strict=True)),
    )  # fmt: skip
    bench = SimpleNamespace(judge=judge, sample=sample)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("judging.evaluator.too_many", lambda images, *_: torch.zeros(len(images)))
        patch.setattr(without, "choose_unwanted", lambda *_: torch.eye(4)[[1, 0, 1]])
        patch.setattr("judging.evaluator.check_range", lambda _: None)
        (plain, less), shown = without.both_ways(bench, asked, 0, SamplingConfig(), 7)
    assert plain == {"accuracy": 1, "exact": pytest.approx(1 / 3), "unasked": 0, "mended": 1}
    assert less == {"accuracy": 1, "exact": pytest.approx(1 / 3), "unasked": 0, "mended": 1}
    assert len(shown) == 3 * 2 and (shown[:2, 0, 0, 3] == 0.5).all()  # of the first and the third
    labels, seeds = zip(*drawn, strict=True)
    assert [s == picture_seeds(0, 3) for s in seeds] == [True, False, True, True]
    minus = (asked - torch.stack(labels)).nonzero().tolist()
    assert minus == [[2, 0, 3], [2, 2, 3], [3, 0, 1], [3, 1, 0], [3, 2, 1]]


def test_what_is_unwanted_is_not_asked_for():
    asked = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 0]]).repeat(20, 1)
    chosen = without.choose_unwanted(asked, seed=3)
    assert (chosen.sum(dim=1) == 1).all() and not (chosen * asked).any()
    assert torch.equal(chosen, without.choose_unwanted(asked, seed=3))
    assert len({*map(tuple, chosen[::2].tolist())}) == 2  # now one of both, now the other


@pytest.mark.parametrize("script", [page_pictures, first_picture])
def test_without_a_browser_nothing_is_served(script, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("app.serve", None)
    assert error_of(script.main, []).startswith("chromium: not found")
