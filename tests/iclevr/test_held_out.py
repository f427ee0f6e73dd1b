"""Sets and pairs kept out of training: by the renderer, and of a list that is already there."""

import json
from itertools import combinations

import pytest
from conftest import error_of

import hold_out
import render_iclevr
from iclevr.held_out import HeldOut, choose_held_out
from iclevr.scene import NAMES, make_conditions, make_large_conditions, sample_labels

SETS = {frozenset(names) for size in (2, 3) for names in combinations(NAMES, size)}
KEEP = [frozenset(names) for split in make_conditions(0) for names in split]


def test_what_is_held_out():
    held_out = HeldOut(
        sets=frozenset({frozenset({"a", "b"}), frozenset({"a", "c", "d"})}),
        pairs=frozenset({frozenset({"x", "y"})}),
    )
    assert held_out.holds(["b", "a"]) and held_out.holds(["d", "a", "c"])
    assert not held_out.holds(["a", "b", "c"]), "a set is the whole picture, not a part of it"
    assert held_out.holds(["x", "a", "y", "b"]) and not held_out.holds(["x", "a"])


def test_the_choice():
    held_out = choose_held_out(SETS, KEEP, 0.1, 0.05, seed=0)
    assert len(held_out.pairs) == round(0.05 * 276)
    for size in (2, 3):
        left = [s for s in SETS if len(s) == size and not HeldOut(pairs=held_out.pairs).holds(s)]
        assert sum(len(s) == size for s in held_out.sets) == round(0.1 * len(left))
    for kept in KEEP:  # the course's conditions, and what leads to them in a sequence, stay
        parts = [set(part) for size in (2, 3) for part in combinations(kept, size)]
        assert not any(held_out.holds(part) for part in parts)
    assert held_out == choose_held_out(SETS, KEEP, 0.1, 0.05, seed=0)
    assert held_out != choose_held_out(SETS, KEEP, 0.1, 0.05, seed=1)


def test_no_sequence_shows_it_and_the_others_stay():
    held_out = choose_held_out(SETS, KEEP, 0.1, 0.05, seed=0)
    changed = 0
    for i in range(300):
        plain, labels = sample_labels(0, i), sample_labels(0, i, held_out=held_out)
        shown = [{NAMES[n] for n in labels[:k]} for k in (2, 3)]
        assert not any(held_out.holds(names) for names in shown)
        would = any(held_out.holds({NAMES[n] for n in plain[:k]}) for k in (2, 3))
        assert (labels != plain) == would
        changed += would
    assert 40 < changed < 120
    assert sample_labels(0, 3, 5)[:3] == sample_labels(0, 3)


def test_large_conditions():
    found = make_large_conditions(0)
    for name, size in (("four", 4), ("five", 5)):
        assert all(len(set(names)) == size == len(names) for names in found[name])
        counts = [sum(n in names for names in found[name]) for n in NAMES]
        assert max(counts) - min(counts) <= 1
        assert len(set(map(frozenset, found[name]))) == 48


def test_rendered_with_sets_held_out_and_five_objects(tmp_path):
    argv = ["--out_dir", tmp_path, "--num_sequences", 40, "--max_objects", 5, "--num_workers", 1,
            "--hold_out_sets", 0.2, "--hold_out_pairs", 0.02,
            "--width", 32, "--height", 32, "--samples", 1]  # fmt: skip
    render_iclevr.main(list(map(str, argv)))
    files = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(files["train"]) == 200 == len([*tmp_path.glob("iclevr/*.png")])
    assert max(map(len, files["train"].values())) == 5
    shown = list(map(set, files["train"].values()))
    assert not any(set(names) in shown for names in files["unseen"])
    assert all(set(names) in shown for names in files["seen"])
    pairs = [set(names) for names in files["unseen_pairs"] if len(names) == 2]
    assert len(pairs) == 6 and not any(pair <= names for pair in pairs for names in shown)
    assert len(files["unseen_pairs"]) == 6 * 8
    assert all(any(pair <= set(names) for pair in pairs) for names in files["unseen_pairs"])
    message = error_of(render_iclevr.main, ["0" if a == 0.2 else a for a in argv])
    assert "--hold_out_sets 0.2" in message


