"""Two processes on this machine, started as the README says, against a single one."""

import json
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import SRC, train_argv, wait_for, write_world
from PIL import Image

import train
import train_evaluator
from network.checkpoint import load_checkpoint
from runtime import processes
from runtime.device import pick_device
from runtime.settings import ROOT, UserError, run
from training.run_folder import latest_checkpoint


def launched(script: str, argv: list, count: int = 2) -> subprocess.Popen:
    """`accelerate launch`; on a machine without GPUs, too, its --multi_gpu starts processes."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
        "--num_processes", count, "--num_machines", 1, "--main_process_port", port,
        "--mixed_precision", "no", "--dynamo_backend", "no", SRC / script, *argv,
    ]  # fmt: skip
    return subprocess.Popen(
        [str(part) for part in command], text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def argv_of(data: Path, output: Path, *more) -> list[str]:
    return train_argv(
        data, output, "--batch_size", 5, "--sample_interval", 3, "--epochs", 6, "--lr", 1e-3,
        "--lr_warmup_steps", 0, *more,
    )  # fmt: skip


def losses_of(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, average and loss curve agree but for rounding."""
    first, second = (load_checkpoint(latest_checkpoint(x)) for x in (a, b))
    assert first.step == second.step
    for ours, theirs in ((first.model, second.model), (first.ema, second.ema)):
        for name, value in theirs.items():
            if name.endswith("to_k.bias"):
                continue  # softmax cancels it: its gradient is rounding alone, scaled up by AdamW
            # AdamW blows up the rounding of tiny gradients, but not in many entries at once.
            assert (ours[name] - value).norm() <= 2e-4 * value.norm(), name
    assert losses_of(a) == pytest.approx(losses_of(b), rel=1e-4)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A run of a single process: data folder, run folder."""
    root = tmp_path_factory.mktemp("single")
    data = write_world(root / "data")
    train.main(argv_of(data, root / "output"))
    return data, root / "output" / "r"


def test_two_processes_train_as_one(single, tmp_path):
    """Uneven shares, too: a batch of 5 is one of 2 and one of 3."""
    data, alone = single
    code, out, err = finished(launched("train.py", argv_of(data, tmp_path)))
    assert code == 0, err
    assert "processes: 2, each with its share of 5 pictures" in out
    assert out.count("saved") == 1  # one writer
    assert_same_run(tmp_path / "r", alone)
    ours, theirs = (x / "samples" / "epoch_6.png" for x in (tmp_path / "r", alone))
    a, b = (np.asarray(Image.open(p)).astype(int) for p in (ours, theirs))
    assert abs(a - b).max() <= 2


def test_two_processes_align_features_and_weigh_noise_levels_as_one(single, tmp_path):
    """The heads, too, get the gradient of the whole batch, and levels the losses of all of it."""
    data, _ = single
    teacher = tmp_path / "teacher.pth"
    argv = ["--data_dir", data, "--epochs", 1, "--device", "cpu", "--seed", 1, "--out", teacher]
    train_evaluator.main([str(a) for a in argv])
    aligned = ["--align_to", teacher, "--align_weight", 2, "--equal_levels"]
    train.main(argv_of(data, tmp_path / "one", *aligned))
    aligned += ["--gradient_accumulation_steps", 2]
    code, _, err = finished(launched("train.py", argv_of(data, tmp_path / "two", *aligned)))
    assert code == 0, err
    one, two = tmp_path / "one" / "r", tmp_path / "two" / "r"
    assert_same_run(two, one)
    first, second = (load_checkpoint(latest_checkpoint(x)).training for x in (one, two))
    for part in ("alignment", "levels"):
        for name, theirs in second[part].items():
            assert (first[part][name] - theirs).norm() <= 2e-4 * theirs.norm(), name


def test_two_processes_learn_from_a_reward_model_as_one(single, tmp_path):
    """Seven pictures are drawn meanwhile, three by the one and four by the other."""
    data, _ = single
    rewarded = ["--reward_model", ROOT / "data" / "standin" / "evaluator.pth", "--reward_steps", 5,
                "--reward_batch_size", 7, "--reward_weight", 0.01]  # fmt: skip
    judge = tmp_path / "judge.pth"
    argv = ["--data_dir", data, "--epochs", 1, "--device", "cpu", "--seed", 1, "--out", judge]
    train_evaluator.main([str(a) for a in argv])
    rewarded += ["--evaluator", judge]
    train.main(argv_of(data, tmp_path / "one", *rewarded))
    code, _, err = finished(launched("train.py", argv_of(data, tmp_path / "two", *rewarded)))
    assert code == 0, err
    one, two = tmp_path / "one" / "r", tmp_path / "two" / "r"
    first, second = (load_checkpoint(latest_checkpoint(x)) for x in (two, one))
    # The gradient of a ResNet18 makes more of rounding than `assert_same_run` allows: all weights
    # together differ by 1e-3 or less; by 1e-2 if one process's share counted half.
    ours, theirs = (torch.cat([v.flatten() for v in x.model.values()]) for x in (first, second))
    assert (ours - theirs).norm() <= 3e-3 * theirs.norm()
    assert losses_of(two) == pytest.approx(losses_of(one), rel=2e-3)
    for name, expected in second.training["reward"].items():
        assert (first.training["reward"][name] - expected).norm() <= 5e-2 * expected.norm(), name


@pytest.mark.parametrize("parts", [2, 5])
def test_accumulated_gradients_are_those_of_the_whole_batch(single, tmp_path, parts):
    data, alone = single
    train.main(argv_of(data, tmp_path, "--gradient_accumulation_steps", parts))
    assert_same_run(tmp_path / "r", alone)


def test_killed_processes_go_on_as_another_number_of_them(single, tmp_path):
    """SIGKILL to one of two ends both; one goes on from the last checkpoint, as if alone."""
    data, alone = single
    argv = argv_of(data, tmp_path, "--save_interval", 1, "--gradient_accumulation_steps", 2,
                   "--sample_interval", 1)  # fmt: skip
    process = launched("train.py", argv)
    assert wait_for(lambda: latest_checkpoint(tmp_path / "r"), process)
    found = latest_checkpoint(tmp_path / "r")
    # The launcher's children; each lives in a group of its own.
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    workers = children.stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[-1]), signal.SIGKILL)
    code, _, err = finished(process)
    left = load_checkpoint(found).step
    assert code != 0 and 0 < left < 12
    argv = ["--output_dir", tmp_path, "--run_name", "r", "--resume", "auto"]
    train.main([str(a) for a in [*argv, "--gradient_accumulation_steps", 1]])
    assert_same_run(tmp_path / "r", alone)


def test_sigterm_to_one_stops_all_after_the_same_step(single, tmp_path):
    data, _ = single
    process = launched("train.py", argv_of(data, tmp_path, "--epochs", 10**6))
    log = tmp_path / "r" / "metrics.jsonl"
    assert wait_for(lambda: log.exists() and '"loss"' in log.read_text(), process)
    psutil.Process(process.pid).children()[-1].terminate()
    code, _, err = finished(process, timeout=90)
    assert code != 0
    checkpoint = load_checkpoint(latest_checkpoint(tmp_path / "r"))
    assert checkpoint.step == len(losses_of(tmp_path / "r"))
    assert f"stopped at step {checkpoint.step}, saved" in err and "--resume auto" in err


STOPPED_WHILE_SAVING = """
import os, signal, sys
sys.path.insert(0, {src!r})
import train
from runtime.settings import run
from training import trainer

