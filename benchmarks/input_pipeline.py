"""Pictures/s into training: the cached loader against decoding PNG files in every epoch.

    python benchmarks/input_pipeline.py

Makes PNG files of 320x240 in a temporary folder, in the course's layout, and reads whole epochs
of them by turns: with src/train.py's loader, and with a usual torch DataLoader (Pillow,
torchvision's Resize, flip, normalise, in worker processes that stay alive). The files have just
been written, so neither waits for the disk. Then trains a small network with src/train.py's loader,
and measures the share of time for which the step waits for its batch. Prints tables, and writes
output/benchmarks/input_pipeline.json.
"""

import functools
import itertools
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from common import describe, interleave, machine, ratios, show, spread, synchronize, table

from diffusion.samplers import make_scheduler
from iclevr.dataset import get_dataloader
from iclevr.labels import read_objects, read_train
from iclevr.placement import sample_sequence
from iclevr.ray_tracer import render_picture
from iclevr.scene import PICTURES
from iclevr.standin import file_names, write_labels
from runtime.device import autocast_dtype, pick_device
from runtime.files import write_json
from runtime.settings import (
    ROOT,
    ModelConfig,
    NonNegativeInt,
    PositiveInt,
    Settings,
    TrainConfig,
    UserError,
    parse_args,
    run,
    to_dict,
)
from training.recipes import RECIPES
from training.step import build_state, train_step

SCHEDULED = 10**6
"""Steps of the learning rate's schedule, of which the measurement is a short part."""
SCENES = 8
"""Sequences that are rendered, of three pictures each; the files are noisy copies of these."""
NOISE = 1.0
"""Standard deviation of the noise, in levels: about 10 bits a pixel, as CLEVR's own PNGs have."""
OURS, DECODING = "src/iclevr/dataset.py's loader", "decoding loader"


@dataclass(frozen=True)
class PipelineConfig(Settings):
    """Measure the cached loader against one that decodes PNG files in every epoch."""

    num_pictures: PositiveInt = 3000
    """PNG files to make; rounded up to whole sequences of three."""
    batch_size: PositiveInt = 64
    """Pictures of one batch."""
    num_workers: NonNegativeInt = 2
    """Processes of the decoding loader; src/train.py's has none, as in src/train.py."""
    rounds: PositiveInt = 5
    """Epochs of each loader, by turns, and measurements of the training loop."""
    steps: PositiveInt = 8
    """Training steps of one measurement of the wait."""
    device: str | None = None
    """cuda, cuda:1, mps, cpu ... (default: the best there is); trains the network."""
    out: Path = ROOT / "output" / "benchmarks" / "input_pipeline.json"
    """Where the figures go."""
    model: ModelConfig = RECIPES["small"].model


