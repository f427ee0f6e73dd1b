"""src/test.py on a tiny world."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OBJECTS, error_of
from PIL import Image

import guidance_scale
import test
import train_evaluator
from iclevr import dataset
from iclevr.dataset import SHIPPED_EVALUATOR
from judging.evaluator import evaluate
from network.checkpoint import load_checkpoint, save_checkpoint
from runtime.settings import DataConfig, TrainConfig


def test_unwritable_folders_are_found_before_the_work(trained, tmp_path, monkeypatch):
    data, _, path = trained
    (tmp_path / "file").touch()
    monkeypatch.setattr("diffusion.sampling.denoise", None)
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path / "file" / "x"]
    for main, more in ((test.main, []), (test.main, ["--prompt", "red cube"]),
                       (guidance_scale.main, [])):  # fmt: skip
        assert "can't be written to" in error_of(main, [*argv, *more])
    argv = ["--data_dir", data, "--out", tmp_path / "file" / "x"]
    assert "can't be written to" in error_of(train_evaluator.main, argv)
    assert "is a folder" in error_of(
        train_evaluator.main, ["--data_dir", data, "--out", tmp_path, "--overwrite"]
    )


def result_folder(output: Path, name: str) -> Path:
    """The one folder of this name and a hash of all settings."""
    (folder,) = (p for p in (output / "tiny").iterdir() if p.name.rsplit("-", 1)[0] == name)
    return folder


def test_testing_needs_only_the_checkpoint(trained, tmp_path):
    data, output, path = trained
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
            "--num_fd_samples", 6, "--wandb", "disabled"]  # fmt: skip
    report = test.main([str(a) for a in argv])
    folder = result_folder(tmp_path, "ddpm20-guidance3")
    for split in ("test", "new_test"):
        assert {p.name for p in (folder / "images" / split).iterdir()} == {
            f"{i}.png" for i in range(4)
        }
        assert Image.open(folder / "images" / split / "0.png").size == (64, 64)
        assert (folder / f"{split}_grid.png").exists()
    assert report["sampling"]["num_inference_steps"] == 20  # all that were trained
    assert json.loads((folder / "accuracies.json").read_text()) == report
    assert Image.open(folder / "denoising.png").size[0] > 8 * 128
    # The pictures on disk, judged on their own, have the accuracy that was reported.
    bench = test.open_bench(path, DataConfig(data_dir=data), "cpu")
    from iclevr.image_cache import read_image

    images = torch.stack(
        [
            torch.from_numpy(read_image(folder / "images" / "test" / f"{i}.png", 64).copy())
            for i in range(4)
        ]
    )
    result = evaluate(bench.judge, images.float() / 127.5 - 1, bench.labels["test"])
    record = report["records"]["test"][0]
    assert result.correct.tolist() == record["correct"]
    assert result.exact.tolist() == record["exact"]
    assert report["frechet_distance"]["mean"] > 0
    assert len(report["nearest_rms"]) == 8
    for name in ("confusion.png", "nearest.png"):
        assert Image.open(folder / name).size[0] > 500
    assert "exact_sets" in (folder / "figures.md").read_text()


def test_several_seeds_give_mean_and_interval(trained, tmp_path):
    data, _, path = trained
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
            "--scheduler", "ddim", "--num_inference_steps", 5, "--num_seeds", 3,
            "--num_fd_samples", 0, "--wandb", "disabled"]  # fmt: skip
    report = test.main([str(a) for a in argv])
    records = report["records"]["test"]
    mean = np.mean([sum(r["correct"]) / sum(r["total"]) for r in records])
    assert report["accuracy"]["test"]["mean"] == pytest.approx(mean)
    assert len(records) == 3
    # Other seeds lie beside them: nothing is lost.
    test.main([str(a) for a in [*argv, "--num_seeds", 1, "--seed", 1]])
    for name in ("ddim5-guidance3-seeds0to2", "ddim5-guidance3-seed1"):
        assert (result_folder(tmp_path, name) / "accuracies.json").exists()


def figures(report: dict) -> dict:
    """All but the command that made them, which names their folder."""
    return {name: value for name, value in report.items() if name != "made_by"}


def test_an_interrupted_test_goes_on(trained, tmp_path, monkeypatch):
    """Draws are kept; the report is that of an uninterrupted test, and settings never mix."""
    data, _, path = trained
    argv = [str(a) for a in [
        "--ckpt_path", path, "--data_dir", data, "--device", "cpu", "--scheduler", "ddim",
        "--num_inference_steps", 5, "--num_seeds", 3, "--num_fd_samples", 4, "--wandb", "disabled",
    ]]  # fmt: skip
    whole = figures(test.main([*argv, "--output_dir", str(tmp_path / "whole")]))
    real, drawn = test.draw_splits, []

    def interrupted(bench, sampling, seed):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(seed)
        return real(bench, sampling, seed)

    monkeypatch.setattr(test, "draw_splits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        test.main([*argv, "--output_dir", str(tmp_path)])
    folder = result_folder(tmp_path, "ddim5-guidance3-seeds0to2")
    with open(folder / "draws.jsonl", "a") as file:
        file.write('\n{}\n3\n{"scale": 3.0, "se')  # no draws, and a line cut short

    def counted(bench, sampling, seed):
        drawn.append(seed)
        return real(bench, sampling, seed)

    monkeypatch.setattr(test, "draw_splits", counted)
    assert figures(test.main([*argv, "--output_dir", str(tmp_path)])) == whole
    assert drawn == [0, 1, 2]
    pictures = sorted(p.relative_to(folder) for p in folder.rglob("*.png"))
    other = result_folder(tmp_path / "whole", "ddim5-guidance3-seeds0to2")
    assert pictures == sorted(p.relative_to(other) for p in other.rglob("*.png"))
    shutil.rmtree(folder / "images")  # they come back, and the other draws aren't made again
    assert figures(test.main([*argv, "--output_dir", str(tmp_path)])) == whole
    assert pictures == sorted(p.relative_to(folder) for p in folder.rglob("*.png"))
    assert drawn == [0, 1, 2, 0]
    # Another judge in a file of the same name: its draws are not taken for these. (Without
    # training pictures, whose features would tell the judges apart, too.)
    (tmp_path / "j").mkdir()
    judge = torch.load(data / "evaluator.pth", weights_only=True)
    for name, value in (("a", 0.4), ("b", 0.6)):
        (tmp_path / "j" / name).mkdir()
        torch.save(judge | {"threshold": value}, tmp_path / "j" / name / "evaluator.pth")
        test.main([*argv, "--output_dir", str(tmp_path), "--image_dir", str(tmp_path / "none"),
                   "--num_fd_samples", "0",
                   "--evaluator", str(tmp_path / "j" / name / "evaluator.pth")])  # fmt: skip
    assert drawn[4:] == [0, 1, 2] * 2


def test_features_of_the_training_pictures_are_computed_only_when_needed(trained, tmp_path):
    data, _, path = trained
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
            "--cache_dir", tmp_path / "cache", "--scheduler", "ddim", "--num_inference_steps", 5,
            "--wandb", "disabled"]  # fmt: skip
    test.main([str(a) for a in [*argv, "--num_fd_samples", 0]])
    assert (result_folder(tmp_path, "ddim5-guidance3") / "nearest.png").exists()
    assert not [*(tmp_path / "cache").glob("features*")]
    distance = test.main([str(a) for a in [*argv, "--num_fd_samples", 4]])["frechet_distance"]
    (features,) = (tmp_path / "cache").glob("features*")
    # Cut short, they are computed again.
    whole = features.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        features.write_bytes(damaged)
        for old in tmp_path.rglob("draws.jsonl"):
            old.unlink()
        again = test.main([str(a) for a in [*argv, "--num_fd_samples", 4]])
        assert again["frechet_distance"] == distance and features.read_bytes() == whole


def test_a_damaged_report_is_left_out_of_the_comparison(trained, tmp_path, capsys):
    data, _, path = trained
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
            "--scheduler", "ddim", "--num_inference_steps", 5, "--wandb", "disabled"]  # fmt: skip
    for content in ("", "3", "{}"):
        (tmp_path / "tiny" / "older").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tiny" / "older" / "accuracies.json").write_text(content)
        test.main([str(a) for a in argv])
        assert "older" in capsys.readouterr().err
        table = (tmp_path / "tiny" / "accuracies.md").read_text()
        assert "ddim5-guidance3" in table and "older" not in table


def test_pictures_guided_by_the_judge_are_marked_and_judged_by_another(trained, tmp_path):
    """Following the judge's gradient pleases that judge; every output says so."""
    data, _, path = trained
    train_evaluator.main(
        ["--data_dir", str(data), "--epochs", "1", "--seed", "1", "--device", "cpu",
         "--out", str(tmp_path / "second.pth")]
    )  # fmt: skip
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
            "--num_seeds", 2, "--num_fd_samples", 0, "--wandb", "disabled"]  # fmt: skip
    guided = [*argv, "--classifier_guidance_scale", 20]
    for scheduler in ("ddpm", "ddim"):
        more = ["--scheduler", scheduler, "--num_inference_steps", 20]
        report = test.main([str(a) for a in [*guided, *more]])
        assert report["judge"] == "trained on data, guided by the judge"
        name = f"{scheduler}20-guidance3-guided_by_the_judge20-seeds0to1"
        folder = result_folder(tmp_path, name)
        assert "guided by the judge" in (folder / "figures.md").read_text()
    assert "guided by the judge" in (tmp_path / "tiny" / "accuracies.md").read_text()

    report = test.main([str(a) for a in [*guided, "--judge", tmp_path / "second.pth"]])
    assert report["judge"] == "trained on data, seed 1, guided by the judge trained on data"
    assert report["other_judge"]["judge"] == "trained on data, guided by the judge"
    assert set(report["other_judge"]["difference"]) == {"test", "new_test"}
    assert result_folder(tmp_path, f"{name}-judge_second".replace("ddim", "ddpm")).is_dir()
    # Another judge in the first one's place lies beside it, too.
    second = ["--scheduler", "ddim", "--num_inference_steps", 5, "--evaluator"]
    report = test.main([str(a) for a in [*argv, *second, tmp_path / "second.pth"]])
    assert report["judge"] == "trained on data, seed 1"
    assert result_folder(tmp_path, "ddim5-guidance3-seeds0to1-evaluator_second").is_dir()

    # More of what it likes: the likelihood of the conditions, by the judge that guides (the
    # shipped one: that of the tiny world has no opinion worth following).
    bench = test.open_bench(path, DataConfig(data_dir=data, evaluator=SHIPPED_EVALUATOR), "cpu")
    likelihoods = []
    for strength in (0, 1000):
        sampling = test.SamplingConfig(classifier_guidance_scale=strength)
        images = test.draw_splits(bench, sampling, 0)["test"][0]
        likelihoods.append(bench.judge.log_likelihood(images, bench.labels["test"]).mean())
    assert likelihoods[1] > likelihoods[0] + 5


