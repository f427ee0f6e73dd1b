"""The judge: the course's accuracy, its file format, and training one."""

import json
import os
import signal

import pytest
import torch
from conftest import OBJECTS, error_of

import train_evaluator
from iclevr import dataset
from iclevr.placement import sample_sequence
from iclevr.ray_tracer import render_picture
from judging.augmentation import disturb
from judging.evaluator import (
    COURSE_BLOB,
    Evaluator,
    build_evaluator,
    course_correct,
    evaluate,
    git_blob_hash,
    load_evaluator,
)
from runtime.settings import ROOT, UserError
from training import classifier
from training.classifier import split_by_sequence


def plain_accuracy(scores, labels):
    """The course's definition, object by object; of equal scores the lower index counts."""
    correct = total = 0
    for score, label in zip(scores.tolist(), labels.tolist(), strict=True):
        k = int(sum(label))
        top = sorted(range(len(score)), key=lambda i: (-score[i], i))[:k]
        correct += sum(label[i] == 1 for i in top)
        total += k
    return correct / total


@pytest.mark.parametrize("ties", [False, True])
def test_accuracy_equals_the_plain_definition(ties):
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.rand(32, 24, generator=g)
        if ties:
            scores = (scores * 3).round() / 3
        labels = torch.zeros(32, 24)
        for row in labels:
            k = int(torch.randint(1, 4, (1,), generator=g))
            row[torch.randperm(24, generator=g)[:k]] = 1
        accuracy = course_correct(scores, labels).sum().item() / labels.sum().item()
        assert accuracy == plain_accuracy(scores, labels)


def test_constructed_cases():
    labels = torch.zeros(4, 24)
    labels[:, [0, 9, 22]] = 1
    scores = torch.full((4, 24), 0.1)
    scores[0, [0, 9, 22]] = 0.9  # all there
    scores[1, [0, 9, 22, 5]] = torch.tensor([0.9, 0.8, 0.7, 0.6])  # an extra object: not punished
    scores[2, [0, 9, 6]] = 0.9  # one missing, another in its place
    scores[3, [1, 2, 3]] = 0.9  # all wrong
    assert course_correct(scores, labels).tolist() == [3, 3, 2, 0]


