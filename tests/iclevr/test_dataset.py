"""Labels, JSON files, pictures and their cache."""

import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OBJECTS, SMALL_NETWORK, write_world
from PIL import Image, ImageFile
from torchvision import transforms

import train
from iclevr import dataset
from iclevr import labels as labels_of
from iclevr.dataset import IclevrDataset, TrainSampler, get_dataloader
from iclevr.labels import decode_labels, encode_labels
from runtime.settings import DataConfig, UserError

COURSE = Path(__file__).resolve().parents[3] / "shared" / "course"


def test_labels_round_trip():
    names = ["gray cube", "yellow sphere", "cyan cylinder"]
    label = encode_labels(names, OBJECTS)
    assert label.nonzero().flatten().tolist() == [0, 15, 22] and label.shape == (24,)
    assert decode_labels(label, OBJECTS) == names


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["red ball"], "did you mean 'red"),
        (["Red cube"], "did you mean 'red cube'"),
        (["red cube", "red cube"], "twice"),
        ([], "non-empty"),
        ("red cube", "not a non-empty list"),
        ([3], "unknown object 3"),
    ],
)
def test_bad_labels_are_refused(names, words):
    with pytest.raises(UserError, match=words):
        encode_labels(names, OBJECTS)


def test_prompt():
    two = ["red sphere", "cyan cube"]
    for prompt in (
        " red  sphere,cyan cube",
        str(two),
        json.dumps(two),
        '"red sphere", "cyan cube"',
    ):
        assert labels_of.parse_prompt(prompt, OBJECTS) == two
    with pytest.raises(UserError, match="of several: write such as 'red sphere, cyan cube'"):
        labels_of.parse_prompt("red sphere; cyan cube", OBJECTS)
    with pytest.raises(UserError, match="--prompt 'red sphere,': an empty name"):
        labels_of.parse_prompt("red sphere,", OBJECTS)


@pytest.mark.skipif(not COURSE.exists(), reason="the course's files are not here")
def test_the_courses_files_as_handed_out():
    objects = labels_of.read_objects(COURSE)
    assert objects == OBJECTS and list(objects) == list(OBJECTS)
    names, labels = labels_of.read_train(COURSE, objects)
    assert len(names) == 18009 and labels.shape == (18009, 24)
    counts = [int(name.split("_")[-1][0]) + 1 for name in names]
    assert labels.sum(dim=1).tolist() == counts
    for split, total in (("test", 72), ("new_test", 84)):
        conditions, labels = labels_of.read_conditions(COURSE / f"{split}.json", objects)
        assert len(conditions) == 32 and labels.sum() == total