def test_prompt_draws_one_scene(trained, tmp_path, capsys):
    data, _, path = trained
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu"]
    picture = test.main([str(a) for a in [*argv, "--prompt", "red sphere, cyan cube"]])
    assert picture.name == "red-sphere_cyan-cube_seed0.png" and picture.exists()
    more = ["--scheduler", "ddim", "--num_inference_steps", 5]
    other = test.main([str(a) for a in [*argv, "--prompt", "red sphere, cyan cube", *more]])
    assert other.name == picture.name and other != picture  # beside each other
    printed = capsys.readouterr().out  # an untrained network's scene is hardly the one asked for
    assert "asked for: red sphere, cyan cube" in printed
    assert "not the same; --seed 1 draws another picture" in printed
    everything = ", ".join(OBJECTS)  # its name would be longer than file systems allow
    picture = test.main([str(a) for a in [*argv, "--prompt", everything, *more]])
    assert picture.name.startswith("24-objects-") and picture.exists()
    assert "unknown object 'red ball'" in error_of(test.main, [*argv, "--prompt", "red ball"])


def test_own_conditions(trained, tmp_path, capsys):
    """Two files side by side, with everything that the course's splits get, and a sweep of one."""
    data, _, path = trained
    mine, pairs = tmp_path / "mine.json", tmp_path / "pairs.json"
    mine.write_text(
        json.dumps([["red cube"], ["cyan cube", "red sphere", "blue cube", "gray cube"]])
    )
    pairs.write_text(json.dumps([["red cube", "cyan sphere"]] * 3))
    common = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path / "out",
              "--device", "cpu", "--num_fd_samples", 0, "--wandb", "disabled"]  # fmt: skip
    argv = [*common, "--scheduler", "ddim", "--num_inference_steps", 4, "--conditions", mine, pairs]
    report = test.main(list(map(str, argv)))
    assert report["asked"]["mine"][0] == ["red cube"] and len(report["asked"]["pairs"]) == 3
    assert set(report["figures"]) == set(report["seen"]) == {"mine", "pairs"}
    folder = result_folder(tmp_path / "out", "ddim4-guidance3-conditions_mine+pairs")
    assert len([*folder.glob("images/mine/*.png")]) == 2
    assert (folder / "pairs_grid.png").exists() and (folder / "confusion.png").exists()
    assert "| pairs |" in (folder / "figures.md").read_text()
    test.main(list(map(str, argv[:-3])))  # the course's: a table of its own
    compared = capsys.readouterr().out
    assert "new_test accuracy" in compared and "pairs accuracy" in compared
    swept = guidance_scale.main(
        [str(a) for a in [*argv[:-1], "--scale_min", 1, "--scale_max", 2, "--scale_step", 1,
                          "--num_seeds", 2]]
    )  # fmt: skip
    assert set(swept["rows"][0]) == {"guidance_scale", "mine", "mean"}
    other = tmp_path / "other" / "mine.json"
    other.parent.mkdir()
    other.write_bytes(mine.read_bytes())
    assert "'mine' is taken" in error_of(test.main, [*argv[:-1], other])
    pairs.write_text(json.dumps([["red cube", "red ball"]]))
    assert "pairs.json: entry 0: unknown object 'red ball'" in error_of(test.main, argv)
    assert "none.json" in error_of(test.main, [*argv[:-1], tmp_path / "none.json"])
    for name in ("mean", "guidance_scale", "frechet_distance"):  # these stand beside the splits
        taken = [*common, "--conditions", tmp_path / f"{name}.json"]
        assert f"'{name}' is taken" in error_of(guidance_scale.main, taken)
    assert "--conditions" in error_of(test.main, argv[:-2])  # such as an unset variable
    one_scene = [*argv, "--prompt", "red cube"]
    assert "goes with none of --prompt" in error_of(test.main, one_scene)


