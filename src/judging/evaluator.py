"""The judge: the course's ResNet18, and the one `evaluate` that everything is scored by."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from iclevr.dataset import resize
from judging.counting import too_many
from network.checkpoint import load_weights, read_tensors
from runtime.settings import UserError

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
    """A judge: network, name, file, objects and threshold.

    The name is "course" for the course's own weights, else what the file says. An object counts
    as detected where its score reaches the threshold; `calibrate` finds it.
    """

    model: nn.Module
    name: str
    path: Path
    objects: dict[str, int]
    threshold: float = 0.5
    blob: str = ""
    """git's hash of the file."""

    def _pooled(self, images: Tensor) -> Tensor:
        """(N, 3, 64, 64) -> (N, 512): all of ResNet18 but its last layer."""
        for part in list(self.model.children())[:-1]:
            images = part(images)
        return images.flatten(1)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (N, 512) on the CPU, what the last layer sees, of (N, 3, H, W)."""
        return self._in_batches(self._pooled, images)

    def scores(self, images: Tensor) -> Tensor:
        """Scores in [0, 1], (N, K) on the CPU, of pictures (N, 3, H, W) in [-1, 1].

        Pictures of another size are resized to 64x64.
        """
        return self._in_batches(self.model, images)

    @torch.no_grad()
    def _in_batches(self, part: Callable, images: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        batches = (resize(batch.to(device), IMAGE_SIZE) for batch in images.split(256))
        return torch.cat([part(batch).float().cpu() for batch in batches])

    def log_likelihood(self, images: Tensor, labels: Tensor) -> Tensor:
        """log p(labels | images), (N,): every object scored by itself; with gradient.

        Args:
            images: (N, 3, H, W) in [-1, 1], on the judge's device.
            labels: (N, K) multi-hot.
        """
        logits = self.model.fc[0](self._pooled(resize(images, IMAGE_SIZE)))
        return -F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(dim=1)


def load_evaluator(
    path: Path | None, objects: dict[str, int], device: torch.device | str = "cpu"
) -> Evaluator:
    """Read the course's checkpoint.pth or a file of src/train_evaluator.py.

    Args:
        path: None: there is none, beside the data or for its objects.
        objects: of the data that is judged; a file that names its own must name the same.

    Raises:
        UserError: missing, damaged, another network's weights, or trained for other objects.
    """
    if path is None:
        raise UserError(f"no evaluator in the data folder: {HOW_TO_GET_EVALUATOR}")
    content = read_tensors(path, HOW_TO_GET_EVALUATOR)
    blob = git_blob_hash(path)
    weights = find_weights(content)
    if weights is None:
        raise UserError(f"{path}: no evaluator: it has no entry 'model'; {HOW_TO_GET_EVALUATOR}")
    if content.get("objects", objects) != objects:
        raise UserError(
            f"{path}: trained for other objects, or another order, than the data's objects.json; "
            f"{HOW_TO_GET_EVALUATOR}"
        )
    model = build_evaluator(len(objects))
    load_weights(model, weights, path, f"a ResNet18 with {len(objects)} scores")
    if not all(weight.isfinite().all() for weight in model.state_dict().values()):
        raise UserError(f"{path}: NaN or infinite weights; {HOW_TO_GET_EVALUATOR}")
    name = str(content.get("name", "unknown weights"))
    name = "course" if blob == COURSE_BLOB else " ".join(name.split())
    threshold = content.get("threshold", 0.5)
    if not isinstance(threshold, float) or not 0 < threshold < 1:
        raise UserError(
            f"{path}: threshold {threshold!r} is no number between 0 and 1; {HOW_TO_GET_EVALUATOR}"
        )
    model = model.eval().requires_grad_(False).to(device)
    return Evaluator(model, name, path, objects, threshold, blob)


def find_weights(content: dict) -> dict | None:
    """The state dict in a file of torch.save, under its usual names or the file itself.

    What stands before the ResNet's names, such as the `module.` of DataParallel, is taken away.
    """
    found = (content.get(key) for key in ("model", "state_dict", "model_state_dict"))
    weights = next((entry for entry in found if isinstance(entry, dict)), None)
    if weights is None and content and all(isinstance(entry, Tensor) for entry in content.values()):
        weights = content
    names = [*map(str, weights or ())]
    first = min((n for n in names if n.endswith("conv1.weight")), key=len, default="conv1.weight")
    prefix = first.removesuffix("conv1.weight")
    if prefix and all(name.startswith(prefix) for name in names):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def calibrate(scores: Tensor, labels: Tensor) -> float:
    """The threshold at which the most pictures get exactly their objects detected.

    Of a range of equally good thresholds, the middle in log-odds.

    Args:
        scores: (N, K) in [0, 1] of pictures that the evaluator was not trained on.
        labels: (N, K) multi-hot.
    """
    logit = torch.linspace(-7, 7, 281)
    exact = torch.stack(
        [((scores >= t) == labels.bool()).all(dim=1).sum() for t in logit.sigmoid()]
    )
    best = (exact == exact.max()).nonzero().flatten()
    return logit[best].median().sigmoid().item()


def git_blob_hash(path: Path) -> str:
    """What `git hash-object` prints for the file."""
    with open(path, "rb") as file:
        header = b"blob %d\0" % path.stat().st_size
        return hashlib.file_digest(file, lambda: hashlib.sha1(header)).hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """What the judge found in N pictures, picture by picture; `metrics.py` sums it up.

    All are on the CPU; but for the first three and confusion (N,) integers.
    """

    scores: Tensor
    """(N, K): the judge's, in [0, 1]."""
    labels: Tensor
    """(N, K) bool: objects asked for."""
    detected: Tensor
    """(N, K) bool: objects whose score reaches the judge's threshold."""
    correct: Tensor
    """Objects that the course's accuracy counts as right."""
    color_errors: Tensor
    """Objects asked for that came in another color."""
    shape_errors: Tensor
    """Objects asked for that came in another shape."""
    confusion: Tensor
    """(K + 1, K + 1) counts: row asked for, column found; the last row and column: nothing."""
    too_many: Tensor
    """Objects of a color beyond those asked for, see counting.py; the judge can't tell."""

    @property
    def total(self) -> Tensor:
        """Objects asked for."""
        return self.labels.sum(dim=1)

    @property
    def accuracy(self) -> float:
        """The course's: right objects over all objects asked for, in [0, 1]."""
        return self.correct.sum().item() / self.total.sum().item()

    @property
    def exact(self) -> Tensor:
        """1 where the detected objects are exactly those asked for."""
        return (self.detected == self.labels).all(dim=1).long()

    @property
    def once(self) -> Tensor:
        """1 where they are, and none of them stands there twice as far as colors tell."""
        return self.exact * (self.too_many == 0)

    @property
    def missing(self) -> Tensor:
        """Objects asked for and not detected."""
        return (self.labels & ~self.detected).sum(dim=1)

    @property
    def extra(self) -> Tensor:
        """Objects detected and not asked for."""
        return (self.detected & ~self.labels).sum(dim=1)