def test_pictures_equal_the_plain_pipeline(world):
    data = IclevrDataset(world, world / "iclevr", "train", image_size=8)
    plain = transforms.Compose(
        [transforms.Resize((8, 8)), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    )
    for index in (0, 7):
        picture = Image.open(world / "iclevr" / data.names[index]).convert("RGB")
        image, label = data[index]
        torch.testing.assert_close(image, plain(picture), atol=1e-5, rtol=0)
        flipped, _ = data[index, True]
        assert torch.equal(flipped, image.flip(-1)) and not torch.equal(flipped, image)
        expected = json.loads((world / "train.json").read_text())[data.names[index]]
        assert sorted(decode_labels(label, OBJECTS)) == sorted(expected)
    assert torch.equal(dataset.to_uint8(dataset.normalize(torch.arange(256))), torch.arange(256))


def test_loader_modes(world):
    train = get_dataloader(world, world / "iclevr", "train", 5, image_size=8)
    batches = list(train)
    assert [b[0].shape for b in batches] == [(5, 3, 8, 8)] * 2 and batches[0][1].shape == (5, 24)
    for split in ("test", "new_test"):
        labels = torch.cat(list(get_dataloader(world, None, split, 3)))
        conditions = json.loads((world / f"{split}.json").read_text())
        assert [sorted(decode_labels(x, OBJECTS)) for x in labels] == [
            sorted(c) for c in conditions
        ]


def test_workers_give_the_same_batches(world):
    def draw(workers):
        loader = get_dataloader(world, world / "iclevr", "train", 4, workers, image_size=8)
        loader.batch_sampler.set_position(3)
        return [images for images, _ in loader]

    assert all(torch.equal(a, b) for a, b in zip(draw(0), draw(2), strict=True))


def test_order_and_flips_follow_from_seed_and_epoch():
    def epoch(number, start=0, seed=0, flip=True):
        sampler = TrainSampler(1000, 10, seed, flip)
        sampler.set_position(number, start)
        return list(sampler)

    assert epoch(2) == epoch(2) and epoch(2)[40:] == epoch(2, start=40)
    assert epoch(2) != epoch(3) and epoch(2) != epoch(2, seed=1)
    items = [item for batch in epoch(0) for item in batch]
    assert sorted(index for index, _ in items) == list(range(1000))
    assert 440 < sum(flip for _, flip in items) < 560  # 500 +- 4 standard deviations
    assert not any(flip for batch in epoch(0, flip=False) for _, flip in batch)
    assert len(TrainSampler(3, 10, 0)) == 1  # fewer pictures than a batch


def test_full_scenes_come_in_proportion_to_their_objects(world):
    where = (world, world / "iclevr", "train", 4)
    counts = IclevrDataset(*where[:3], 8).labels.sum(dim=1)
    loader = get_dataloader(*where, image_size=8, objects_power=2)
    drawn = torch.zeros(len(counts))
    for epoch in range(200):
        loader.batch_sampler.set_position(epoch)
        for batch in loader.batch_sampler:
            drawn += torch.bincount(torch.tensor([i for i, _ in batch]), minlength=len(counts))
    expected = drawn.sum() * counts**2 / (counts**2).sum()
    assert len(set(counts.tolist())) > 1
    assert (drawn - expected).abs().max() < 5 * expected.max().sqrt()  # standard deviations


def test_cache_is_reused_and_follows_the_sources(world, monkeypatch):
    first = IclevrDataset(world, world / "iclevr", "train", 8)
    monkeypatch.setattr("iclevr.image_cache.read_image", None)  # decoding again would fail
    again = IclevrDataset(world, world / "iclevr", "train", 8)
    assert isinstance(again.images, np.memmap)
    pickled = pickle.dumps(again)  # for a loader's workers: without the pictures
    assert len(pickled) < 20_000 and np.array_equal(pickle.loads(pickled).images, first.images)
    assert np.array_equal(again.images, first.images)
    monkeypatch.undo()
    Image.new("RGB", (20, 15), "red").save(world / "iclevr" / first.names[5])
    changed = IclevrDataset(world, world / "iclevr", "train", 8)
    assert (changed.images[5][0] == 255).all() and (changed.images[5][1] == 0).all()
    assert np.array_equal(changed.images[4], first.images[4])
    assert len(list((world / ".cache").iterdir())) == 1  # the old one is gone


def test_a_long_list_is_kept_as_it_was_read(world, monkeypatch):
    """And read again when list, objects or folder change, or what was kept is damaged."""
    plain = IclevrDataset(world, world / "iclevr", "train", 8)
    monkeypatch.setattr(dataset, "CHECK_EACH", 11)
    IclevrDataset(world, world / "iclevr", "train", 8)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read_train", None)  # reading it again would fail
        kept = IclevrDataset(world, world / "iclevr", "train", 8)
        assert kept.names == plain.names and torch.equal(kept.labels, plain.labels)
        assert kept.labels.dtype == plain.labels.dtype and kept.cache == plain.cache
        (world / "iclevr" / "one more").touch()
        with pytest.raises(TypeError):
            IclevrDataset(world, world / "iclevr", "train", 8)
    for file in (world / ".cache").glob("8px-list-*"):
        file.write_bytes(file.read_bytes()[:200])
    again = IclevrDataset(world, world / "iclevr", "train", 8)
    assert again.names == plain.names
    assert len([*(world / ".cache").glob("8px-list-*")]) == 1  # older ones are gone
    entries = json.loads((world / "train.json").read_text())
    entries[plain.names[0]] = ["gray cube", "red cube", "blue cube"]
    (world / "train.json").write_text(json.dumps(entries))
    assert IclevrDataset(world, world / "iclevr", "train", 8).labels[0].sum() == 3


def test_links_out_of_the_folder_are_refused(world):
    first, second = sorted((world / "iclevr").iterdir())[:2]
    first.unlink()
    first.symlink_to(second)  # within it: a picture like any other
    inside = IclevrDataset(world, world / "iclevr", "train", 8)
    outside = second.rename(world / "outside.png")
    second.symlink_to(outside)
    with pytest.raises(UserError, match="a link that leads out of the folder.*--follow_links"):
        IclevrDataset(world, world / "iclevr", "train", 8)
    # As git-annex and DVC make them, they are taken on demand, if they lead somewhere.
    followed = IclevrDataset(world, world / "iclevr", "train", 8, follow_links=True)
    assert np.array_equal(followed.images, inside.images)
    argv = ["--data_dir", str(world), "--output_dir", str(world), "--device", "cpu", "--epochs",
            "1", "--wandb", "disabled", "--follow_links", *SMALL_NETWORK]  # fmt: skip
    train.main(argv)
    train.main(["--resume", str(world / "ddpm-cfg-v1"), "--epochs", "2"])
    for target in (world / "gone.png", second):
        second.unlink()
        second.symlink_to(target)
        with pytest.raises(UserError, match="2 of 12 pictures are missing .*git annex get"):
            IclevrDataset(world, world / "iclevr", "train", 8, follow_links=True)
    # The folder itself may be a link.
    second.unlink()
    outside.rename(second)
    (world / "elsewhere").symlink_to(world / "iclevr")
    IclevrDataset(world, world / "elsewhere", "train", 8)


def _build(folder):
    return IclevrDataset(folder, folder / "iclevr", "train", 64).images[:].sum()


def test_two_processes_build_the_cache_at_once(tmp_path):
    folder = write_world(tmp_path / "data", 300)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        sums = pool.map(_build, [folder] * 3)
    assert len(set(sums)) == 1 and len(list((folder / ".cache").iterdir())) == 1


def test_missing_pictures_are_counted(world):
    for k in range(3):
        (world / "iclevr" / f"CLEVR_train_000001_{k}.png").unlink()
    (world / "iclevr" / "CLEVR_train_000003_2.png").unlink()
    words = r"4 of 12 pictures are missing \(CLEVR_train_000001_0.* \.\.\."
    with pytest.raises(UserError, match=words):
        IclevrDataset(world, world / "iclevr", "train", 8)


def test_an_absurdly_large_picture_is_refused_before_it_is_decoded(world, monkeypatch):
    Image.new("L", (9000, 1)).save(world / "iclevr" / "CLEVR_train_000002_1.png")
    real, decoded = ImageFile.ImageFile.load, []

    def load(self):
        decoded.append(self.size)
        return real(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(UserError, match="9000x1 pixels are too many"):
        IclevrDataset(world, world / "iclevr", "train", 8)
    assert (20, 15) in decoded and (9000, 1) not in decoded


@pytest.mark.parametrize("left", [-100, 60, 0])
def test_a_cache_cut_short_is_made_again(world, capsys, left):
    whole = IclevrDataset(world, world / "iclevr", "train", 8)
    images = np.array(whole.images)
    whole.cache.write_bytes(whole.cache.read_bytes()[:left])
    again = IclevrDataset(world, world / "iclevr", "train", 8)
    assert (again.images == images).all()
    assert "damaged" in capsys.readouterr().err


def test_course_files_come_before_the_stand_in(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "ROOT", tmp_path)
    with pytest.raises(UserError, match="render_iclevr.py"):
        dataset.find_data(DataConfig())
    write_world(tmp_path / "data" / "standin")
    (tmp_path / "data" / "standin" / "evaluator.pth").touch()
    found = dataset.find_data(DataConfig())
    assert found.data_dir == tmp_path / "data" / "standin"
    assert found.evaluator.name == "evaluator.pth"
    write_world(tmp_path / "data")
    assert dataset.find_data(DataConfig()).evaluator == dataset.SHIPPED_EVALUATOR
    (tmp_path / "data" / "checkpoint.pth").touch()
    found = dataset.find_data(DataConfig())
    assert found.image_dir == tmp_path / "data" / "iclevr"
    assert found.evaluator == tmp_path / "data" / "checkpoint.pth"


def test_the_judge_that_comes_along_serves_its_own_objects_only(world):
    assert dataset.find_data(DataConfig(data_dir=world)).evaluator == dataset.SHIPPED_EVALUATOR
    (world / "objects.json").write_text(json.dumps({"red ball": 0}))
    assert dataset.find_data(DataConfig(data_dir=world)).evaluator is None
    (world / "evaluator.pth").write_bytes(b"")
    assert dataset.find_data(DataConfig(data_dir=world)).evaluator == world / "evaluator.pth"
