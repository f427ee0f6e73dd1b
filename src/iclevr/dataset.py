"""i-CLEVR as the course hands it out: where it lies, its pictures, batches of them."""

import contextlib
import hashlib
import signal
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from iclevr.image_cache import load_images
from iclevr.labels import (
    HOW_TO_GET_DATA,
    SPLITS,
    condition_files,
    read_conditions,
    read_objects,
    read_train,
)
from iclevr.scene import OBJECTS
from runtime import processes
from runtime.files import atomic_write
from runtime.settings import ROOT, DataConfig, UserError
from runtime.signals import stop_signals

Mode = Literal["train", "test", "new_test"]
SHIPPED_EVALUATOR = ROOT / "data" / "standin" / "evaluator.pth"
"""The judge that comes with the repository, trained on the stand-in."""
CHECK_EACH = 200_000
"""Of more training pictures than this, not every file is looked at for changes at every start."""


@dataclass(frozen=True)
class DataPaths:
    """Where things were found; `evaluator` is None when there is none."""

    data_dir: Path
    image_dir: Path
    cache_dir: Path
    evaluator: Path | None
    follow_links: bool = False


def find_data(config: DataConfig) -> DataPaths:
    """Settle the default places: the course's files in data/ come before the stand-in.

    Raises:
        UserError: nothing there; says how to get either kind of data.
    """
    data_dir, evaluator = config.data_dir, config.evaluator
    if data_dir is None:
        candidates = ROOT / "data", ROOT / "data" / "standin"
        data_dir = next((path for path in candidates if (path / "objects.json").exists()), None)
        if data_dir is None:
            raise UserError(f"no data in {candidates[0]}: {HOW_TO_GET_DATA}")
    elif not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir}: no such folder; {HOW_TO_GET_DATA}")
    if evaluator is None:  # the shipped one knows no other objects than its own
        weights = (data_dir / name for name in ("checkpoint.pth", "evaluator.pth"))
        evaluator = next((path for path in weights if path.exists()), None)
        if evaluator is None and SHIPPED_EVALUATOR.exists() and read_objects(data_dir) == OBJECTS:
            evaluator = SHIPPED_EVALUATOR
    return DataPaths(
        data_dir,
        config.image_dir or data_dir / "iclevr",
        config.cache_dir or data_dir / ".cache",
        evaluator,
        config.follow_links,
    )


