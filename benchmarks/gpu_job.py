"""What the stages of gpu_session.py share: networks, settings, and a place for what they find."""

import gc
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from common import machine

from runtime.device import pick_device
from runtime.files import write_json
from runtime.settings import ROOT, DataConfig, PositiveFloat, Settings, TrainConfig, parse_args
from training.recipes import RECIPES

StageName = Literal["data", "compile", "tests", "speed", "small", "recipes", "sampling"]
WORK_DIR = ROOT / "output" / "benchmarks" / "gpu_session"
SMALL, ORIGINAL, CHOICES = "widened small recipe", "original recipe", "small recipe at full size"
NETWORKS = {
    ORIGINAL: "--recipe original",
    # All of the small recipe but its network; a lower rate for the wider matrices.
    CHOICES: "--recipe small --patch_size 1 --block_out_channels 128 128 256 256 512 512 "
    "--down_block_types DownBlock2D DownBlock2D DownBlock2D DownBlock2D AttnDownBlock2D DownBlock2D"
    " --up_block_types UpBlock2D AttnUpBlock2D UpBlock2D UpBlock2D UpBlock2D UpBlock2D "
    "--layers_per_block 2 --norm_num_groups 32 --attention_head_dim 8 --batch_size 64 --lr 1e-3",
    # 11.7 M parameters, 23.4 MB in float16; 5.5 times the work of the small one for a picture.
    SMALL: "--recipe small --block_out_channels 96 128 128 128 --layers_per_block 2 "
    "--batch_size 256 --lr 2e-3",
}
TOY = (
    "--image_size 16 --patch_size 1 --block_out_channels 16 32 --layers_per_block 1 "
    "--down_block_types DownBlock2D AttnDownBlock2D --up_block_types AttnUpBlock2D UpBlock2D "
    "--norm_num_groups 8 --attention_head_dim 8 --batch_size 8 --num_train_timesteps 20"
)
TOY_STEPS = 12


@dataclass(frozen=True)
class StageConfig(Settings):
    """Run one stage."""

    stage: StageName
    """Which."""
    until: PositiveFloat | None = None
    """When it must have ended, in seconds since 1970 (default: in an hour)."""
    toy: bool = False
    """In miniature, on the CPU."""
    work_dir: Path = WORK_DIR
    """Data, runs and each stage's figures go in here."""
    out_dir: Path = WORK_DIR / "results"
    """Pictures and weights go in here."""


class Job:
    """A stage at work: where it computes, how long it may, what it has found."""

    def __init__(self, config: StageConfig):
        self.config, self.toy = config, config.toy
        self.work, self.out = config.work_dir.resolve(), config.out_dir.resolve()
        self.until = config.until or time.time() + 3600
        self.device = pick_device("cpu" if config.toy else None)
        self.report: dict[str, Any] = {"machine": machine(self.device), "text": {}}

    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()

    def note(self, text: str = "", key: str = "", **figures: Any) -> None:
        """Keep figures, and a paragraph for the summary, whatever happens afterwards.

        Args:
            key: the paragraph replaces the one of this name.
        """
        self.report |= figures
        if text:
            self.report["text"][key or str(len(self.report["text"]))] = text
            print(text, flush=True)
        write_json(self.work / f"{self.config.stage}.json", self.report)

    def flags(self, network: str) -> str:
        return f"{NETWORKS[network]} {TOY if self.toy else ''}"

    def settings(self, network: str) -> TrainConfig:
        default = RECIPES["original" if network == ORIGINAL else "small"]
        return parse_args(TrainConfig, shlex.split(self.flags(network)), default)

    def argv(self, flags: str, **more: Any) -> list[str]:
        """Flags of a script of src/ that works on the stage's data."""
        more |= {"data_dir": self.work / "data", "device": self.device, "wandb": "disabled"}
        return shlex.split(flags) + [str(x) for key in more for x in (f"--{key}", more[key])]

    @property
    def data(self) -> DataConfig:
        return DataConfig(data_dir=self.work / "data")


def free_memory() -> None:
    """What the last variant held, and what the compiler knows of it, is gone."""
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
