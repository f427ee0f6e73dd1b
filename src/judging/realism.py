"""What accuracy can't see: how generated pictures compare with the training pictures.

Frechet distance on the judge's pooled features, and the nearest training picture of each
generated one.
"""

import contextlib
import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from iclevr.dataset import DataPaths, IclevrDataset, normalize, resize
from judging.evaluator import IMAGE_SIZE, Evaluator
from runtime.files import atomic_write
from runtime.output import progress_bar
from runtime.seeds import derive_seed
from runtime.settings import UserError


@dataclass(frozen=True)
class Reference:
    """The training pictures as the judge sees them."""

    images: np.ndarray
    """(N, 3, 64, 64) uint8, memory-mapped."""
    labels: Tensor
    """(N, K) multi-hot."""
    judge: Evaluator
    key: str
    """Hash of pictures and judge."""
    cache_dir: Path

    @cached_property
    def features(self) -> Tensor:
        """(N, 512), the judge's; computed when first asked for, and kept in the cache folder."""
        path = self.cache_dir / f"features-{self.key[:16]}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or cut short
            features = np.load(path)
            if len(features) == len(self.images):
                return torch.from_numpy(features)
        parts = []
        for start in progress_bar(range(0, len(self.images), 256), desc="features", unit="batch"):
            batch = torch.tensor(self.images[start : start + 256])
            parts.append(self.judge.features(normalize(batch)))
        features = torch.cat(parts)
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.save(file, features.numpy())
        return features


def load_reference(paths: DataPaths, judge: Evaluator) -> Reference:
    """Training pictures, and what their features depend on.

    Raises:
        UserError: train.json or pictures missing or damaged.
    """
    data = IclevrDataset(
        paths.data_dir, paths.image_dir, "train", IMAGE_SIZE, paths.cache_dir, paths.follow_links
    )
    key = hashlib.sha256(f"{data.cache.name} {judge.blob}".encode()).hexdigest()
    return Reference(data.images, data.labels, judge, key, data.cache.parent)


def draw_conditions(reference: Reference, count: int, seed: int) -> Tensor:
    """(count, K): conditions drawn from those of the training pictures, with replacement."""
    rng = np.random.default_rng(derive_seed(seed, 3, 0))
    return reference.labels[torch.from_numpy(rng.integers(0, len(reference.labels), count))]


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (N, D) and (M, D), N, M >= 2.

    Heusel et al. 2017 (FID), equation 6, on whatever features these are; computed by
    torchmetrics. It grows as M shrinks: compare only distances of equally many pictures.
    """
    if min(len(real), len(generated)) < 2:
        raise UserError(
            f"a Frechet distance needs two pictures on each side, not {len(real)} training "
            f"pictures and {len(generated)} drawn ones; switch it off with --num_fd_samples 0"
        )
    # Here, as it takes seconds to load, and matplotlib with it.
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(
        torch.nn.Identity(),
        input_img_size=(real.shape[1],),
        sync_on_compute=False,  # what is here is all; the other processes do not come along
    )
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    distance = float(metric.compute())
    if not math.isfinite(distance):
        raise UserError("the Frechet distance is not finite: the judge's features are damaged")
    return max(0.0, distance)


def frechet_floor(reference: Reference, count: int, seed: int) -> float:
    """Frechet distance that `count` real training pictures themselves have from all of them.

    About what a perfect network would get; slightly less, as they are among the reference.
    """
    rng = np.random.default_rng(derive_seed(seed, 3, 1))
    chosen = torch.from_numpy(rng.integers(0, len(reference.features), count))
    return frechet_distance(reference.features, reference.features[chosen])


def nearest(images: Tensor, reference: Reference) -> tuple[Tensor, Tensor]:
    """The training picture most like each picture, pixel by pixel, mirrored or not.

    Args:
        images: (N, 3, H, W) in [-1, 1].

    Returns:
        (N, 3, 64, 64) in [-1, 1], mirrored where that is nearer, and the root mean square
        difference (N,) in levels of 255.
    """
    queries = resize(images, IMAGE_SIZE).cpu()
    both = torch.cat([queries, queries.flip(-1)]).flatten(1)  # (2N, D)
    least = torch.full((len(both),), torch.inf)
    index = torch.zeros(len(both), dtype=torch.long)
    for start in range(0, len(reference.images), 1024):
        pictures = normalize(torch.tensor(reference.images[start : start + 1024])).flatten(1)
        distance, where = torch.cdist(both, pictures).min(dim=1)
        index = torch.where(distance < least, where + start, index)
        least = torch.minimum(distance, least)
    mirrored = least[len(queries) :] < least[: len(queries)]
    index = torch.where(mirrored, index[len(queries) :], index[: len(queries)])
    found = normalize(torch.from_numpy(reference.images[index.tolist()]))
    found = torch.where(mirrored[:, None, None, None], found.flip(-1), found)
    rms = (found - queries).square().mean(dim=(1, 2, 3)).sqrt() * 127.5
    return found, rms
