"""A real training process, killed at random moments and while it writes: nothing is lost.

Nor is it when the process of Weights & Biases beside it is killed, or when the disk is full.
"""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import SRC, train_argv, wait_for, write_world

import train
from network.checkpoint import load_checkpoint
from training.run_folder import latest_checkpoint, latest_whole_checkpoint

KILLS = ("while it writes", "SIGTERM", "at random")


def flags_of(data: Path, output: Path) -> list[str]:
    return train_argv(
        data, output, "--dropout", 0.1, "--log_interval", 4, "--sample_interval", 40,
        "--save_interval", 1, "--epochs", 80,
    )  # fmt: skip


def start(argv: list[str], **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(SRC / "train.py"), *argv],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_killed_again_and_again_it_ends_as_if_never_stopped(world, tmp_path):
    whole = load_checkpoint(train.main(flags_of(world, tmp_path / "whole")))
    run_dir = tmp_path / "killed" / "r"
    folder = run_dir / "checkpoints"
    moments = random.Random(time.time_ns())  # other moments every time
    steps, codes = [0], []
    for how in KILLS:
        argv = flags_of(world, tmp_path / "killed")
        argv += ["--resume", "auto"] if latest_checkpoint(run_dir) else []
        process = start(argv)
        before = set(folder.glob("model_epoch_*.pth"))
        alive = wait_for(lambda b=before: set(folder.glob("model_epoch_*.pth")) - b, process)
        if how == "while it writes":
            alive = alive and wait_for(lambda: any(folder.glob(".tmp-*")), process)
        else:
            time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        error = process.communicate()[1]
        codes.append(process.returncode)
        if process.returncode == 0:  # it was faster: all is done
            break
        assert alive, error
        assert process.returncode == (143 if how == "SIGTERM" else -signal.SIGKILL), error
        steps.append(latest_whole_checkpoint(run_dir).checkpoint.step)
        assert steps[-1] > steps[-2]  # every life gets further
    assert len(codes) > 2, "it was never killed"
    if codes[-1]:
        train.main([*flags_of(world, tmp_path / "killed"), "--resume", "auto"])
    end = load_checkpoint(latest_checkpoint(run_dir))
    assert end.step == whole.step == 240
    for ours, theirs in ((end.model, whole.model), (end.ema, whole.ema)):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = end.training["optimizer"]["state"], whole.training["optimizer"]["state"]
    for number, state in theirs.items():
        assert all(torch.equal(ours[number][key], value) for key, value in state.items())
    logs = [(tmp_path / x / "r" / "metrics.jsonl").read_text().splitlines()
            for x in ("killed", "whole")]  # fmt: skip
    losses = [[line.split('"lr"')[0] for line in log if '"loss"' in line] for log in logs]
    assert losses[0] == losses[1]


def test_a_signal_to_the_whole_group_spares_the_loaders_workers(tmp_path):
    data = write_world(tmp_path / "data", pictures=240)  # epochs long enough to meet the workers
    argv = [*flags_of(data, tmp_path), "--num_workers", "2", "--epochs", "100000"]
    process = start(argv, start_new_session=True)
    folder = tmp_path / "r" / "checkpoints"
    assert wait_for(lambda: any(folder.glob("model_epoch_*.pth")), process)
    time.sleep(0.3)
    workers = psutil.Process(process.pid).children()
    for worker in workers:
        worker.terminate()
    assert len(workers) >= 2
    before = len(list(folder.iterdir()))
    assert wait_for(lambda: len(list(folder.iterdir())) > before + 1, process), "they are gone"
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 143, error
    assert "Traceback" not in error and "--resume auto" in error


def test_training_goes_on_when_the_service_of_wandb_is_killed(world, tmp_path):
    # Without the service that an earlier test may have left running in this process.
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    process = start([*flags_of(world, tmp_path), "--wandb", "offline"], env=env)
    folder = tmp_path / "r" / "checkpoints"
    assert wait_for(lambda: any(folder.glob("model_epoch_*.pth")), process)
    services = [child for child in psutil.Process(process.pid).children(recursive=True)
                if child.name().startswith("wandb")]  # fmt: skip
    assert services
    for service in services:
        service.kill()
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error
    assert error.count("warning: wandb stopped") == 1
    assert "Traceback" not in error
    assert load_checkpoint(latest_checkpoint(tmp_path / "r")).step == 240


def train_on_a_small_disk(disk: Path, kib: int, argv: list[str]) -> subprocess.CompletedProcess:
    """Run src/train.py while a disk of its own, of this size, lies at `disk`.

    What it holds in the end is found in `disk` afterwards.
    """
    disk.mkdir(parents=True)
    kept = disk.with_name("kept")
    mount = f"mount -t tmpfs -o size={kib}k none {shlex.quote(str(disk))}"
    try:
        subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets no user mount a disk")
    command = shlex.join([sys.executable, str(SRC / "train.py"), *argv])
    keep = f"cp -r {shlex.quote(str(disk))} {shlex.quote(str(kept))}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && {command}; code=$?; {keep}; exit $code"],
        capture_output=True, text=True,
    )  # fmt: skip
    disk.rmdir()
    kept.rename(disk)
    return done


def test_a_full_disk_stops_training_with_the_last_checkpoint_whole(world, tmp_path, trained):
    room_for_one = trained[2].stat().st_size * 3 // 2 // 1024
    done = train_on_a_small_disk(tmp_path / "disk", room_for_one,
                                 flags_of(world, tmp_path / "disk"))  # fmt: skip
    folder = tmp_path / "disk" / "r" / "checkpoints"
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert error.startswith(f"error: {folder / 'model_epoch_2.pth'}: can't be written: No space")
    assert "Traceback" not in done.stderr
    assert [path.name for path in folder.iterdir()] == ["model_epoch_1.pth"]
    assert load_checkpoint(folder / "model_epoch_1.pth").step == 3


def test_a_full_disk_for_the_decoded_pictures_is_found_before_decoding(world, tmp_path):
    """Written through a map, they would end the process by SIGBUS."""
    argv = [*flags_of(world, tmp_path), "--cache_dir", str(tmp_path / "cache")]
    done = train_on_a_small_disk(tmp_path / "cache", 8, argv)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith(".npy: can't be written: No space left on device")
    assert list((tmp_path / "cache").iterdir()) == []


def test_training_goes_on_when_the_disk_of_wandbs_files_is_full(world, tmp_path):
    argv = [*flags_of(world, tmp_path), "--wandb", "offline"]
    done = train_on_a_small_disk(tmp_path / "r" / "wandb", 40, argv)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: wandb stopped (No space left on device)") == 1
    assert "Traceback" not in done.stderr
    assert load_checkpoint(latest_checkpoint(tmp_path / "r")).step == 240
