"""Adding an object to a picture that is already there; the network is not trained for it.

Where it can stand is read off the network: at noise levels at which a scene is laid out, its
prediction with the new object in the condition differs from that without it at the places that
come into question (DiffEdit, Couairon et al. 2023, section 3.2). A disc at the best of these that
is free is then drawn anew, with all around it held to the picture (RePaint, Lugmayr et al. 2022).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.guidance import Guide
from diffusion.samplers import make_scheduler
from diffusion.sampling import Inpainting, sample
from diffusion.schedule import scale
from runtime.seeds import derive_seed, draw_noise
from runtime.settings import SamplingConfig, SchedulerConfig, UserError

LEVELS = (0.65, 0.8)
"""Noise levels t / T at which places are settled."""
NUM_NOISES = 6
"""Noises of each level that a place is looked for with."""
RADIUS = 0.17
"""Of the disc, in sides of a picture; an object is some 0.2 sides wide."""
MARGIN = 0.125
"""Least distance of the disc's centre to the picture's edge, in sides."""
BUSY = 0.12
"""Difference to the background, of pictures in [-1, 1], from which a pixel is taken for an
object's."""


def busy(images: Tensor) -> Tensor:
    """Where objects stand, (N, 1, S, S) in {0, 1}, of pictures (N, 3, S, S) in [-1, 1].

    i-CLEVR's ground changes slowly: what differs from its row's median stands on it. Specks of a
    pixel or two are dropped.
    """
    background = images.median(dim=3, keepdim=True).values
    differs = ((images - background).abs().amax(1, keepdim=True) > BUSY).float()
    eroded = -F.max_pool2d(-differs, 3, 1, 1)
    return F.max_pool2d(eroded, 3, 1, 1)


@torch.no_grad()
def find_places(
    model: nn.Module,
    noise: SchedulerConfig,
    images: Tensor,
    before: Tensor,
    after: Tensor,
    seeds: Sequence[int],
) -> Tensor:
    """Discs in which what is in `after` but not in `before` may be drawn.

    Args:
        images: (N, 3, S, S) in [-1, 1] on the network's device.
        before, after: (N, K) multi-hot, what the pictures show and what they shall show.
        seeds: N, one for each picture; its own noise is another.

    Returns:
        (N, 1, S, S): 1 inside, 0 outside, a soft edge of two pixels in between.

    Raises:
        UserError: no place is free.
    """
    device, side = images.device, images.shape[-1]
    generators = [torch.Generator().manual_seed(derive_seed(seed, 9, 0)) for seed in seeds]
    scheduler, x_0 = make_scheduler(noise), scale(images, noise)
    differs = torch.zeros(len(images), 1, side, side, device=device)
    for level in LEVELS:
        t = torch.tensor(int(level * noise.num_train_timesteps), device=device)
        for _ in range(NUM_NOISES):
            eps = draw_noise(generators, side).to(device)
            x_t = scheduler.add_noise(x_0, eps, t.expand(len(x_0)))
            change = model(x_t, t, after).float() - model(x_t, t, before).float()
            differs += change.abs().mean(1, keepdim=True)
    window = 2 * (side // 14) + 1  # about an object
    wanted = F.avg_pool2d(differs, window, 1, window // 2)
    reach = max(1, round(0.11 * side))  # half an object, and a gap
    wanted *= 1 - F.max_pool2d(busy(images), 2 * reach + 1, 1, reach)
    edge = max(1, round(MARGIN * side))
    inside = torch.zeros_like(wanted)
    inside[..., edge:-edge, edge:-edge] = 1
    best = (wanted * inside).flatten(1).max(1)
    if (best.values <= 0).any():
        raise UserError("the picture has no free place for another object; use an emptier one")
    rows = torch.arange(side, device=device)
    y, x = (part[:, None, None] for part in (best.indices // side, best.indices % side))
    distance = ((rows[:, None] - y) ** 2 + (rows - x) ** 2).sqrt()[:, None]
    return ((RADIUS * side + 1 - distance) / 2).clamp(0, 1)


def add_objects(
    model: nn.Module,
    noise: SchedulerConfig,
    images: Tensor,
    before: Tensor,
    after: Tensor,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    guide: Guide | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw what is in `after` but not in `before` into pictures; the rest of them stays.

    Args:
        images: (N, 3, S, S) in [-1, 1].
        before, after: (N, K) multi-hot, what the pictures show and what they shall show.
        seeds: N seeds.
        sampling, guide: as of `sample`; with `resample` above 1 the new object fits in better.

    Returns:
        pictures (N, 3, S, S) in [-1, 1] and the discs that were drawn anew (N, 1, S, S), on the CPU

    Raises:
        UserError: no place is free in one of them.
    """
    model.eval()
    device = next(model.parameters()).device
    images, before, after = (part.to(device) for part in (images, before, after))
    free = find_places(model, noise, images, before, after, seeds)
    inpainting = Inpainting(scale(images, noise), free)
    result, _ = sample(model, noise, after, seeds, sampling, guide=guide, inpainting=inpainting)
    # The network's arithmetic has left its mark on what was only carried through.
    outside = (free == 0).cpu()
    return torch.where(outside, images.cpu(), result), free.cpu()