def test_a_prompt_without_an_object(trained, tmp_path):
    data, _, path = trained
    argv = ["--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
            "--scheduler", "ddim", "--num_inference_steps", 4, "--prompt", "red cube"]  # fmt: skip
    plain = test.main(list(map(str, argv)))
    more = ["--without", "gray sphere, cyan cube", "--compose", "objects"]
    picture = test.main(list(map(str, [*argv, *more])))
    assert picture.stem == "red-cube_without-gray-sphere_without-cyan-cube_seed0"
    assert "compose_objects" in picture.parent.name
    assert picture.read_bytes() != plain.read_bytes()
    again = test.main([str(a) for a in [*argv[:8], "--from_json", picture.with_suffix(".json")]])
    assert again.name == picture.name and again.read_bytes() == picture.read_bytes()
    both = error_of(test.main, [*argv, "--without", "red cube"])
    assert "'red cube' is asked for and must not come" in both
    assert "goes with --prompt" in error_of(test.main, [*argv[:-2], "--without", "red cube"])
    described = picture.with_suffix(".json")
    file = tmp_path / "other.json"
    file.write_text(described.read_text().replace("gray sphere", "gray ball"))
    assert str(file) in error_of(test.main, [*argv[:8], "--from_json", file])
    add = ["--from_json", described, "--add", "blue cube", "--to", picture]
    assert f"({described}): does not go with --add" in error_of(test.main, [*argv[:8], *add])
    assert "--without 'red ball'" in error_of(test.main, [*argv, "--without", "red ball"])


