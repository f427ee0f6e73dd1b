"""Judge beside judge, on pictures that lie on the disk."""

import json
from pathlib import Path

import pytest
from conftest import error_of
from PIL import Image
from pytest import approx

import reality_gap

from iclevr.labels import SPLITS

STANDIN = Path(__file__).resolve().parents[2] / "data" / "standin"
PEERS = Path(__file__).resolve().parents[3] / "shared" / "reference" / "peers"


@pytest.fixture
def folders(tmp_path):
    """Two folders of 64 plain pictures, which any judge finds nothing in."""
    for name, level in (("dark", 60), ("pale", 190)):
        for split in SPLITS:
            (tmp_path / name / split).mkdir(parents=True)
            for number in range(32):
                picture = Image.new("RGB", (64, 64), (level + number, level, level))
                picture.save(tmp_path / name / split / f"{number}.png")
    return [tmp_path / "dark", tmp_path / "pale"]


def compare(folders, scores, tmp_path, conditions=STANDIN) -> dict:
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    reality_gap.main(
        ["--pictures", *map(str, folders), "--conditions", str(conditions),
         "--scores", str(tmp_path / "scores.json"), "--out_dir", str(tmp_path / "out")]
    )  # fmt: skip
    (of_judge,) = json.loads((tmp_path / "out" / "reality_gap.json").read_text()).values()
    return of_judge["comparison"]


def test_judges_are_compared_by_the_same_kind_of_score(folders, tmp_path, capsys):
    zero = {"test": 0.0, "new_test": 0.0}
    kinds = {name: zero | {"score": kind}
             for name, kind in zip(("dark", "pale"), reality_gap.SCORES, strict=True)}  # fmt: skip
    found = compare(folders, kinds, tmp_path)
    assert "correlation" not in found  # scores that are all the same have none
    records = json.loads((tmp_path / "out" / "reality_gap.json").read_text())
    (of_judge,) = records.values()
    assert found["dark"]["ours"] == [
        approx(of_judge["figures"]["dark"][split]["accuracy"]["mean"]) for split in SPLITS
    ]
    assert found["difference"]["mean"] == approx(
        sum(found["dark"]["ours"] + found["pale"]["ours"]) / 4
    )
    mine = {n: kinds[n] | dict(zip(SPLITS, found[n]["ours"], strict=True)) for n in kinds}
    same = compare(folders, mine, tmp_path)
    assert same["difference"]["mean"] == 0 and same["correlation"] == approx(1)
    assert "mean difference 0.000" in capsys.readouterr().out
    assert (tmp_path / "out" / "evaluator.png").exists()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"dark": {"test": 0.5, "new_test": 0.5}}, "has no scores for pale"),
        ({"dark": {"test": 1.5, "new_test": 0.5}, "pale": {}}, "dark"),
        ([], "expected a dict"),
    ],
)
def test_scores_that_are_none_are_refused(folders, tmp_path, scores, message):
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    error = error_of(
        reality_gap.main,
        ["--pictures", *map(str, folders), "--conditions", str(STANDIN),
         "--scores", str(tmp_path / "scores.json"), "--out_dir", str(tmp_path / "out")],
    )  # fmt: skip
    assert "scores.json" in error and message in error


@pytest.mark.skipif(not PEERS.exists(), reason="the eight sets are not part of the repository")
def test_the_shipped_judge_agrees_with_the_courses(tmp_path):
    scores = json.loads((PEERS / "scores.json").read_text())
    found = compare(
        [PEERS / name for name in scores], scores, tmp_path, PEERS.parents[1] / "course"
    )
    assert abs(found["difference"]["mean"]) < 0.04 and found["correlation"] > 0.8
