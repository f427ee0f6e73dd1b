"""The judge: the course's ResNet18, and the one `evaluate` that everything is scored by."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from checkpoint import load_weights, read_tensors
from config import UserError
from dataset import DataPaths, resize

IMAGE_SIZE = 64
COURSE_BLOB = "ff70bd18a0c247595d56a8168cac7adcd61333e6"  # git hash-object of the course's file
HOW_TO_GET_EVALUATOR = (
    "put the course's checkpoint.pth there, or train one with: python src/train_evaluator.py"
)


def build_evaluator(num_classes: int = 24) -> nn.Module:
    """torchvision's ResNet18 ending in one score in [0, 1] for each object.

    Input (N, 3, 64, 64) in [-1, 1], output (N, num_classes).
    """
    model = torchvision.models.resnet18(weights=None)
    model.fc = nn.Sequential(nn.Linear(model.fc.in_features, num_classes), nn.Sigmoid())
    return model


@dataclass(frozen=True)
class Evaluator:
    """A judge with its name: "course" for the course's own weights, else what it was trained on."""

    model: nn.Module
    name: str
    path: Path

    @torch.no_grad()
    def scores(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Scores in [0, 1], (N, K) on the CPU, of pictures (N, 3, H, W) in [-1, 1].

        Pictures of another size are resized to 64x64.
        """
        device = next(self.model.parameters()).device
        scores = []
        for batch in images.split(batch_size):
            batch = resize(batch.to(device), IMAGE_SIZE)
            scores.append(self.model(batch).float().cpu())
        return torch.cat(scores)


def load_evaluator(
    path: Path, num_classes: int = 24, device: torch.device | str = "cpu"
) -> Evaluator:
    """Read the course's checkpoint.pth or a file of src/train_evaluator.py.

    Raises:
        UserError: missing, damaged, or another network's weights.
    """
    path = Path(path)
    content = read_tensors(path, HOW_TO_GET_EVALUATOR)
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: no evaluator: it has no entry 'model'; {HOW_TO_GET_EVALUATOR}")
    model = build_evaluator(num_classes)
    load_weights(model, content["model"], path, f"a ResNet18 with {num_classes} scores")
    if git_blob_hash(path) == COURSE_BLOB:
        name = "course"
    else:
        name = str(content.get("name", "unknown weights"))
    return Evaluator(model.eval().to(device), name, path)


def require_evaluator(paths: DataPaths, num_classes: int, device: torch.device) -> Evaluator:
    """The evaluator that was found beside the data.

    Raises:
        UserError: there is none.
    """
    if paths.evaluator is None:
        raise UserError(f"no evaluator in {paths.data_dir}: {HOW_TO_GET_EVALUATOR}")
    return load_evaluator(paths.evaluator, num_classes, device)


def git_blob_hash(path: Path) -> str:
    """What `git hash-object` prints for the file."""
    path = Path(path)
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            blob.update(chunk)
    return blob.hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate` for N pictures."""

    accuracy: float
    """The course's: detected objects over all objects asked for, in [0, 1]."""
    correct: Tensor
    """(N,) detected objects of each picture."""
    total: Tensor
    """(N,) objects asked for of each picture."""


def evaluate(evaluator: Evaluator, images: Tensor, labels: Tensor) -> Evaluation:
    """Score pictures against their conditions.

    Args:
        images: (N, 3, H, W) in [-1, 1], of any size.
        labels: (N, K) multi-hot.
    """
    labels = labels.cpu()
    correct = course_correct(evaluator.scores(images), labels)
    total = labels.sum(dim=1).long()
    return Evaluation(correct.sum().item() / total.sum().item(), correct, total)


def course_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Objects that the course's accuracy counts as right in each picture: (N, K), (N, K) -> (N,).

    The k highest scores count as detected, k being the number of objects asked for; so an extra
    object costs nothing. Of equal scores the lower index comes first.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # (N, K): place of each object, 0 for the highest score
    detected = rank < labels.sum(dim=1, keepdim=True)
    return (detected & labels.bool()).sum(dim=1)