plain = trainer.save_checkpoint

def save(path, checkpoint):
    plain(path, checkpoint)
    os.kill(os.getpid(), signal.SIGTERM)

trainer.save_checkpoint = save
run(train.main)
"""


def test_sigterm_while_the_first_one_writes_leaves_none_waiting(single, tmp_path):
    """The others are on their way to the preview, which the first one would not draw any more."""
    data, alone = single
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED_WHILE_SAVING.format(src=str(SRC)))
    argv = argv_of(data, tmp_path, "--save_interval", 3, "--log_interval", 4)
    code, _, err = finished(launched(script, argv), timeout=120)
    assert code != 0
    assert "stopped at step 6, saved" in err
    assert not (tmp_path / "r" / "samples").exists()
    # It is drawn when both go on; losses that were not logged yet are counted once.
    code, _, err = finished(launched("train.py", ["--resume", tmp_path / "r"]))
    assert code == 0, err
    assert (tmp_path / "r" / "samples" / "epoch_3.png").exists()
    of_steps = losses_of(alone)
    expected = [np.mean(of_steps[i : i + 4]) for i in (0, 4, 8)]
    assert losses_of(tmp_path / "r") == pytest.approx(expected, rel=1e-4)


def test_an_error_of_all_is_printed_once(tmp_path, single):
    data, _ = single
    argv = argv_of(data, tmp_path, "--batch_size", 1)
    code, _, err = finished(launched("train.py", argv))
    assert code != 0
    assert err.count("error: --batch_size 1: fewer pictures than 2 process(es)") == 1


COUNTING = """
import os, sys
sys.path.insert(0, {src!r})
import test
from runtime.settings import run
from network.model import DiffusionModel

