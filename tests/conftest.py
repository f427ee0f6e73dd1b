"""A tiny world for the tests: coloured squares instead of scenes, in the course's layout."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, for what a test starts too
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from iclevr.scene import NAMES, OBJECTS
from runtime.settings import UserError

SRC = Path(__file__).resolve().parents[1] / "src"
SMALL_NETWORK = [
    "--image_size", "16", "--block_out_channels", "16", "32",
    "--down_block_types", "DownBlock2D", "AttnDownBlock2D",
    "--up_block_types", "AttnUpBlock2D", "UpBlock2D",
    "--layers_per_block", "1", "--norm_num_groups", "8", "--num_train_timesteps", "20",
    "--preview_steps", "5",
]  # fmt: skip


def write_world(folder: Path, pictures: int = 12) -> Path:
    """objects.json, train.json, test.json, new_test.json and `pictures` PNGs of 20x15."""
    rng = np.random.default_rng(0)
    (folder / "iclevr").mkdir(parents=True)
    train = {}
    for i in range(pictures):
        name = f"CLEVR_train_{i // 3:06d}_{i % 3}.png"
        train[name] = [NAMES[n] for n in rng.permutation(24)[: i % 3 + 1]]
        picture = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        picture.save(folder / "iclevr" / name)
    conditions = [[NAMES[n] for n in rng.permutation(24)[: i % 3 + 1]] for i in range(8)]
    files = {"objects": OBJECTS, "train": train, "test": conditions[:4], "new_test": conditions[4:]}
    for file, value in files.items():
        (folder / f"{file}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path / "data")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A trained run on a tiny world, and its judge: (data folder, output folder, checkpoint)."""
    import train
    import train_evaluator

    root = tmp_path_factory.mktemp("trained")
    data = write_world(root / "data")
    train_evaluator.main(["--data_dir", str(data), "--epochs", "1", "--device", "cpu"])
    checkpoint = train.main(
        ["--data_dir", str(data), "--output_dir", str(root / "output"), "--run_name", "tiny",
         "--epochs", "4", "--batch_size", "4", "--save_interval", "2", "--sample_interval", "2",
         "--log_interval", "1", "--device", "cpu", "--wandb", "disabled", *SMALL_NETWORK]
    )  # fmt: skip
    return data, root / "output", checkpoint


def train_argv(data: Path, output: Path, *more) -> list[str]:
    return [
        "--data_dir", str(data), "--output_dir", str(output), "--run_name", "r", "--batch_size",
        "4", "--device", "cpu", "--mixed_precision", "no", "--wandb", "disabled",
        "--log_interval", "1", "--sample_interval", "100", *SMALL_NETWORK, *map(str, more),
    ]  # fmt: skip


def error_of(main, argv) -> str:
    """The message that a script ends with; it must be one line."""
    with pytest.raises(UserError) as caught:
        main([str(a) for a in argv])
    message = str(caught.value)
    assert "\n" not in message
    return message


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> bool:
    """Whether it came true before the process ended, or two minutes had passed."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.0005)
    return False


class LinearModel(torch.nn.Module):
    """A network whose output is easy to write down: a * x_t + b * t + labels @ w."""

    image_size = 8

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a = torch.nn.Parameter(torch.tensor(0.3))
        self.w = torch.nn.Parameter(torch.randn(24, 3) * 0.2)
        self.calls: list[int] = []

    def forward(self, x_t, t, labels):
        self.calls.append(len(x_t))
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(x_t))
        return self.a * x_t + 0.001 * t[:, None, None, None] + (labels @ self.w)[:, :, None, None]
