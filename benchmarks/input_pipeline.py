"""Pictures/s into training: the cached loader against decoding PNG files in every epoch.

    python benchmarks/input_pipeline.py

Makes PNG files of 320x240 in a temporary folder, in the course's layout, and reads whole epochs
of them by turns: with src/dataset.py's loader, and with a usual torch DataLoader (Pillow,
torchvision's Resize, flip, normalise, in worker processes that stay alive). The files have just
been written, so neither waits for the disk. Then trains a small network with src/dataset.py's
loader, and measures the share of time for which the step waits for its batch. Prints tables, and
writes output/benchmarks/input_pipeline.json.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from common import interleave, machine, ratios, show, spread, synchronize, table

from diffusion.schedule import make_scheduler
from iclevr.dataset import get_dataloader, read_objects, read_train
from iclevr.placement import sample_sequence
from iclevr.ray_tracer import render_picture
from iclevr.scene import NAMES, PICTURES, make_conditions, sample_labels
from render_iclevr import file_names
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

SCENES = 8
"""Sequences that are rendered, of three pictures each; the files are noisy copies of these."""
NOISE = 1.0
"""Standard deviation of the noise, in levels: about 10 bits a pixel, as CLEVR's own PNGs have."""
OURS, DECODING = "src/dataset.py's loader", "decoding loader"


@dataclass(frozen=True)
class PipelineConfig(Settings):
    """Measure the cached loader against one that decodes PNG files in every epoch."""

    num_pictures: PositiveInt = 3000
    """PNG files to make."""
    batch_size: PositiveInt = 64
    """Pictures of one batch."""
    num_workers: NonNegativeInt = 2
    """Processes of the decoding loader; src/dataset.py's has none, as in src/train.py."""
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
        self.transform = transforms.Compose(
            [
                transforms.Resize((image_size, image_size)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with Image.open(self.image_dir / self.names[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def make_pictures(folder: Path, count: int) -> float:
    """Write `count` PNG files and their JSON files; returns the mean size in bytes."""
    image_dir = folder / "iclevr"
    image_dir.mkdir()
    scenes = []
    for i in range(min(SCENES * PICTURES, count)):
        sequence = sample_sequence(0, i // PICTURES)
        scenes.append(render_picture(sequence, i % PICTURES + 1, width=320, height=240))

    def write(i: int) -> tuple[str, list[str]]:
        sequence, k = divmod(i, PICTURES)
        name = file_names(sequence)[k]
        scene = scenes[i % len(scenes)]
        noise = NOISE * np.random.default_rng(i).standard_normal(scene.shape, np.float32)
        picture = (scene + noise).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(image_dir / name)
        labels = sample_labels(0, sequence % SCENES)
        return name, [NAMES[n] for n in labels[: k + 1]]

    with ThreadPoolExecutor() as pool:
        entries = dict(pool.map(write, range(count)))
    test, new_test = make_conditions(seed=0)
    write_json(folder / "objects.json", {name: n for n, name in enumerate(NAMES)})
    write_json(folder / "train.json", entries)
    write_json(folder / "test.json", test)
    write_json(folder / "new_test.json", new_test)
    return sum((image_dir / name).stat().st_size for name in entries) / count


class Epochs:
    """Whole epochs of a loader; calling it reads one, in pictures/s."""

    def __init__(self, loader: DataLoader):
        self.loader = loader
        self()  # starts the workers, and brings all files into memory

    def __call__(self) -> float:
        since = time.perf_counter()
        pictures = sum(len(images) for images, _ in self.loader)
        return pictures / (time.perf_counter() - since)


class Waiting:
    """Training with a loader; calling it makes some steps: the share of time spent waiting.

    On a GPU, which works on while the next batch is made, this is the most it can be.
    """

    def __init__(self, loader: DataLoader, config: PipelineConfig, device: torch.device):
        self.device, self.steps = device, config.steps
        self.batches = endless(loader)
        self.config = TrainConfig(batch_size=config.batch_size, model=config.model)
        self.dtype = autocast_dtype(self.config.mixed_precision, device)
        self.scheduler = make_scheduler(self.config.noise)
        self.state = build_state(self.config, 1 + config.rounds * config.steps, device)
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


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches, epoch after epoch."""
    while True:
        yield from loader


def measure(config: PipelineConfig, device: torch.device, folder: Path) -> None:
    print(f"making {config.num_pictures} pictures", flush=True)
    size = make_pictures(folder, config.num_pictures)
    pin_memory = device.type == "cuda"
    since = time.perf_counter()
    cached = get_dataloader(
        folder, folder / "iclevr", "train", config.batch_size,
        image_size=config.model.image_size, pin_memory=pin_memory,
    )  # fmt: skip
    building = time.perf_counter() - since
    decoding = DataLoader(
        DecodingDataset(folder, config.model.image_size),
        config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=pin_memory,
    )
    check_same(cached.dataset, decoding.dataset)
    rates = interleave({OURS: Epochs(cached), DECODING: Epochs(decoding)}, config.rounds)
    ratio = ratios(rates[OURS], rates[DECODING])
    del decoding  # ends its workers
    waiting = Waiting(cached, config, device)
    waits = interleave({"wait for data": waiting}, config.rounds)["wait for data"]

    where = machine(device)
    write_json(
        config.out,
        {
            "machine": where,
            "settings": to_dict(config),
            "mean_png_bytes": size,
            "pictures_per_s": {name: spread(values) for name, values in rates.items()},
            "ratio": spread(ratio),
            "cache_building_s": building,
            "share_of_training_waiting": spread(waits),
            "seconds_a_training_step": spread(waiting.seconds_a_step),
        },
    )
    print(f"\n{', '.join(f'{key} {value}' for key, value in where.items())}")
    print(
        f"{config.num_pictures} PNG files of 320x240, {size / 1000:.0f} kB each, to "
        f"{config.model.image_size}x{config.model.image_size}, batch {config.batch_size}; "
        f"median [range] of {config.rounds} epochs each, by turns\n"
    )
    decoder = f"{DECODING}, {config.num_workers} workers"
    rows = {OURS: show(rates[OURS]), decoder: show(rates[DECODING]), "ratio": show(ratio)}
    print(table("input", {"pictures/s": rows}))
    print(
        f"\nBuilding the cache, once for all runs: {building:.1f} s "
        f"({config.num_pictures / building:,.0f} pictures/s)."
    )
    print(
        f"A training loop with it waits {show([100 * share for share in waits], '%')} of the time "
        f"for data ({show([1000 * s for s in waiting.seconds_a_step])} ms a step of "
        f"{config.batch_size}, {config.rounds} times {config.steps} steps).\n\n{config.out}"
    )


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
