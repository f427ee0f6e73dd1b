"""What a judge learns from: pictures disturbed as generated ones are."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from iclevr.dataset import normalize, to_uint8


def disturb(x: Tensor, generator: torch.Generator, compress: bool = True) -> Tensor:
    """Mirror, shift, scale, blur, brighten, add noise, compress: each picture by its own amount.

    (N, 3, H, W) in [-1, 1] -> the same. All but compressing can be differentiated.
    """
    n, _, height, width = x.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, 1, 1, 1, device=x.device).uniform_(low, high, generator=generator)

    mirror = (uniform(0, 1) < 0.5).float().view(n) * -2 + 1
    theta = torch.zeros(n, 2, 3, device=x.device)
    scale = uniform(0.88, 1.12).view(n)
    theta[:, 0, 0], theta[:, 1, 1] = mirror * scale, scale
    theta[:, :, 2] = torch.stack([uniform(-0.1, 0.1).view(n), uniform(-0.1, 0.1).view(n)], dim=1)
    grid = F.affine_grid(theta, [n, 3, height, width], align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    # Softness: half of the pictures partly blurred, some as coarse as a 32x32 model's.
    soft = TF.gaussian_blur(x, kernel_size=[7, 7], sigma=[1.2, 1.2])
    x = torch.lerp(x, soft, (uniform(-1, 1)).clamp(min=0))
    coarse = F.interpolate(F.avg_pool2d(x, 2), (height, width), mode="bilinear")
    x = torch.where(uniform(0, 1) < 0.25, coarse, x)

    gray = x.mean(dim=(1, 2, 3), keepdim=True)
    x = (x - gray) * uniform(0.75, 1.3) + gray + uniform(-0.2, 0.2)  # contrast, brightness
    tint = torch.cat([uniform(-0.05, 0.05) for _ in range(3)], dim=1)  # white balance
    noise = torch.randn(x.shape, device=x.device, generator=generator)
    x = (x + tint + noise * uniform(0, 0.06)).clamp(-1, 1)

    if not compress:
        return x
    # JPEG, which torchvision knows on the CPU only, for about a quarter: quality 20 to 100.
    for i, quality in enumerate(uniform(-200, 100).view(n).long().tolist()):
        if quality >= 20:
            x[i] = normalize(TF.jpeg(to_uint8(x[i].cpu()), quality)).to(x.device)
    return x
