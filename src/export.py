"""Hand a trained network to others: to diffusers and back, or as a small file for sampling.

    python src/export.py --ckpt_path output/ddpm-cfg-v1/checkpoints/model_epoch_500.pth
    python src/export.py --to checkpoint --ckpt_path output/export/ddpm-cfg-v1
    python src/export.py --to half --ckpt_path output/ddpm-cfg-v1/checkpoints/model_epoch_500.pth

The folder that it writes holds unet/ for `diffusers.UNet2DModel.from_pretrained`, scheduler/ for
diffusers' schedulers, class_embedding.safetensors (the MLP whose output is the U-Net's
`class_labels`), settings.json and README.md, a model card that shows how to use them together.
`--to half` writes the averaged weights alone, in half precision: an eighth of the checkpoint.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffusion.samplers import check_steps, make_scheduler
from network.checkpoint import (
    FORMAT,
    Checkpoint,
    check_content,
    load_checkpoint,
    load_model,
    load_weights,
    save_checkpoint,
)
from network.model import DiffusionModel, unet_arguments
from runtime.files import make_folder, read_json
from runtime.settings import (
    ROOT,
    DataConfig,
    RunName,
    SamplingConfig,
    Settings,
    UserError,
    parse_args,
    run,
    to_dict,
)

CARD = """# {name}

A conditional diffusion model of i-CLEVR scenes: names of objects in, {size}x{size} picture out.
{parameters:.1f} M parameters, {steps} optimiser steps, prediction type `{prediction}`, {average}
weights.

```python
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file

unet = UNet2DModel.from_pretrained("unet").eval()
scheduler = DDIMScheduler.from_pretrained("scheduler")
mlp = load_file("class_embedding.safetensors")  # Linear, SiLU, Linear

def embed(labels):  # (N, {classes}) multi-hot; zeros: no condition
    h = torch.nn.functional.silu(labels @ mlp["0.weight"].T + mlp["0.bias"])
    return h @ mlp["2.weight"].T + mlp["2.bias"]

objects = {objects}
labels = torch.zeros(1, {classes})
labels[0, objects[{first}]] = 1
scheduler.set_timesteps({sampling_steps})
x = torch.randn(1, {channels}, {side}, {side})
guidance_scale = 3.0
with torch.no_grad():
    for t in scheduler.timesteps:
        cond = unet(x, t, class_labels=embed(labels)).sample
        uncond = unet(x, t, class_labels=embed(torch.zeros_like(labels))).sample
        x = scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
x = torch.nn.functional.pixel_shuffle(x, {patch})
image = (x / {scaling} + {shift}).clamp(-1, 1)  # (1, 3, {size}, {size}) in [-1, 1]
```