def test_of_a_list_that_is_there(world, tmp_path, capsys):
    names = [[a, b] for a in NAMES[:8] for b in NAMES[8:16]]
    before = {f"CLEVR_train_{i:06d}_1.png": pair for i, pair in enumerate(names)}
    (world / "train.json").write_text(json.dumps(before))
    (world / "four.json").write_text(json.dumps([NAMES[:4], NAMES[8:12]]))
    original = {path: path.read_bytes() for path in world.glob("*.json")}
    out = tmp_path / "held out"
    argv = ["--data_dir", world, "--out_dir", out, "--hold_out_sets", 0.25]
    found = hold_out.main(list(map(str, argv)))
    files = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert files.pop("hold_out")["hold_out_sets"] == 0.25
    assert set(files) == {"objects", "train", "test", "new_test", "seen", "unseen", "four"}
    assert files["four"] == [[*NAMES[:4]], [*NAMES[8:12]]]
    assert found["unseen"] == found["seen"] == 16 and found["train"] == 48
    assert {**files["train"], **before} == before
    shown = list(map(set, files["train"].values()))
    assert not any(set(n) in shown for n in files["unseen"])
    assert all(set(n) in shown for n in files["seen"])
    assert {path: path.read_bytes() for path in world.glob("*.json")} == original
    assert "48 of 64 pictures stay" in capsys.readouterr().out
    assert "the data's own folder" in error_of(
        hold_out.main, ["--data_dir", world, "--out_dir", world]
    )
    assert "nothing to hold out" in error_of(hold_out.main, [*argv[:-1], "0"])
    argv[3] = tmp_path / "none"
    assert "--hold_out_sets 0.0001" in error_of(hold_out.main, [*argv[:-1], "0.0001"])
    argv[3] = out
    # The same again changes nothing; another choice, or other data, is not written over it.
    before = {path: path.read_bytes() for path in out.iterdir()}
    hold_out.main(list(map(str, argv)))
    assert f"{out / 'train.json'}: holds something else" in error_of(
        hold_out.main, [*argv[:-1], "0.9"]
    )
    for name, other in (("train.json", "{}"), ("seen.json", "[]")):  # of other data, or one's own
        was = (out / name).read_text()
        (out / name).write_text(other)
        assert f"{out / name}: holds something else" in error_of(hold_out.main, argv)
        assert (out / name).read_text() == other
        (out / name).write_text(was)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    argv[3] = tmp_path / "pairs"
    hold_out.main([*map(str, argv[:-1]), "0", "--hold_out_pairs", "0.1"])
    assert {path.stem for path in argv[3].glob("*seen*")} == {"unseen_pairs"}
    argv[3] = tmp_path / "most"
    found = hold_out.main([*map(str, argv[:-1]), "0.9"])
    assert found["unseen"] == found["seen"] == 64 - round(0.9 * 64)


def test_too_much_held_out_ends_before_the_rendering(tmp_path):
    argv = ["--out_dir", tmp_path / "x", "--max_objects", 5, "--hold_out_pairs", 1]
    assert "leave too few scenes of 5 objects" in error_of(render_iclevr.main, argv)
    argv = ["--out_dir", tmp_path / "y", "--hold_out_sets", 0.0001]
    assert "hold out nothing" in error_of(render_iclevr.main, argv)


@pytest.mark.parametrize("share", ["1.5", "-0.1", "nan"])
def test_shares_out_of_range(share, tmp_path):
    assert "--hold_out_sets" in error_of(
        render_iclevr.main, ["--out_dir", tmp_path, "--hold_out_sets", share]
    )