def evaluate(evaluator: Evaluator, images: Tensor, labels: Tensor) -> Evaluation:
    """Score pictures against their conditions.

    Args:
        images: (N, 3, H, W) in [-1, 1], of any size.
        labels: (N, K) multi-hot.

    Raises:
        ValueError: the pictures are in another range.
    """
    check_range(images)
    return judge_pictures(evaluator, images, labels)


def judge_pictures(evaluator: Evaluator, images: Tensor, labels: Tensor) -> Evaluation:
    """As `evaluate`, of pictures known to be in [-1, 1]: a single one may hold nothing dark."""
    scores = evaluator.scores(images)
    found = judge_scores(scores, labels, evaluator.threshold, evaluator.objects)
    return replace(found, too_many=too_many(images, labels, evaluator.objects))


def check_range(images: Tensor) -> None:
    """Pictures in [0, 1] or [0, 255] get figures that look plausible and mean nothing.

    Every single picture of a scene has pixels darker than mid gray, which are below 0 in [-1, 1]
    (its ground has shadows), and so has noise. Pictures of one colour, as a failing network may
    draw them, are left alone whatever the colour; a little beyond 1 is what resizing does.

    Raises:
        ValueError: they can't be in [-1, 1].
    """
    low, high = images.min().item(), images.max().item()
    if not (low >= -1.1 and high <= 1.1) or (low >= 0 and high - low > 0.3):
        raise ValueError(f"pictures in [{low:.3g}, {high:.3g}], not in [-1, 1]; see normalize")


def judge_scores(
    scores: Tensor, labels: Tensor, threshold: float, objects: dict[str, int]
) -> Evaluation:
    """As `evaluate`, from scores (N, K) in [0, 1]; how often something is there they don't tell.

    Each missing object is matched with an extra one of the same picture as far as they go: those
    that share shape or color first, as such a pair is most likely one object drawn wrong.
    """
    scores, labels = scores.cpu(), labels.cpu()
    wanted, detected = labels.bool(), scores >= threshold
    names = sorted(objects, key=objects.__getitem__)
    looks = [name.rsplit(" ", 1) if " " in name else (name, name) for name in names]
    colors, shapes = zip(*looks, strict=True)
    nothing = len(names)
    confusion = torch.zeros(nothing + 1, nothing + 1, dtype=torch.long)
    color_errors, shape_errors = torch.zeros(2, len(labels), dtype=torch.long)
    for n, (asked, found) in enumerate(zip(wanted, detected, strict=True)):
        missing = (asked & ~found).nonzero().flatten().tolist()
        extra = (found & ~asked).nonzero().flatten().tolist()
        cost = [(colors[m] != colors[e]) + (shapes[m] != shapes[e]) for m in missing for e in extra]
        pairs = linear_sum_assignment(np.reshape(cost, (len(missing), len(extra))))
        taken_for = {missing[i]: extra[j] for i, j in zip(*pairs, strict=True)}
        for k in asked.nonzero().flatten().tolist():
            other = taken_for.get(k, nothing if k in missing else k)
            confusion[k, other] += 1
        for e in set(extra) - set(taken_for.values()):
            confusion[nothing, e] += 1
        color_errors[n] = sum(colors[m] != colors[e] for m, e in taken_for.items())
        shape_errors[n] = sum(shapes[m] != shapes[e] for m, e in taken_for.items())
    correct = course_correct(scores, labels)
    nothing_known = torch.zeros(len(labels), dtype=torch.long)
    return Evaluation(
        scores, wanted, detected, correct, color_errors, shape_errors, confusion, nothing_known
    )


def course_correct(scores: Tensor, labels: Tensor) -> Tensor:
    """Objects that the course's accuracy counts as right in each picture: (N, K), (N, K) -> (N,).

    The k highest scores count as detected, k being the number of objects asked for; so an extra
    object costs nothing. Of equal scores the lower index comes first.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # (N, K): place of each object, 0 for the highest score
    detected = rank < labels.sum(dim=1, keepdim=True)
    return (detected & labels.bool()).sum(dim=1)