def test_an_object_is_added(tmp_path, capsys):
    """With the pretrained network and its judge, as a user would."""
    argv = ["--output_dir", tmp_path, "--device", "cpu", "--data_dir", SHIPPED_EVALUATOR.parent]
    few = ["--num_inference_steps", 12, "--scheduler", "ddpm"]
    first = test.main([str(a) for a in [*argv, *few, "--prompt", "blue cube", "--seed", 1]])
    added = [*argv, *few, "--resample", 4, "--add", "red sphere", "--to", first]
    picture = test.main(list(map(str, added)))
    out = capsys.readouterr().out
    assert "the picture shows: blue cube (its JSON)" in out
    assert "no value changed by more than 0 of 255" in out
    report = json.loads(picture.with_suffix(".json").read_text())
    assert "blue cube" in report["seen"] and report["added"] == ["red sphere"]
    before, after = (np.asarray(Image.open(path)).astype(int) for path in (first, picture))
    changed = (np.abs(after - before).max(-1) > 0).mean()
    assert 0 < changed <= report["share_drawn_anew"] < 0.2
    assert picture.with_name(f"{picture.stem}_steps.png").exists()
    plain = tmp_path / "plain.png"
    shutil.copy(first, plain)
    main = test.main
    message = error_of(main, [*added[:-3], "blue cube", "--to", plain])
    assert "already; if it is not, fill in --prompt" in message
    assert "the picture shows: blue cube (judge: stand-in)" in capsys.readouterr().out
    assert "--add 'red ball'" in error_of(main, [*added[:-3], "red ball", "--to", plain])
    assert "use both" in error_of(main, added[:-2])
    assert "none.png" in error_of(main, [*added[:-1], tmp_path / "none.png"])
    main([str(a) for a in [*added[:-1], plain, "--prompt", "blue cube, gray cube"]])
    text = "not there, as before: gray cube; say with --prompt what the picture shows"
    assert text in capsys.readouterr().out  # no seed brings it
    Image.new("RGB", (300, 40), (166, 166, 166)).save(plain)
    capsys.readouterr()
    assert "the judge sees no object" in error_of(main, [*added[:-1], plain])
    assert f"{plain}: is 300x40, taken as 64x64" in capsys.readouterr().err
    Image.new("RGB", (64, 64), (166, 166, 166)).save(plain)
    assert "the judge sees no object" in error_of(main, [*added[:-1], plain])