class _Fixed(torch.nn.Module):
    """Scores that depend on the mean of a 64x64 picture."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        assert x.shape[1:] == (3, 64, 64)
        scores = torch.zeros(len(x), 24)
        scores[range(len(x)), (x.mean(dim=(1, 2, 3)) > 0).long()] = 1
        return scores


@pytest.mark.parametrize("size", [32, 64, 100])
def test_evaluate_resizes_and_counts(size):
    judge = Evaluator(_Fixed(), "fixed", None, OBJECTS)
    images = torch.stack([torch.full((3, size, size), v) for v in (-0.5, 0.5, 0.5)])
    labels = torch.zeros(3, 24)
    labels[range(3), [0, 1, 0]] = 1
    result = evaluate(judge, images, labels)
    assert result.correct.tolist() == [1, 1, 0] and result.total.tolist() == [1, 1, 1]
    assert result.accuracy == pytest.approx(2 / 3)


def test_pictures_in_another_range_are_refused():
    judge = Evaluator(_Fixed(), "fixed", None, OBJECTS)
    labels = torch.eye(24)[:2]
    pictures = render_picture(sample_sequence(0, 0), 1, 64, 64, 4)
    real = (
        dataset.normalize(torch.from_numpy(pictures)).permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    )
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, 64, 64, generator=g) * 2 - 1
    white = torch.ones(2, 3, 64, 64)
    for images in (real, noise, noise.sign(), white, white * 0, white * 0.5 + noise * 0.1, -white,
                   real * 1.05, noise * 1e-3):  # fmt: skip
        evaluate(judge, images, labels)
    for images in (real / 2 + 0.5, (real / 2 + 0.5) * 255, noise / 2 + 0.5, real * 8, white * 255,
                   real / 0.5 - 1, noise * torch.nan):  # fmt: skip
        with pytest.raises(ValueError, match="not in"):
            evaluate(judge, images, labels)


def test_course_file_is_recognised_by_its_hash(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": build_evaluator().state_dict(), "epoch": 3}, path)
    assert load_evaluator(path, OBJECTS).name == "unknown weights"
    monkeypatch.setattr("judging.evaluator.COURSE_BLOB", git_blob_hash(path))
    assert load_evaluator(path, OBJECTS).name == "course"
    assert len(COURSE_BLOB) == 40
    (tmp_path / "a").write_bytes(b"hello\n")
    assert git_blob_hash(tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_contract_of_the_network():
    judge = build_evaluator()
    assert [type(m).__name__ for m in judge.fc] == ["Linear", "Sigmoid"]
    assert judge.fc[0].in_features == 512 and judge.fc[0].out_features == 24
    scores = judge.eval()(torch.zeros(2, 3, 64, 64))
    assert scores.shape == (2, 24) and ((scores > 0) & (scores < 1)).all()


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_weights_as_others_save_them(tmp_path, key, prefix):
    plain = build_evaluator().state_dict()
    named = {prefix + name: value for name, value in plain.items()}
    torch.save({key: named, "epoch": 3} if key else named, tmp_path / "e.pth")
    judge = load_evaluator(tmp_path / "e.pth", OBJECTS)
    ours = judge.model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "not found"),
        (b"", "damaged"),
        (b"garbage", "damaged"),
        ({"weights": 1}, "no entry 'model'"),
        ([1, 2], "holds a list"),
        ({"model": {"conv1.weight": torch.zeros(1)}}, "ResNet18 with 24 scores"),
        ({"model": {1: 2}}, "ResNet18 with 24 scores"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, words):
    path = tmp_path / "evaluator.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=words) as caught:
        load_evaluator(path, OBJECTS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evaluator.pth")
    with pytest.raises(UserError, match="would run code"):
        load_evaluator(tmp_path / "evaluator.pth", OBJECTS)
    assert not (tmp_path / "was_run").exists()


def test_sequences_stay_together():
    names = [f"CLEVR_train_{i:06d}_{k}.png" for i in range(20) for k in range(3)]
    train, held_out = split_by_sequence(names, 0.1)
    assert sorted(train + held_out) == list(range(60)) and len(held_out) == 6
    assert not {names[i][:18] for i in train} & {names[i][:18] for i in held_out}


def test_disturb_changes_every_picture_by_its_own_amount():
    x = torch.rand(1, 3, 64, 64).expand(8, -1, -1, -1) * 2 - 1
    y = disturb(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape and y.abs().max() <= 1
    assert torch.equal(y, disturb(x, torch.Generator().manual_seed(0)))
    assert (y[1:] - y[:1]).abs().mean(dim=(1, 2, 3)).min() > 0.01


def test_training_learns_and_writes_the_courses_format(tmp_path, monkeypatch, capsys):
    """Pictures whose colour is their label: after a few steps the judge knows them."""
    folder = tmp_path / "data"
    (folder / "iclevr").mkdir(parents=True)
    names = list(OBJECTS)
    entries = {}
    from PIL import Image

    for i in range(60):
        entries[f"s_{i:03d}_0.png"] = [names[i % 2]]
        Image.new("RGB", (64, 64), ("black", "white")[i % 2]).save(
            folder / "iclevr" / f"s_{i:03d}_0.png"
        )
    (folder / "objects.json").write_text(json.dumps(OBJECTS))
    (folder / "train.json").write_text(json.dumps(entries))
    argv = ["--data_dir", str(folder), "--epochs", "8", "--batch_size", "9", "--held_out", "0.2"]
    info = train_evaluator.main([*argv, "--device", "cpu"])
    assert info["held_out_pictures"] == 6 and info["held_out_accuracy"]["mean"] >= 0.9
    assert info["held_out_exact_sets"]["mean"] == 1
    assert info["held_out_by_number"] == {
        1: {"accuracy": info["held_out_accuracy"], "exact_sets": info["held_out_exact_sets"]}
    }
    assert "with 1 object: accuracy" in capsys.readouterr().out
    judge = load_evaluator(folder / "evaluator.pth", OBJECTS)
    assert judge.name == "trained on data"  # "stand-in" where render.json lies
    images = torch.stack([torch.full((3, 64, 64), v) for v in (-1.0, 1.0)])
    assert evaluate(judge, images, torch.eye(24)[:2]).accuracy == 1
    assert "is there already" in error_of(train_evaluator.main, argv)
    assert dataset.find_data(dataset.DataConfig(data_dir=folder)).evaluator is not None


def test_a_judge_starts_from_another(world, tmp_path):
    """At a learning rate near zero it stays what it was, but for the statistics of its norms."""
    file, out = ROOT / "data" / "standin" / "evaluator.pth", tmp_path / "more.pth"
    argv = ["--data_dir", str(world), "--epochs", "1", "--device", "cpu", "--out", str(out)]
    info = train_evaluator.main([*argv, "--init_from", str(file), "--lr", "1e-9"])
    first, more = (load_evaluator(path, OBJECTS).model.state_dict() for path in (file, out))
    assert all(torch.allclose(more[k], v, atol=1e-3) for k, v in first.items() if "weight" in k)
    assert info["init_from"] == load_evaluator(file, OBJECTS).blob
    before = out.read_bytes()
    message = error_of(train_evaluator.main, [*argv, "--overwrite", "--init_from", tmp_path / "no"])
    assert "no: not found" in message
    message = error_of(train_evaluator.main, [*argv, "--overwrite", "--lr", "1e20"])
    assert "--lr 1e+20" in message and "lower" in message
    assert out.read_bytes() == before


def test_a_judge_that_was_stopped_goes_on_to_the_same_weights(world, monkeypatch, capsys):
    """By a signal within an epoch, or later by a kill."""
    argv = ["--data_dir", str(world), "--epochs", "3", "--batch_size", "3", "--device", "cpu"]
    train_evaluator.main([*argv, "--out", str(world / "whole.pth")])
    real, steps = classifier.disturb, iter(range(100))

    def disturb_and_stop(*args):
        step = next(steps)
        if step == 4:  # of three in an epoch
            os.kill(os.getpid(), signal.SIGUSR1)
        if step == 7:
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(classifier, "disturb", disturb_and_stop)
    monkeypatch.setattr(classifier, "SAVE_EACH_S", 0)
    with pytest.raises(SystemExit) as ended:
        train_evaluator.main(argv)
    assert ended.value.code == 128 + signal.SIGUSR1
    assert "stopped at step 5 of 9; the same command goes on" in capsys.readouterr().err
    with pytest.raises(MemoryError):
        train_evaluator.main(argv)
    unfinished = world / "evaluator.unfinished.pth"
    message = error_of(train_evaluator.main, [*argv, "--lr", "0.1"])
    assert message.startswith(f"{unfinished}: an unfinished training with other settings")
    assert not (world / "evaluator.pth").exists()
    train_evaluator.main(argv)
    assert "goes on from step 7" in capsys.readouterr().out
    whole, ours = (torch.load(world / f"{name}.pth") for name in ("whole", "evaluator"))
    assert all(torch.equal(ours["model"][key], value) for key, value in whole["model"].items())
    assert ours["info"] == whole["info"] and not unfinished.exists()