class DecodingDataset(Dataset):
    """What a training script without a cache does: every item opens, decodes and resizes a file."""

    def __init__(self, data_dir: Path, image_size: int):
        self.image_dir = data_dir / "iclevr"
        self.names, self.labels = read_train(data_dir, read_objects(data_dir))
        self.transform = transforms.Compose([
            transforms.Resize((image_size, image_size)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.image_dir / self.names[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def make_pictures(folder: Path, sequences: int) -> float:
    """Write PNG files, three a sequence, and their JSON files; returns the mean size in bytes."""
    write_labels(folder, 0, sequences)
    (folder / "iclevr").mkdir()
    scenes = {}
    for i in range(min(SCENES, sequences)):
        sequence = sample_sequence(0, i)
        for k in range(PICTURES):
            scenes[i, k] = render_picture(sequence, k + 1, width=320, height=240)

    def write(number: int) -> int:
        i, k = divmod(number, PICTURES)
        scene, path = scenes[i % SCENES, k], folder / "iclevr" / file_names(i)[k]
        noise = NOISE * np.random.default_rng(number).standard_normal(scene.shape, np.float32)
        picture = (scene + noise).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(path)
        return path.stat().st_size

    with ThreadPoolExecutor() as pool:
        return sum(pool.map(write, range(sequences * PICTURES))) / (sequences * PICTURES)


def cached_loader(folder: Path, config: TrainConfig, device: torch.device) -> DataLoader:
    """The one that src/train.py uses."""
    return get_dataloader(
        folder, folder / "iclevr", "train", config.batch_size,
        image_size=config.model.image_size, pin_memory=device.type == "cuda",
    )  # fmt: skip


def read_epoch(loader: DataLoader) -> float:
    """Pictures/s of a whole epoch."""
    since = time.perf_counter()
    pictures = sum(len(images) for images, _ in loader)
    return pictures / (time.perf_counter() - since)


class Waiting:
    """Training with a loader; calling it makes some steps: the share of time spent waiting.

    On a GPU, which works on while the next batch is made, this is the most it can be.
    """

    def __init__(self, loader: DataLoader, config: TrainConfig, device: torch.device, steps: int):
        self.config, self.device, self.steps = config, device, steps
        self.batches = (batch for _ in itertools.count() for batch in loader)
        self.dtype = autocast_dtype(config.mixed_precision, device)
        self.scheduler = make_scheduler(config.noise)
        self.state = build_state(config, SCHEDULED, device)
        self.seconds_a_step: list[float] = []
        self.train(steps=1)

    def train(self, steps: int) -> tuple[float, float]:
        """Returns seconds spent waiting, and in all."""
        waited = 0.0
        synchronize(self.device)
        since = time.perf_counter()
        for _ in range(steps):
            before = time.perf_counter()
            x_0, labels = next(self.batches)
            waited += time.perf_counter() - before
            x_0 = x_0.to(self.device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            train_step(self.state, self.config, self.scheduler, x_0, labels, self.dtype)
        synchronize(self.device)
        return waited, time.perf_counter() - since

    def __call__(self) -> float:
        waited, total = self.train(self.steps)
        self.seconds_a_step.append(total / self.steps)
        return waited / total


def measure(config: PipelineConfig, device: torch.device, folder: Path) -> None:
    sequences = -(-config.num_pictures // PICTURES)
    count, side = sequences * PICTURES, config.model.image_size
    print(f"making {count} pictures", flush=True)
    size = make_pictures(folder, sequences)
    training = TrainConfig(batch_size=config.batch_size, model=config.model)
    since = time.perf_counter()
    cached = cached_loader(folder, training, device)
    building = time.perf_counter() - since
    decoding = DataLoader(
        DecodingDataset(folder, side), config.batch_size, shuffle=True, drop_last=True,
        num_workers=config.num_workers, persistent_workers=config.num_workers > 0,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    check_same(cached.dataset, decoding.dataset)
    for loader in (cached, decoding):  # starts the workers, and brings all files into memory
        read_epoch(loader)
    loaders = {OURS: cached, DECODING: decoding}
    readers = {name: functools.partial(read_epoch, loader) for name, loader in loaders.items()}
    rates = interleave(readers, config.rounds)
    ratio = ratios(rates[OURS], rates[DECODING])
    waiting = Waiting(cached, training, device, config.steps)
    waits = interleave({"wait for data": waiting}, config.rounds)["wait for data"]

    where = machine(device)
    report = {
        "machine": where,
        "settings": to_dict(config),
        "mean_png_bytes": size,
        "pictures_per_s": {name: spread(values) for name, values in rates.items()},
        "ratio": spread(ratio),
        "cache_building_s": building,
        "share_of_training_waiting": spread(waits),
        "seconds_a_training_step": spread(waiting.seconds_a_step),
    }
    write_json(config.out, report)
    decoder = f"{DECODING}, {config.num_workers} workers"
    rows = {OURS: show(rates[OURS]), decoder: show(rates[DECODING]), "ratio": show(ratio)}
    print(f"""
{describe(where)}
{count} PNG files of 320x240, {size / 1000:.0f} kB each, to {side}x{side}, batch \
{config.batch_size}; median [range] of {config.rounds} epochs each, by turns

{table("input", {"pictures/s": rows})}

Building the cache, once for all runs: {building:.1f} s ({count / building:,.0f} pictures/s).
A training loop with it waits {show([100 * share for share in waits], "%")} of the time for data \
({show([1000 * s for s in waiting.seconds_a_step])} ms a step of {config.batch_size}, \
{config.rounds} times {config.steps} steps).

{config.out}""")


def check_same(cached: Dataset, decoding: Dataset) -> None:
    """Both loaders give the same pictures, mirrored or not."""
    picture, label = decoding[0]
    both = [cached[0, flip] for flip in (False, True)]
    assert any(torch.allclose(picture, ours, atol=1e-5) for ours, _ in both)
    assert torch.equal(label, both[0][1])


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_args(PipelineConfig, argv)
    if config.num_pictures < config.batch_size:
        raise UserError(
            f"--num_pictures {config.num_pictures}: less than one batch; "
            f"use at least --batch_size {config.batch_size}"
        )
    device = pick_device(config.device)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        measure(config, device, Path(folder))


if __name__ == "__main__":
    run(main)
