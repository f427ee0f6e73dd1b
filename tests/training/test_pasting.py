"""Objects cut out of one picture and pasted into another."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OBJECTS, error_of
from PIL import Image

import train_evaluator
from iclevr.labels import decode_labels
from judging.evaluator import Evaluator
from runtime.settings import UserError
from training.classifier import judge_pasted
from training.pasting import CutOuts, pictures_before

SIDE = 64


def sequences(count: int, places: list[tuple[int, int]], color=200):
    """Gray ground; the first object at the centre, the others 10x8 at `places`, one each picture.

    Object k of sequence s is s * 3 + k.
    """
    names, images, labels = [], [], []
    for s in range(count):
        picture, shown = np.full((3, SIDE, SIDE), 100, np.uint8), torch.zeros(24)
        for k, (y, x) in enumerate([(26, 28), *places]):
            picture[:, y : y + 10, x : x + 8] = color + s * 3 + k
            shown[s * 3 + k] = 1
            names.append(f"CLEVR_train_{s:06d}_{k}.png")
            images.append(picture.copy())
            labels.append(shown.clone())
    return SimpleNamespace(names=names, images=np.stack(images), labels=torch.stack(labels))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_what_came_is_cut_out():
    """Where it is, as it looks, and no more; the first object of a sequence came to nothing."""
    data = sequences(2, [(5, 50), (40, 3)])
    cuts = CutOuts(data, [*range(6)])
    assert {k: v for k, v in cuts.of_object.items() if v} == {1: [1], 2: [2], 4: [4], 5: [5]}
    mask, y, x = cuts.places[5]
    assert mask.shape == (10, 8) and mask.all() and (y, x) == (40, 3)
    assert (cuts.images[5] == 205).all()
    taken = cuts.occupied(2, SIDE)
    assert taken[5:15, 50:58].all() and taken[40:50, 3:11].all() and taken[27:36, 29:36].all()
    assert not cuts.occupied(1, SIDE)[40:50, 3:11].any() and not taken[50:].any()


def test_shadows_and_specks_are_no_objects():
    """Soft changes stay behind; of two parts the larger is taken; next to nothing is not cut."""
    data = sequences(1, [(5, 50), (40, 3)])
    data.images[1:, :, 15:20, 50:58] = 90  # a shadow, below it
    data.images[2, :, [1, 60], [1, 60]] = 255  # above the object, and below it
    cuts = CutOuts(data, [0, 1, 2])
    assert cuts.places[1][0].shape == (10, 8) and cuts.places[2][1:] == (40, 3)
    data.images[2] = data.images[1]
    data.images[2, :, 60, 60] = 255
    assert list(CutOuts(data, [0, 1, 2]).places) == [1]


def test_half_get_one_that_is_there_already():
    """Then it counts as not there; a new one counts as there. Nothing else in the labels moves."""
    data = sequences(4, [(5, 50), (40, 3)])
    cuts, index = CutOuts(data, [*range(12)]), torch.arange(12).repeat(50)
    before = torch.from_numpy(data.images[index])
    images, labels = cuts.paste(before, index, 1.0, generator())
    change = labels - data.labels[index]
    again, new = (change == -1).sum(1), (change == 1).sum(1)
    assert ((again + new) <= 1).all()
    # The first picture of a sequence shows what no other picture adds: only new ones fit it.
    first = index % 3 == 0
    assert not again[first].any() and 0.4 < again[~first].float().mean() < 0.6
    changed = (images != before).flatten(1).any(1)
    assert torch.equal(changed, (again + new) > 0)
    assert torch.equal(before, torch.from_numpy(data.images[index]))  # the data stay as they are


def test_a_pasted_object_looks_as_it_did():
    """80 pixels of it, about as high up as it was, hiding little of what is there."""
    data = sequences(2, [(5, 50), (40, 3)])
    cuts, index = CutOuts(data, [*range(6)]), torch.full((200,), 2)
    before = torch.from_numpy(data.images[index])
    images, labels = cuts.paste(before, index, 1.0, generator(1))
    columns = set()
    for image, was, row in zip(images, before, labels - data.labels[2], strict=True):
        new = (row == 1).nonzero().flatten().tolist()
        if not new:
            continue
        shown = image[0] == 200 + new[0]
        rows, cols = shown.nonzero(as_tuple=True)
        assert shown.sum() == 80 and abs(int(rows.min()) - (5 if new == [4] else 40)) <= 3
        assert (was[0][shown] != 100).sum() <= 0.2 * 80
        columns.add(int(cols.min()))
    assert len(columns) > 20 and min(columns) < 5 and max(columns) > 50


def test_no_room_no_object():
    data = sequences(1, [(5, 50), (40, 3)])
    cuts = CutOuts(data, [0, 1, 2])
    cuts.occupied = lambda *_: np.ones((SIDE, SIDE), dtype=bool)
    index = torch.tensor([1, 2])
    before = torch.from_numpy(data.images[index])
    images, labels = cuts.paste(before, index, 1.0, generator())
    assert torch.equal(images, before) and torch.equal(labels, data.labels[index])


def test_the_share_is_what_was_asked_for_and_seeded():
    data = sequences(4, [(5, 50), (40, 3)])
    cuts, index = CutOuts(data, [*range(12)]), torch.arange(12).repeat(50)
    before = torch.from_numpy(data.images[index])
    images, labels = cuts.paste(before, index, 0.3, generator(3))
    assert 0.2 < (labels != data.labels[index]).any(1).float().mean() < 0.4
    again = cuts.paste(before, index, 0.3, generator(3))
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert torch.equal(cuts.paste(before, index, 0.0, generator())[0], before)


def test_pictures_follow_each_other_by_their_numbers():
    names = ["a_0.png", "a_1.png", "a_2.png", "b_1.png", "c_0.png", "c_2.png", "d.png", "a_x.png"]
    assert pictures_before(names, [*range(8)]) == {1: 0, 2: 1}
    assert pictures_before(names, [1, 2]) == {2: 1}


def test_data_that_adds_no_object_are_refused():
    data = sequences(2, [(5, 50)])
    data.names = [f"{n}.png" for n in range(4)]
    with pytest.raises(UserError, match="--paste: no picture of train.json adds an object"):
        CutOuts(data, [*range(4)])


def test_a_judge_learns_from_pasted_pictures(tmp_path, capsys):
    """Its file says how it counts, and how many got something pasted."""
    data, folder = sequences(8, [(5, 50), (40, 3)]), tmp_path / "data"
    (folder / "iclevr").mkdir(parents=True)
    entries = {}
    for name, picture, row in zip(data.names, data.images, data.labels, strict=True):
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / "iclevr" / name)
        entries[name] = decode_labels(row, OBJECTS)
    (folder / "objects.json").write_text(json.dumps(OBJECTS))
    (folder / "train.json").write_text(json.dumps(entries))
    argv = ["--data_dir", str(folder), "--epochs", "1", "--device", "cpu", "--held_out", "0.5"]
    infos, weights = [], []
    for share in ("0", "1"):
        out = tmp_path / f"{share}.pth"
        infos.append(train_evaluator.main([*argv, "--paste", share, "--out", str(out)]))
        weights.append(torch.load(out)["model"]["fc.0.weight"])
    told = capsys.readouterr().out
    assert told.count("pasted twice exact sets: 0.000 [") == 1
    assert "pasted_twice_exact_sets" not in infos[0] and infos[1]["settings"]["paste"] == 1
    twice = infos[1]["pasted_twice_exact_sets"]
    assert 0 == twice["mean"] == twice["low"] < twice["high"] < 1  # of a network that knows nothing
    assert not torch.equal(*weights)


def test_a_figure_without_a_picture_is_left_out():
    """Of held-out pictures that can only get new objects, or none at all."""
    data = sequences(2, [(5, 50), (40, 3)])
    cuts = CutOuts(data, [*range(6)])
    cuts.of_object = {k: [4] if k == 4 else [] for k in range(24)}  # of the last sequence: again
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE**2, 24))
    judge = Evaluator(model.eval(), "none", None, OBJECTS)
    assert [*judge_pasted(judge, data, [0, 1, 2, 3], cuts, 0)] == ["pasted_new_exact_sets"]
    cuts.place = lambda *_: False
    assert judge_pasted(judge, data, [0, 1, 2, 3], cuts, 0) == {}


def test_a_judge_is_not_trained_where_nothing_can_be_cut(world, monkeypatch):
    """Found before the training, though held-out pictures are judged after it."""
    argv = ["--data_dir", world, "--epochs", "1", "--device", "cpu", "--paste", "0.5"]
    monkeypatch.setattr(train_evaluator, "fit", lambda *_: pytest.fail("trained"))
    assert "--paste: no picture" in error_of(train_evaluator.main, argv)
    assert not (world / "evaluator.pth").exists()
