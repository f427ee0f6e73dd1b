"""src/guidance_scale.py on a tiny world."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import guidance_scale
import test
from judging.bench import Draw
from judging.sweep import indistinguishable, summarise_sweep, verdict


@pytest.fixture
def sweep_argv(trained, tmp_path):
    data, _, path = trained
    return [str(a) for a in [
        "--ckpt_path", path, "--data_dir", data, "--output_dir", tmp_path, "--device", "cpu",
        "--num_fd_samples", 4, "--num_inference_steps", 5, "--scale_max", 3, "--scale_step", 1,
        "--num_seeds", 2,
        "--wandb", "disabled",
    ]]  # fmt: skip


def test_sweep_writes_table_chart_and_json(sweep_argv, tmp_path):
    report = guidance_scale.main(sweep_argv)
    (folder,) = (tmp_path / "tiny" / "guidance_scale").iterdir()
    assert [row["guidance_scale"] for row in report["rows"]] == [1, 2, 3]
    with open(folder / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["guidance_scale"]) for row in rows] == [1, 2, 3]
    assert float(rows[1]["test_accuracy"]) == pytest.approx(
        report["rows"][1]["test"]["accuracy"]["mean"], abs=1e-4
    )
    assert report["verdict"] in (folder / "sweep.md").read_text()
    assert Image.open(folder / "sweep.png").size[0] > 500
    assert json.loads((folder / "sweep.json").read_text())["best"] == report["best"]
    # One scale is what the test script says for the same seeds.
    argv = sweep_argv[: sweep_argv.index("--scale_max")]
    tested = test.main(
        [*argv, "--scheduler", "ddim", "--guidance_scale", "2", "--num_seeds", "2",
         "--wandb", "disabled"]
    )  # fmt: skip
    # Beside each other with another way of sampling.
    test.main([*argv[:-2], "--scheduler", "ddpm", "--wandb", "disabled"])
    table = (tmp_path / "tiny" / "accuracies.md").read_text()
    assert "ddim5-guidance2" in table and "ddpm20-guidance3" in table
    assert tested["figures"]["test"] == report["rows"][1]["test"]
    assert tested["frechet_distance"] == report["rows"][1]["frechet_distance"]


def test_sweep_goes_on_where_it_was_interrupted(sweep_argv, tmp_path, monkeypatch):
    whole = guidance_scale.main([*sweep_argv, "--output_dir", str(tmp_path / "whole")])
    drawn = []
    real = guidance_scale.draw_splits

    def interrupted(bench, sampling, seed, **kw):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append((sampling.guidance_scale, seed))
        return real(bench, sampling, seed, **kw)

    monkeypatch.setattr(guidance_scale, "draw_splits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        guidance_scale.main(sweep_argv)
    (folder,) = (tmp_path / "tiny" / "guidance_scale").iterdir()
    with open(folder / "draws.jsonl", "a") as file:
        file.write('\n{"scale": 3.0, "se')  # a line cut short

    def count(bench, sampling, seed, **kw):
        drawn.append((sampling.guidance_scale, seed))
        return real(bench, sampling, seed, **kw)

    monkeypatch.setattr(guidance_scale, "draw_splits", count)
    resumed = guidance_scale.main(sweep_argv)
    assert len(drawn) == len(set(drawn)) == 6
    assert resumed["rows"] == whole["rows"]
    # Other settings do not pick up these draws.
    guidance_scale.main([*sweep_argv, "--eta", "0.5"])
    assert len(drawn) == 12
    guidance_scale.main([*sweep_argv, "--batch_size", "3"])  # does not change a picture
    assert len(drawn) == 12


def test_sweep_logs_to_wandb(sweep_argv, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    guidance_scale.main([*sweep_argv, "--num_seeds", "1", "--wandb", "offline"])
    (run_dir,) = tmp_path.glob("tiny/guidance_scale/*/wandb/offline-run-*")
    media = run_dir / "files" / "media"
    (table,) = (media / "table").glob("guidance_sweep_*.json")
    assert len(json.loads(table.read_text())["data"]) == 3
    assert len(list((media / "images").glob("guidance_chart_*.png"))) == 1


def test_scale_ranges():
    def scales(*flags):
        argv = ["--ckpt_path", "x", *flags]
        return guidance_scale.guidance_scales(
            guidance_scale.parse_args(guidance_scale.SweepConfig, argv)
        )

    assert scales() == [1 + 0.5 * i for i in range(19)]
    assert scales("--scale_min", "0", "--scale_max", "0.3", "--scale_step", "0.1") == [
        0,
        0.1,
        0.2,
        0.3,
    ]
    for flags in (("--scale_max", "0"), ("--scale_step", "1e-9")):
        with pytest.raises(guidance_scale.UserError):
            scales(*flags)


def fake_record(rng, asked, rate):
    correct = rng.binomial(asked, rate)
    zero = [0] * len(asked)
    return {"total": asked, "correct": correct.tolist(),
            "exact": (correct == asked).astype(int).tolist(),
            "once": (correct == asked).astype(int).tolist(), "missing": zero, "extra": zero,
            "color_errors": zero, "shape_errors": zero}  # fmt: skip


def test_best_scale_by_frechet_distance_is_the_smallest():
    rng = np.random.default_rng(0)
    asked = {"test": [1, 2], "new_test": [2, 3]}
    draws = {
        (scale, seed): Draw({s: fake_record(rng, asked[s], 0.5) for s in asked}, value + seed)
        for scale, value in ((1.0, 5.0), (2.0, 3.0), (3.0, 9.0))
        for seed in (0, 1)
    }
    summary = summarise_sweep(draws, [1.0, 2.0, 3.0], [0, 1])
    assert summary["best"]["frechet_distance"] == {"scale": 2.0, "equals": []}
    assert summary["rows"][2]["frechet_distance"]["mean"] == 9.5


def test_best_scale_and_its_equals():
    """Scale 3 beats 1 on most pictures; 2 differs from 3 by noise only."""
    rng = np.random.default_rng(0)
    asked = {"test": [1] * 6 + [2] * 12 + [3] * 14, "new_test": [2] * 12 + [3] * 20}
    rates = {1.0: 0.5, 2.0: 0.8, 3.0: 0.8}
    for seeds in ([0], [0, 1, 2, 3]):
        draws = {
            (scale, seed): Draw({s: fake_record(rng, asked[s], rate) for s in asked})
            for scale, rate in rates.items()
            for seed in seeds
        }
        summary = summarise_sweep(draws, [1.0, 2.0, 3.0], seeds)
        best = summary["best"]["accuracy"]
        assert {best["scale"], *best["equals"]} == {2.0, 3.0}
        assert f"best by accuracy: guidance scale {best['scale']:g}" in verdict(summary)
        assert f"95%): {best['equals'][0]:g}" in verdict(summary)
        assert "best by exact sets" in verdict(summary) and "frechet" not in verdict(summary)
        for row in summary["rows"]:
            mean = np.mean(
                [
                    sum(draws[row["guidance_scale"], seed].records[s]["correct"]) / sum(asked[s])
                    for s in asked
                    for seed in seeds
                ]
            )
            assert row["mean"]["accuracy"]["mean"] == pytest.approx(mean)
            assert row["mean"]["accuracy"]["low"] < mean < row["mean"]["accuracy"]["high"]
    shares = {1.0: np.array([0.5, 0.4, 0.5, 0.6]), 2.0: np.array([0.9, 1.0, 0.9, 0.8])}
    assert indistinguishable(shares, 2.0) == []
