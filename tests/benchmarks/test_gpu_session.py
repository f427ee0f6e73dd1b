"""The session on a GPU, rehearsed: every stage in miniature, and the watch over their time."""

import json
import time

import pytest

import gpu_session
from gpu_job import NETWORKS, SMALL, Job, StageConfig
from gpu_training import compile_or_not, train_run

from network.checkpoint import load_checkpoint
from network.model import stages
from training.run_folder import latest_checkpoint

FAKE = """
import json, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
stage, work = flags["--stage"], pathlib.Path(flags["--work_dir"])
(work / f"{stage}.json").write_text(json.dumps({"text": {"0": f"{stage} was here"}}))
if stage == "speed":
    sys.exit(3)
if stage == "small":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
"""


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "START", time.time())  # else it is when pytest began
    where = ["--toy", "--out_dir", str(tmp_path / "out"), "--work_dir", str(tmp_path / "work")]
    return lambda *flags: gpu_session.main([*where, *map(str, flags)])


def test_rehearsal(session, tmp_path):
    results = session()
    ended = {name: stage["status"] for name, stage in results["stages"].items()}
    assert set(ended.values()) == {"done"}
    assert set(ended) == {*gpu_session.SHARES, *gpu_session.BESIDE}
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8 and max(path.stat().st_size for path in files) < 2**24
    assert {"results.json", "summary.md", "log.txt", "pictures.png", "recipes.png"} <= {
        path.name for path in files
    }
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    summary = (tmp_path / "out" / "summary.md").read_text()
    for words in (
        "tests passed", "batch 64, compiled", "Where the time goes", "waiting for data",
        "the shipped one", "original recipe, 12 steps", "sweep of 19 scales",
    ):  # fmt: skip
        assert words in summary
    parts = sorted((tmp_path / "out").glob("network.pth.*"))
    joined = tmp_path / "network.pth"
    joined.write_bytes(b"".join(path.read_bytes() for path in parts))
    assert load_checkpoint(joined).step == 12
    (rows,) = (s["variants"] for s in results["stages"].values() if "variants" in s)
    assert all(0 < row["share_of_matmul"]["median"] < 1 for row in rows.values())


def test_a_stage_that_fails_or_hangs_leaves_the_rest_their_time(session, tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(gpu_session, "SCRIPT", script)
    least = dict.fromkeys(gpu_session.LEAST, 0)
    for name, value in (("GRACE", 0.5), ("END", 0.2), ("LEAST", least)):
        monkeypatch.setattr(gpu_session, name, value)
    monkeypatch.setitem(gpu_session.LEAST, "recipes", 1000)
    since = time.time()
    stages = session("--minutes", 0.2 / gpu_session.TOY_SLACK)["stages"]
    assert time.time() - since < 12
    assert stages["tests"]["status"] == stages["sampling"]["status"] == "done"
    assert stages["speed"]["status"] == "failed (exit code 3)"
    assert stages["small"]["status"].startswith("stopped after")
    assert stages["recipes"]["status"].startswith("not started")
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "small was here" in summary and "sampling was here" in summary
    assert "tests: " not in (tmp_path / "out" / "log.txt").read_text()


def test_time_that_a_stage_leaves_goes_to_those_after_it():
    names = list(gpu_session.SHARES)
    whole = sum(gpu_session.SHARES.values())
    assert gpu_session.share("tests", names, whole) == gpu_session.SHARES["tests"]
    after = whole - gpu_session.SHARES["tests"]
    assert gpu_session.share("speed", names, after) == gpu_session.SHARES["speed"]
    assert gpu_session.share("speed", names, 2 * after) == 2 * gpu_session.SHARES["speed"]
    assert gpu_session.share("sampling", names, 17) == 17


def test_a_training_ends_with_its_time_and_saves(world, tmp_path):
    job = Job(StageConfig(stage="small", toy=True, work_dir=tmp_path, out_dir=tmp_path))
    flags = f"{job.flags(SMALL)} --max_train_steps 1000000 --log_interval 1 --preview_steps 5"
    flags += " --sample_interval 1000000"
    found = train_run(job, "small", flags, seconds=6)
    saved = load_checkpoint(latest_checkpoint(tmp_path / "runs" / "small"))
    assert 0 < saved.step == found[-1]["step"] < 1000000


def test_the_compiler_has_to_earn_its_time():
    def row(rate, warm_up):
        return {"pictures_per_s": {"median": rate}, "warm_up_s": warm_up}

    eager = row(100.0, 1.0)
    assert compile_or_not(eager, None, 200) == (False, 100, 0)
    assert compile_or_not(eager, row(150.0, 60.0), 200) == (True, 150, 60)  # 21,000 over 20,000
    assert compile_or_not(eager, row(150.0, 60.0), 150) == (False, 100, 0)


def test_networks_are_what_they_should_be(tmp_path):
    job = Job(StageConfig(stage="small", toy=True, work_dir=tmp_path, out_dir=tmp_path))
    job.toy = False
    original, choices, small = map(job.settings, NETWORKS)
    assert stages(original.model)[1] < stages(choices.model)[1] < 1.1 * stages(original.model)[1]
    assert choices.model.block_out_channels == original.model.block_out_channels
    assert (choices.optimizer, choices.noise.prediction_type) == ("muon", "v_prediction")
    assert NETWORKS[SMALL] and 2 * stages(small.model)[1] < 24e6  # bytes in float16