def test_a_prompt_needs_no_judge(trained, tmp_path, monkeypatch, capsys):
    data, _, path = trained
    monkeypatch.setattr(dataset, "SHIPPED_EVALUATOR", tmp_path / "none")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*.pth", ".cache"))
    argv = ["--ckpt_path", path, "--data_dir", tmp_path / "data", "--output_dir", tmp_path,
            "--device", "cpu", "--scheduler", "ddim", "--num_inference_steps", 5]  # fmt: skip
    prompt = [*argv, "--prompt", "red cube"]
    assert test.main([str(a) for a in prompt]).exists()
    out, error = capsys.readouterr()
    assert "judge: none" in out and "sees" not in out
    assert "--mixed_precision fp8 of accelerate launch is not taken" in error
    for more in (argv, [*prompt, "--classifier_guidance_scale", 1]):
        assert "no evaluator in the data folder" in error_of(test.main, more)


def test_checkpoint_of_other_objects_is_refused(trained, tmp_path):
    data, _, path = trained
    checkpoint = load_checkpoint(path)
    swapped = dict(checkpoint.objects) | {"gray cube": 1, "red cube": 0}
    save_checkpoint(tmp_path / "c.pth", replace(checkpoint, objects=swapped))
    message = error_of(test.main, ["--ckpt_path", tmp_path / "c.pth", "--data_dir", data])
    assert "objects.json" in message


@pytest.mark.parametrize("damage", ["truncated", "empty", "other format", "other network"])
def test_damaged_checkpoints_are_refused(trained, tmp_path, damage):
    data, _, path = trained
    bad = tmp_path / "bad.pth"
    if damage == "truncated":
        bad.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "empty":
        bad.touch()
    elif damage == "other format":
        torch.save({"model": {}}, bad)
    else:
        checkpoint = load_checkpoint(path)
        save_checkpoint(bad, replace(checkpoint, config=TrainConfig()))
    assert "bad.pth" in error_of(test.main, ["--ckpt_path", bad, "--data_dir", data])