`python src/export.py --to checkpoint --ckpt_path THIS_FOLDER` turns it back into a checkpoint.
"""


@dataclass(frozen=True)
class ExportConfig(Settings):
    """Write a network as a folder for diffusers, or such a folder as a checkpoint."""

    ckpt_path: Path
    """Checkpoint of src/train.py; with --to checkpoint, a folder of this script."""
    to: Literal["diffusers", "checkpoint", "half"] = "diffusers"
    """diffusers: a folder that it loads; checkpoint: such a folder as a checkpoint again; half: a
    checkpoint for sampling only, float16."""
    out: Path | None = None
    """Folder or file to write (default: output/export/<run>, output/export/<run>.pth)."""
    run_name: RunName | None = None
    """Name that the copy carries, and its results are filed under (default: the run's)."""


def to_half(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The averaged weights in float16, for sampling only: no optimiser state.

    Raises:
        UserError: the weights are not those of the settings, or do not fit into float16.
    """
    model = load_model(checkpoint, path, torch.device("cpu"))
    weights = {key: value.half() for key, value in model.state_dict().items()}
    for key, value in weights.items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {key} does not fit into float16; use --to diffusers")
    return replace(checkpoint, model=weights, ema=None, training={})


def to_diffusers(checkpoint: Checkpoint, path: Path, out: Path) -> None:
    """Write the folder; it is there whole or not at all.

    Raises:
        UserError: a network that diffusers doesn't have, or the folder can't be written.
    """
    config = checkpoint.config
    if config.model.halve_every_block:
        raise UserError(f"{path}: trained with --halve_every_block, which diffusers' U-Net lacks")
    model = load_model(checkpoint, path, torch.device("cpu"))
    unet = diffusers.UNet2DModel(**unet_arguments(config.model))
    unet.load_state_dict(model.unet.state_dict())
    objects = checkpoint.objects
    size, noise, net = config.model.image_size, config.noise, unet.config
    card = CARD.format(
        name=config.run_name, size=size, side=net.sample_size, channels=net.in_channels,
        parameters=sum(p.numel() for p in model.parameters()) / 1e6, steps=checkpoint.step,
        prediction=noise.prediction_type, average="averaged" if config.ema else "last",
        classes=len(objects), objects=json.dumps(objects), first=json.dumps(next(iter(objects))),
        sampling_steps=check_steps(noise, SamplingConfig(scheduler="ddim")),
        patch=config.model.patch_size, scaling=noise.scaling_factor, shift=noise.shift_factor,
    )  # fmt: skip
    settings = {"config": to_dict(config), "objects": objects, "epoch": checkpoint.epoch,
                "step": checkpoint.step}  # fmt: skip
    make_folder(out.parent, "--out")
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=".tmp-"))
    try:
        unet.save_pretrained(temporary / "unet")
        make_scheduler(config.noise, "ddim").save_pretrained(temporary / "scheduler")
        embedding = {k: v.contiguous() for k, v in model.class_embedding.state_dict().items()}
        save_file(embedding, temporary / "class_embedding.safetensors")
        (temporary / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for path in temporary.rglob("*.safetensors"):
            path.chmod(0o644)  # like the files beside them, for all who may read the folder
        temporary.chmod(0o755)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: can't be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def from_diffusers(folder: Path) -> Checkpoint:
    """Read a folder of `to_diffusers`; for sampling only, it holds no optimiser state.

    Raises:
        UserError: something is missing, damaged or doesn't fit together.
    """
    remedy = "name a folder that src/export.py has written"
    source = folder / "settings.json"
    settings = read_json(source, remedy)
    known = settings.keys() if isinstance(settings, dict) else set()
    if missing := {"config", "objects", "epoch", "step"} - known:
        raise UserError(f"{source}: has no {', '.join(sorted(missing))}; {remedy}")
    content = settings | {"format": FORMAT, "model": {}, "ema": None, "training": {}}
    checkpoint = check_content(content, source, remedy)
    weights = {}
    for part, path in (
        ("unet", folder / "unet" / "diffusion_pytorch_model.safetensors"),
        ("class_embedding", folder / "class_embedding.safetensors"),
    ):
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: can't be read ({error}); {remedy}") from None
        weights |= {f"{part}.{key}": value for key, value in tensors.items()}
    with torch.device("meta"):
        model = DiffusionModel(checkpoint.config.model)
        load_weights(model, weights, folder, "its settings", assign=True)
    return replace(checkpoint, model=weights)


def main(argv: Sequence[str] | None = None) -> Path:
    """Returns the path that was written."""
    config = parse_args(ExportConfig, argv)
    exported = config.ckpt_path.is_dir()
    if config.to != "checkpoint" and exported:
        raise UserError(f"{config.ckpt_path}: is a folder; --to checkpoint turns it back")
    if config.to == "checkpoint" and not exported:
        raise UserError(f"{config.ckpt_path}: no folder; name one that src/export.py has written")
    checkpoint = (from_diffusers if exported else load_checkpoint)(config.ckpt_path)
    name = config.run_name or checkpoint.config.run_name
    named = replace(
        checkpoint.config, run_name=name, output_dir=Path("output"), data=DataConfig(),
        resume=None, init_from=None, align_to=None,
        reward=replace(checkpoint.config.reward, reward_model=None),
    )  # fmt: skip
    checkpoint = replace(checkpoint, config=named)  # no path of this machine goes out
    name += "" if config.to == "diffusers" else ".pth"
    out = config.out or ROOT / "output" / "export" / name
    if out.exists():
        raise UserError(f"{out}: is there already; name another with --out")
    if config.to == "diffusers":
        to_diffusers(checkpoint, config.ckpt_path, out)
    else:
        half = config.to == "half"
        save_checkpoint(out, to_half(checkpoint, config.ckpt_path) if half else checkpoint)
    print(out)
    return out


if __name__ == "__main__":
    run(main)
