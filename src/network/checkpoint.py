"""Checkpoints: plain dicts of tensors and settings, read without running code from the file."""

import errno
import pickle
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iclevr.labels import check_objects
from network.model import DiffusionModel
from runtime.files import atomic_write
from runtime.settings import ROOT, TrainConfig, UserError, from_dict, to_dict

FORMAT = "iclevr-ddpm-1"
PRETRAINED = ROOT / "data" / "standin" / "model.pth"
"""The network that comes with the repository, trained on the stand-in; for sampling only."""


class DamagedFileError(UserError):
    """A file that is not whole, that the disk can't give back, or that never was of this kind."""

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what}; {remedy}")
        self.what = what


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds; `training` (optimiser and the like) only matters for resuming."""

    config: TrainConfig
    objects: dict[str, int]
    """Name -> index of the condition's entries, as trained."""
    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] | None
    epoch: int
    """Epochs done."""
    step: int
    """Optimiser steps done."""
    training: dict[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, atomically.

    Raises:
        UserError: the disk is full, the folder can't be written to, or `load_checkpoint` would
            refuse the file.
    """
    content = {"format": FORMAT} | vars(checkpoint) | {"config": to_dict(checkpoint.config)}
    check_content(content, path, "nothing was written")
    save_tensors(path, content)


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values, atomically; `read_tensors` reads it.

    What was written is read again before it replaces an older file.

    Raises:
        UserError: the disk is full, the folder can't be written to, or the file is not whole.
    """
    with atomic_write(path) as temporary:
        try:
            with open(temporary, "wb") as file:  # given the path, torch wouldn't know the cause
                torch.save(content, file)
        except RuntimeError as error:  # torch's, on top of what the disk refused
            refused = isinstance(error.__context__, OSError)
            raise error.__context__ if refused else OSError(str(error).splitlines()[0]) from None
        whole = zipfile.is_zipfile(temporary)
        if not whole or damaged_part(temporary):
            raise OSError("what was written came out damaged; check the disk")


def damaged_part(path: Path) -> str | None:
    """Which part of a file of `torch.save` misses its checksum (torch itself doesn't look)."""
    if not zipfile.is_zipfile(path):  # torch's format before 1.6, or no such file at all
        return None
    with zipfile.ZipFile(path) as file:
        return file.testzip()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of src/train.py.

    Raises:
        UserError: missing, damaged, or not such a file.
    """
    remedy = "name a file of src/train.py, output/<run>/checkpoints/model_epoch_N.pth"
    return check_content(read_tensors(path, remedy), path, remedy)


def check_content(content: dict[str, Any], path: Path, remedy: str) -> Checkpoint:
    """What a file says is a checkpoint.

    Raises:
        UserError: it is none; names the file and ends with `remedy`.
    """
    if (found := content.get("format")) != FORMAT:
        raise UserError(f"{path}: format {found!r}, expected {FORMAT!r}; {remedy}")
    names = {field.name for field in fields(Checkpoint)}
    if missing := names - content.keys():
        raise UserError(f"{path}: has no {', '.join(sorted(missing))}; {remedy}")
    content = {name: content[name] for name in names}
    for name, kinds in (("model", dict), ("ema", dict | None), ("training", dict),
                        ("epoch", int), ("step", int)):  # fmt: skip
        if not isinstance(content[name], kinds):
            raise UserError(f"{path}: {name} is a {type(content[name]).__name__}; {remedy}")
    config = from_dict(TrainConfig, content["config"], source=str(path))
    objects = check_objects(content["objects"], path)
    if len(objects) != config.model.num_classes:
        raise UserError(
            f"{path}: {len(objects)} objects, but num_classes {config.model.num_classes}; {remedy}"
        )
    return Checkpoint(**content | {"config": config, "objects": objects})


def load_model(checkpoint: Checkpoint, path: Path, device: torch.device) -> DiffusionModel:
    """The network with the averaged weights if there are any, ready for sampling.

    Raises:
        UserError: the weights are not those of the settings in the checkpoint.
    """
    with torch.device("meta"):  # settings alone, however large, take no memory
        model = DiffusionModel(checkpoint.config.model)
    weights = checkpoint.ema or checkpoint.model
    load_weights(model, weights, path, "its settings", assign=True)
    return model.float().to(device, memory_format=torch.channels_last).eval()


def load_weights(
    model: nn.Module, weights: dict[str, torch.Tensor], path: Path, what: str, assign: bool = False
) -> None:
    """Load the state dict of `what`, every name and shape as expected.

    Args:
        assign: take the tensors themselves, for a network on the meta device.

    Raises:
        UserError: anything missing, left over or of another shape.
    """
    try:
        model.load_state_dict(weights, assign=assign)
    except (RuntimeError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: its weights are not those of {what} ({why})") from None


def read_tensors(path: Path, remedy: str) -> dict[str, Any]:
    """Read a dict saved by torch, to the CPU; no code in the file is run (`weights_only=True`).

    Raises:
        UserError: missing, damaged, in need of running code, or no dict; ends with `remedy`.
    """
    try:
        if path.is_file() and (damaged := damaged_part(path)):
            raise DamagedFileError(f"{path}: damaged ({damaged} misses its checksum)", remedy)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None
    except OSError as error:
        what = f"{path}: can't be read: {error.strerror or error}"
        if error.errno == errno.EIO:  # the disk can't give it back: as good as damaged
            raise DamagedFileError(what, remedy) from None
        raise UserError(f"{what}; {remedy}") from None
    except pickle.UnpicklingError:
        raise DamagedFileError(
            f"{path}: damaged, or would run code when read, which is refused", remedy
        ) from None
    except Exception as error:  # whatever the reader makes of a damaged file
        why = f"{type(error).__name__}: {' '.join(str(error).split()).split('. ')[0]}"[:150]
        raise DamagedFileError(f"{path}: damaged or not a checkpoint ({why})", remedy) from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dict; {remedy}")
    return content