plain = DiffusionModel.forward

def forward(self, x_t, t, labels):
    with open(os.path.join({folder!r}, "rank" + os.environ["RANK"]), "a") as file:
        file.write(str(len(x_t)) + " ")
    return plain(self, x_t, t, labels)

DiffusionModel.forward = forward
run(test.main)
"""


def test_two_processes_draw_the_same_pictures(trained, tmp_path):
    """test.py and the sweep, shared between processes; the sweep goes on from a single one's."""
    data, _, checkpoint = trained
    argv = ["--ckpt_path", checkpoint, "--data_dir", data, "--device", "cpu", "--wandb",
            "disabled", "--mixed_precision", "no", "--num_fd_samples", 5,
            "--num_inference_steps", 5, "--num_seeds", 2]  # fmt: skip
    scales = ["--scale_max", 2]
    import guidance_scale
    import test

    test.main([str(a) for a in [*argv, "--output_dir", tmp_path / "a"]])
    guidance_scale.main([str(a) for a in [*argv, *scales, "--output_dir", tmp_path / "a"]])
    counting = tmp_path / "counting.py"
    counting.write_text(COUNTING.format(src=str(SRC), folder=str(tmp_path)))
    for script, more in ((counting, []), ("guidance_scale.py", scales)):
        code, _, err = finished(launched(script, [*argv, *more, "--output_dir", tmp_path / "b"]))
        assert code == 0, err
    evaluations = [sum(map(int, (tmp_path / f"rank{n}").read_text().split())) for n in (0, 1)]
    # 2 draws of 8 conditions and 5 pictures for the distance, and one of the denoising strip: 27
    # pictures of 5 steps with 2 evaluations each, shared out.
    assert sum(evaluations) == 27 * 5 * 2
    assert min(evaluations) >= 12 * 5 * 2
    pictures, theirs = (
        sorted(p.relative_to(tmp_path / x) for p in (tmp_path / x).rglob("*.png")) for x in "ab"
    )
    assert pictures == theirs
    for path in pictures:
        if path.name not in ("sweep.png", "confusion.png"):
            a, b = (np.asarray(Image.open(tmp_path / x / path)).astype(int) for x in "ab")
            assert abs(a - b).max() <= 2, path
    for name, key in (("accuracies.json", "records"), ("sweep.json", "best")):
        a, b = (json.loads(next((tmp_path / x).rglob(name)).read_text()) for x in "ab")
        assert a.keys() == b.keys() and a[key] == b[key]
        if name == "accuracies.json":
            distances = [report["frechet_distance"]["mean"] for report in (a, b)]
            assert distances[0] == pytest.approx(distances[1], rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_cover_everything_once(monkeypatch, count, world):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    shares = [list(range(count))[processes.shard(count, number)] for number in range(world)]
    assert sum(shares, []) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x: not a number of processes"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": ""}, "WORLD_SIZE=2, but no RANK"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE=2, but no MASTER_ADDR"),
        ({"RANK": "2"}, "RANK=2: not below 2"),
        ({"RANK": "two"}, "RANK=two: not below 2"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: not below 2"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http: not below 65536"),
        ({"MASTER_PORT": "0"}, "can't be met: localhost:0"),
        ({"MASTER_ADDR": "no.such.host.invalid", "RANK": "1"}, "can't be met: no.such.host"),
    ],
)
def test_another_launchers_variables_end_in_one_line(monkeypatch, capsys, change, words):
    monkeypatch.setattr(processes, "HEAD_START_S", 0)
    monkeypatch.setattr(processes, "MEET_WITHIN", timedelta(seconds=1))
    for name, value in ({"WORLD_SIZE": "2"} | LAUNCHED | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as caught:
        pick_device("cpu")
    assert "unset WORLD_SIZE" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as ended:  # the message itself asks for this process's number
        run(lambda: pick_device("cpu"))
    assert ended.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("size", [None, "", "1"])
def test_without_a_size_the_other_variables_mean_nothing(monkeypatch, size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in {"RANK": "7", "LOCAL_RANK": "x", "MASTER_PORT": "-"}.items():
        monkeypatch.setenv(name, value)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert pick_device("cpu").type == "cpu"
    assert (processes.world_size(), processes.rank(), processes.local_rank()) == (1, 0, 0)
    assert processes.is_main()
