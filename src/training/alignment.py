"""Learning what a scene holds from a classifier: features aligned (REPA, Yu et al. 2024).

Pixels say little about shapes: a cube drawn for a sphere costs the loss next to nothing. A
ResNet18 that tells the objects apart sees the clean picture, and the network's features of the
noisy one are drawn towards its. The classifier must not be the judge, which would then score its
own pupil; it and the heads between both are no part of the network that is kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iclevr.dataset import resize
from judging.evaluator import IMAGE_SIZE, Evaluator
from network.model import DiffusionModel
from runtime import processes
from runtime.settings import ModelConfig, UserError

HIDDEN = 256
"""Channels inside a head."""
LAYERS = {"layer2": (8, 128), "layer3": (4, 256)}
"""Stage of the ResNet18 -> side and channels of its features of a 64x64 picture."""


class Alignment(nn.Module):
    """1 - cosine between a head's view of the network's features and the teacher's.

    Raises:
        UserError: the network has no features of the teacher's sides, 8 and 4.
    """

    def __init__(self, teacher: Evaluator, config: ModelConfig):
        super().__init__()
        channels = feature_channels(config)
        layers = {name: layer for name, layer in LAYERS.items() if layer[0] in channels}
        if not layers:
            raise UserError(
                f"--align_to {teacher.path}: the network has no features of 8x8 or 4x4 positions, "
                f"but of {', '.join(f'{side}x{side}' for side in channels)}; leave it out"
            )
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Conv2d(channels[side], HIDDEN, kernel_size=1),
                    nn.SiLU(),
                    nn.Conv2d(HIDDEN, of_teacher, kernel_size=1),
                )
                for name, (side, of_teacher) in layers.items()
            }
        )
        # In a tuple it is no submodule: neither trained nor kept.
        self._teacher = (teacher.model.to(memory_format=torch.channels_last),)

    def forward(self, features: dict[int, Tensor], images: Tensor) -> Tensor:
        """
        Args:
            features: side -> (N, C, side, side), see `UNet2DModel.forward`
            images:   (N, 3, H, W) in [-1, 1], without noise

        Returns:
            (N,) float32 in [0, 2]: means over positions and stages
        """
        wanted = self.teacher_features(images)
        distances = []
        for name, head in self.heads.items():
            of_teacher = wanted[name].float()
            ours = head(features[of_teacher.shape[2]]).float()
            cosine = F.cosine_similarity(ours, of_teacher, dim=1)  # (N, side, side)
            distances.append(1 - cosine.mean(dim=(1, 2)))
        return torch.stack(distances).mean(dim=0)

    @torch.no_grad()
    def teacher_features(self, images: Tensor) -> dict[str, Tensor]:
        """Stage -> features of the clean pictures (N, C, side, side)."""
        (teacher,) = self._teacher
        x = resize(images, IMAGE_SIZE)
        found = {}
        for name, part in teacher.named_children():
            x = part(x)
            if name in self.heads:
                found[name] = x
            if len(found) == len(self.heads):
                break
        return found

    def share_gradients(self) -> None:
        """Every process's heads get the mean of all processes' gradients."""
        for weight in self.heads.parameters():
            weight.grad = processes.total(weight.grad) / processes.world_size()


def feature_channels(config: ModelConfig) -> dict[int, int]:
    """Side -> channels of the features that the network hands out."""
    features: dict[int, Tensor] = {}
    with torch.device("meta"), torch.no_grad():
        model, size = DiffusionModel(config), config.image_size
        label = torch.empty(1, config.num_classes)
        model(torch.empty(1, 3, size, size), torch.zeros(1), label, features)
    return {side: x.shape[1] for side, x in features.items()}