def normalize(images: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [-1, 1] (mean 0.5, std 0.5)."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8 in [0, 255], rounded; values outside are clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def resize(images: Tensor, side: int) -> Tensor:
    """(N, 3, H, W) in [-1, 1] -> (N, 3, side, side), bicubic and antialiased; the one place."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def open_train(
    data_dir: Path,
    image_dir: Path,
    objects: dict[str, int],
    image_size: int,
    cache_dir: Path,
    follow_links: bool = False,
) -> tuple[list[str], Tensor, Path]:
    """Names, labels (N, objects) and the cache of the training pictures, made if need be.

    A list of more than CHECK_EACH pictures is kept in the cache folder as it was read, and opens
    within a second; then only the list and the folder are looked at for changes, not every file.

    Raises:
        UserError: as `read_train` and `image_cache.load_images`.
    """
    kept = list_file(data_dir, image_dir, image_size, cache_dir)
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):  # none, damaged
        with np.load(kept) as file:
            names = file["names"].tobytes().decode("utf-8", "surrogatepass").split("\n")
            labels, path = torch.from_numpy(file["labels"]).float(), cache_dir / str(file["cache"])
        if path.exists():
            return names, labels, path
    names, labels = read_train(data_dir, objects)
    path = load_images(image_dir, names, image_size, cache_dir, follow_links)
    if len(names) > CHECK_EACH:
        for old in cache_dir.glob(f"{image_size}px-list-*.npz"):
            with contextlib.suppress(OSError):  # another process reads it
                old.unlink()
        keep_list(kept, names, labels, path)
    return names, labels, path


def list_file(data_dir: Path, image_dir: Path, image_size: int, cache_dir: Path) -> Path:
    """Where `open_train` keeps the list: named after all that it follows from."""
    sources = hashlib.sha256(str(image_dir.resolve()).encode("utf-8", "surrogateescape"))
    with contextlib.suppress(OSError):  # reading them for good will say what is wrong
        for name in ("objects.json", "train.json"):
            sources.update((data_dir / name).read_bytes())
        sources.update(str(image_dir.stat().st_mtime_ns).encode())
    return cache_dir / f"{image_size}px-list-{sources.hexdigest()[:16]}.npz"


def keep_list(kept: Path, names: list[str], labels: Tensor, cache: Path) -> None:
    """Write the list for `open_train`; names can't hold a line feed (see `read_train`)."""
    text = "\n".join(names).encode("utf-8", "surrogatepass")
    with atomic_write(kept) as temporary, open(temporary, "wb") as file:
        np.savez(
            file, names=np.frombuffer(text, np.uint8), labels=labels.to(torch.uint8).numpy(),
            cache=cache.name,
        )  # fmt: skip


class IclevrDataset(Dataset):
    """i-CLEVR.

    Mode "train": item `index` or `(index, flip)` is a picture (3, S, S) float32 in [-1, 1],
    mirrored if `flip`, and its label (number of objects,) float32. Modes "test" and "new_test":
    item `index` is a label; there are no pictures.

    Args:
        data_dir: folder of the JSON files.
        image_dir: folder of the training pictures; may be None for the test modes.
        image_size: S, side in pixels.
        cache_dir: folder of the decoded pictures; None: .cache/ in `data_dir`.
        follow_links: take pictures that are links out of their folder.

    Raises:
        UserError: files missing or malformed, see the functions above.
    """

    def __init__(
        self,
        data_dir: Path,
        image_dir: Path | None,
        mode: Mode,
        image_size: int = 64,
        cache_dir: Path | None = None,
        follow_links: bool = False,
    ):
        self.mode, self.data_dir = mode, Path(data_dir)
        self.objects = read_objects(self.data_dir)
        if mode == "train":
            cache_dir = cache_dir or self.data_dir / ".cache"
            with processes.main_first():
                self.names, self.labels, self.cache = open_train(
                    self.data_dir, Path(image_dir), self.objects, image_size, Path(cache_dir),
                    follow_links,
                )  # fmt: skip
            self.images = np.load(self.cache, mmap_mode="r")  # (N, 3, S, S) uint8
        elif mode in SPLITS:
            path = condition_files(data_dir)[mode]
            self.conditions, self.labels = read_conditions(path, self.objects)
        else:
            raise ValueError(f"mode {mode!r}: use train, test or new_test")

    def __getstate__(self) -> dict:
        # A loader's worker opens the map itself; pickled, it would become a copy in memory.
        return {key: value for key, value in self.__dict__.items() if key != "images"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state
        if self.mode == "train":
            self.images = np.load(self.cache, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int | tuple[int, bool]) -> tuple[Tensor, Tensor] | Tensor:
        if self.mode != "train":
            return self.labels[item]
        images, labels = self.__getitems__([item if isinstance(item, tuple) else (item, False)])
        return images[0], labels[0]

    def __getitems__(self, items: Sequence) -> tuple[Tensor, Tensor] | Tensor:
        """A whole batch at once: (B, 3, S, S), (B, number of objects); test modes: labels."""
        if self.mode != "train":
            return self.labels[list(items)]
        index, flip = zip(*items, strict=True)
        images = normalize(torch.from_numpy(self.images[list(index)]))
        images = torch.where(torch.tensor(flip)[:, None, None, None], images.flip(-1), images)
        return images, self.labels[list(index)]


class TrainSampler(Sampler[list[tuple[int, bool]]]):
    """Batches of (index, flip) for training: an epoch's order and flips follow from (seed, epoch).

    So nothing is hidden in the state of a loader or its workers: `set_position` takes up an
    interrupted run where it stopped. The last, smaller batch of an epoch is left out. Of several
    processes each gets its share of every batch.

    Args:
        chances: (num_images,) that a picture is drawn, summing to 1; it may come twice in an epoch,
            or not at all. None: an epoch shows each picture once.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        horizontal_flip: bool = True,
        chances: np.ndarray | None = None,
    ):
        self.num_images, self.batch_size = num_images, min(batch_size, num_images)
        self.seed, self.horizontal_flip, self.chances = seed, horizontal_flip, chances
        self.set_position(epoch=0)

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Go to batch `batch` of epoch `epoch` (both from 0)."""
        self.epoch, self.batch = epoch, batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.chances is None:
            order = rng.permutation(self.num_images)
        else:
            order = rng.choice(self.num_images, self.num_images, p=self.chances)
        flips = rng.random(self.num_images) < 0.5 * self.horizontal_flip
        for batch in range(self.batch, len(self)):
            whole = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            mine = processes.shard(self.batch_size)
            rows = order[whole][mine].tolist(), flips[whole][mine].tolist()
            yield list(zip(*rows, strict=True))


def get_dataloader(
    data_dir: Path,
    image_dir: Path | None,
    mode: Mode,
    batch_size: int,
    num_workers: int = 0,
    image_size: int = 64,
    seed: int = 0,
    horizontal_flip: bool = True,
    objects_power: float = 0.0,
    cache_dir: Path | None = None,
    pin_memory: bool = False,
    follow_links: bool = False,
) -> DataLoader:
    """Batches of pictures and labels ("train": shuffled, flipped) or of labels in file order.

    The epoch of the training order is set by `loader.batch_sampler.set_position(epoch)`.
    Arguments and errors as for `IclevrDataset` and `TrainSampler`; with objects_power above 0
    training pictures come in proportion to their number of objects to that power.
    """
    dataset = IclevrDataset(data_dir, image_dir, mode, image_size, cache_dir, follow_links)
    batches = {"batch_size": batch_size}
    if mode == "train":
        chances = None
        if objects_power:
            counts = dataset.labels.sum(dim=1).double().numpy()
            weights = (counts / counts.max()) ** objects_power
            chances = weights / weights.sum()
        sampler = TrainSampler(len(dataset), batch_size, seed, horizontal_flip, chances)
        batches = {"batch_sampler": sampler}
    return DataLoader(
        dataset, **batches, num_workers=num_workers, pin_memory=pin_memory, collate_fn=_as_is,
        worker_init_fn=_leave_signals_to_the_parent,
    )  # fmt: skip


def _leave_signals_to_the_parent(_: int) -> None:
    """Signals reach a whole group; a loader without its workers could not go on."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch  # IclevrDataset.__getitems__ has made it a batch already


def data_key(dataset: IclevrDataset) -> str:
    """Hash of the training pictures' names and labels, to resume on the same ones only."""
    key = hashlib.sha256("\n".join(dataset.names).encode("utf-8", "surrogatepass"))
    key.update(dataset.labels.numpy().tobytes())
    return key.hexdigest()
