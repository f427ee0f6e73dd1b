"""What there is to set: frozen dataclasses, shared by the scripts.

A field's type gives the flag's type and range, the string below it the help text. How flags and
files are read is in command_line.py; scripts import its names from here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from runtime.command_line import (
    ROOT,
    Settings,
    UserError,
    from_dict,
    parse_args,
    run,
    to_dict,
    with_paths,
)

__all__ = [
    "ROOT", "Settings", "UserError", "from_dict", "parse_args", "run", "to_dict", "with_paths",
]  # fmt: skip

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
Channels = Annotated[int, Field(ge=1, le=2**14)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
LARGEST = 1e30
"""Of settings: float32, in which they are used, ends at 3.4e38."""
PositiveFloat = Annotated[float, Field(gt=0, le=LARGEST)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=LARGEST)]
Probability = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _only_if(holds: Callable[[Any], Any], why: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(why)
        return value

    return AfterValidator(check)


RunName = Annotated[
    str,
    _only_if(
        # result/ is where those of all runs go.
        re.compile(r"(?!(\.{1,2}|result)$)[^/\\\x00-\x1f\x7f\ud800-\udfff]+").fullmatch,
        "it names a folder; use another name, without / and \\",
    ),
]
"""A plain folder name: a run may be copied and renamed in any file manager, and goes on."""
Name = Annotated[
    str,
    _only_if(lambda name: name.strip() and name.isprintable(), "use a name of one line"),
]
"""What outputs call something."""
FdSamples = Annotated[
    int,
    Field(ge=0, le=10**6),
    _only_if(lambda n: n != 1, "one picture has no spread; use 0 for none, or at least 2"),
]
"""Number of pictures for a Frechet distance; 0: none."""
TimeInterval = Annotated[
    tuple[Probability, Probability],
    _only_if(lambda times: times[0] < times[1], "the first number must be below the second"),
]
Precision = Literal["auto", "no", "bf16", "fp16"]
WandbMode = Literal["auto", "online", "offline", "disabled"]
SchedulerName = Literal["ddpm", "ddim", "dpmpp", "unipc"]
Composition = Literal["joint", "objects", "both"]
RecipeName = Literal["original", "small", "tiny"]
OptimizerName = Literal["adamw", "muon"]
DownBlockType = Literal["DownBlock2D", "AttnDownBlock2D"]
UpBlockType = Literal["UpBlock2D", "AttnUpBlock2D"]


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The network; defaults as in the original report (113.9 M parameters)."""

    image_size: Annotated[int, Field(ge=8, le=1024)] = 64
    """Side of the square pictures in pixels."""
    patch_size: Annotated[int, Field(ge=1, le=64)] = 1
    """The U-Net sees patches of this side as one position of more channels: less work at full
    resolution (Luhman & Luhman 2022); 1: single pixels, diffusers' network."""
    block_out_channels: Annotated[tuple[Channels, ...], Field(min_length=1, max_length=16)] = (
        128, 128, 256, 256, 512, 512,
    )  # fmt: skip
    """Channels of each resolution, from fine to coarse."""
    down_block_types: tuple[DownBlockType, ...] = (
        "DownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D",
        "DownBlock2D",
    )  # fmt: skip
    """Kind of block at each resolution on the way down."""
    up_block_types: tuple[UpBlockType, ...] = (
        "UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D",
    )  # fmt: skip
    """Kind of block at each resolution on the way up, from coarse to fine."""
    layers_per_block: Annotated[int, Field(ge=1, le=100)] = 2
    """ResBlocks of a down block (an up block has one more)."""
    attention_head_dim: PositiveInt = 8
    """Channels of one attention head."""
    norm_num_groups: PositiveInt = 32
    """Groups of every GroupNorm (the report's table: 8)."""
    halve_every_block: bool = False
    """Halve after the last down block too (the report's six halvings 64 -> 1); diffusers
    leaves that one out."""
    dropout: Probability = 0.0
    """Dropout before the second convolution of a ResBlock."""
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    """How time and condition enter a ResBlock: added, or as scale and shift of its second
    GroupNorm (Dhariwal & Nichol 2021, section 4.2)."""
    time_embedding_dim: PositiveInt | None = None
    """Length of the embeddings of time and condition (default: 4 times the finest level's
    channels, as diffusers has it)."""
    num_classes: Annotated[int, Field(ge=1, le=10**5)] = 24
    """Length of the multi-hot condition."""


@dataclass(frozen=True)
class SchedulerConfig(Settings):
    """The noise schedule, stored in the checkpoint so that sampling uses the trained one."""

    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"
    """Name of the beta schedule (Nichol & Dhariwal 2021: squaredcos_cap_v2)."""
    num_train_timesteps: Annotated[int, Field(ge=2, le=10**5)] = 500
    """Diffusion steps T."""
    log_snr_shift: Annotated[float, Field(ge=-20, le=20)] = 0.0
    """Added to log SNR at every timestep (Hoogeboom et al. 2023, section 3.1): below 0 gives more
    noise, and with it more steps of a sampler to the layout of a scene."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts: eps, v (Salimans & Ho 2022) or x_0."""
    timestep_spacing: Literal["leading", "trailing"] = "leading"
    """Which timesteps a sampler of few steps visits (Lin et al. 2023, table 2)."""
    shift_factor: Annotated[float, Field(ge=-LARGEST, le=LARGEST)] = 0.0
    """The network sees (x - shift_factor) * scaling_factor, with x in [-1, 1]."""
    scaling_factor: PositiveFloat = 1.0
    """8 gives i-CLEVR's pale pictures about unit variance, for which noise schedules are made."""


@dataclass(frozen=True)
class DataConfig(Settings):
    """Where the data lies; the course's files and the rendered stand-in have the same layout."""

    data_dir: Path | None = None
    """Folder of objects.json, train.json, test.json, new_test.json (default: data/ if it holds
    objects.json, else data/standin/)."""
    image_dir: Path | None = None
    """Folder of the training pictures (default: iclevr/ in the data folder)."""
    cache_dir: Path | None = None
    """Folder of the decoded pictures (default: .cache/ in the data folder)."""
    follow_links: bool = False
    """Take training pictures that are links out of their folder, as git-annex and DVC make them."""
    evaluator: Path | None = None
    """Weights of the judge (default: checkpoint.pth in the data folder, else evaluator.pth
    there, else the stand-in's, which comes with the repository)."""


@dataclass(frozen=True)
class SamplerConfig(Settings):
    """How pictures are drawn, but for the guidance scale."""

    scheduler: SchedulerName = "ddpm"
    """ddpm (Ho et al. 2020), ddim (Song et al. 2021), or a solver of second order for few steps:
    dpmpp (DPM-Solver++(2M), Lu et al. 2022) or unipc (Zhao et al. 2023)."""
    num_inference_steps: PositiveInt | None = None
    """Denoising steps (default: all trained timesteps for ddpm, 50 for ddim, 12 for solvers)."""
    eta: Probability = 0.0
    """Noise of a ddim step: 0 is deterministic, 1 as much as ddpm."""
    guidance_interval: TimeInterval = (0.0, 1.0)
    """Guide only where t / T lies in here; the rest has scale 1, which for one condition is plain
    conditional and costs half (Kynkaanniemi et al. 2024)."""
    resample: PositiveInt = 1
    """Take every step so many times, with noise put back in between: mistakes get repaired
    (RePaint, Lugmayr et al. 2022, algorithm 1). For ddpm and ddim."""
    resample_interval: TimeInterval = (0.0, 1.0)
    """Resample only where t / T lies in here."""
    compose: Composition = "joint"
    """How objects are asked for: joint, as one condition; objects, each as its own, predictions
    added up (Liu et al. 2022), one evaluation for each; both, half and half."""
    best_of: Annotated[int, Field(ge=1, le=1000)] = 1
    """Draw so many pictures of every condition, and keep the one that the network itself finds to
    show it best (after CompLift, Yu & Gao 2025); no judge is asked. What must not come is not
    weighed."""
    batch_size: PositiveInt = 64
    """Pictures drawn at a time; the pictures do not depend on it, but for rounding."""
    classifier_guidance_scale: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Follow the gradient of the --evaluator too, this strongly; such figures are marked."""
    mixed_precision: Precision = "auto"
    """auto: bf16 where the device computes faster in it, else no (float32)."""


@dataclass(frozen=True)
class SamplingConfig(SamplerConfig):
    """How pictures are drawn."""

    guidance_scale: Annotated[float, Field(ge=-100, le=100)] = 3.0
    """Classifier-free guidance w in eps_uncond + w (eps_cond - eps_uncond); 1 is none."""


@dataclass(frozen=True)
class PreviewConfig(Settings):
    """The preview during training: the test conditions, drawn by DDIM."""

    preview_steps: PositiveInt = 50
    """Denoising steps of a preview."""
    preview_guidance_scale: Annotated[float, Field(ge=-100, le=100)] = 3.0
    """Guidance scale of a preview."""
    preview_fd_samples: FdSamples = 0
    """Pictures drawn for a preview's Frechet distance, such as 2048; 0: none, for its cost."""


@dataclass(frozen=True)
class RewardConfig(Settings):
    """Learning from a classifier's opinion of what the network draws (ReFL, Xu et al. 2023)."""

    reward_model: Path | None = None
    """A classifier (src/train_evaluator.py --seed 1 --out FILE; not the judge) that looks at what
    the network draws while it trains; none: only training pictures are learned from."""
    reward_weight: PositiveFloat = 1e-3
    """Weight of that part of the loss, -log p(objects | x_0_hat)."""
    reward_batch_size: PositiveInt = 32
    """Pictures that are being drawn meanwhile, over all processes."""
    reward_steps: PositiveInt = 12
    """DDPM steps of such a picture; each takes one training step."""
    reward_guidance_scale: Annotated[float, Field(ge=-100, le=100)] = 3.0
    """Guidance scale of such a picture."""
    reward_interval: TimeInterval = (0.0, 1.0)
    """The classifier is asked only where t / T lies in here."""
    reward_retry: Probability = 0.8
    """Chance that a condition is drawn again, from other noise, when the classifier finds that the
    finished picture does not show it: so what is hard for the network comes more often."""


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Train the conditional DDPM. Defaults are the original recipe."""

    recipe: RecipeName = "original"
    """What all other flags default to: original (the report's network and training), small (4.7 M
    parameters, which a CPU can train in hours) or tiny (5.1 M in larger patches, in minutes)."""
    epochs: PositiveInt = 500
    """Passes over the training pictures, or as many draws of them (--objects_power)."""
    max_train_steps: PositiveInt | None = None
    """Stop after this many optimiser steps, whatever --epochs says."""
    batch_size: PositiveInt = 64
    """Pictures of one optimiser step, over all processes."""
    gradient_accumulation_steps: PositiveInt = 1
    """Take each process's share of a batch in so many parts, for less memory; the step is the
    same."""
    optimizer: OptimizerName = "adamw"
    """adamw, or muon (Jordan 2024) for the matrices inside the network and adamw for the rest."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate: linear warm-up, then cosine to 0."""
    lr_warmup_steps: NonNegativeInt = 500
    """Steps of the warm-up."""
    weight_decay: NonNegativeFloat = 1e-2
    """Decoupled weight decay."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second beta."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger L2 norm are scaled down to it."""
    max_skipped_steps: PositiveInt = 50
    """A step with NaN or infinite gradients changes no weight and is counted; after so many in a
    row training stops."""
    cfg_dropout_prob: Probability = 0.1
    """Chance that a picture's condition is dropped, for classifier-free guidance."""
    min_snr_gamma: PositiveFloat | None = None
    """Weight the loss by min(SNR, gamma) (Hang et al. 2023); none: the plain loss."""
    timestep_power: PositiveFloat = 1.0
    """Timesteps are drawn as T u^(1 / power), u uniform in [0, 1): above 1 favours noisy ones,
    where it is decided which objects stand where."""
    timestep_interval: TimeInterval = (0.0, 1.0)
    """Half of a batch's timesteps are drawn with t / T in here, the others as --timestep_power
    says; 0 1: all of them so."""
    stratified_timesteps: bool = False
    """Spread the timesteps of a batch evenly (Kingma et al. 2021, appendix I.1): the loss of a
    batch then varies less."""
    equal_levels: bool = False
    """Divide the loss by its running mean at the noise level, so that a picture counts the same at
    every level (Karras et al. 2024, EDM2, learn such weights)."""
    align_to: Path | None = None
    """Draw the network's features towards those of this classifier (src/train_evaluator.py --seed 1
    --out FILE; not the judge), which sees the picture without noise (REPA, Yu et al. 2024)."""
    align_weight: PositiveFloat = 0.5
    """Weight of that part of the loss."""
    ema: bool = True
    """Keep an exponential moving average of the weights; preview and test use it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """Decay of the average; starts lower: min(decay, (1 + step) / (10 + step))."""
    horizontal_flip: bool = True
    """Mirror half of the training pictures."""
    objects_power: NonNegativeFloat = 0.0
    """Training pictures are drawn in proportion to their number of objects to this power: above 0
    favours full scenes, which are learned last. 0: an epoch shows each picture once."""
    mixed_precision: Precision = "auto"
    """auto: bf16 where the device computes faster in it, else no."""
    compile: bool = False
    """Compile the network with torch.compile: faster steps after a first one that takes minutes."""
    zero_init: bool = False
    """Start every residual branch and the output at 0, and object embeddings at unit scale;
    else all weights start as PyTorch's."""
    seed: Seed = 0
    """Seed of weights, order, flips, noise and previews."""
    run_name: RunName = "ddpm-cfg-v1"
    """Name of the run; its folder lies in --output_dir."""
    output_dir: Path = ROOT / "output"
    """Folder of all runs."""
    init_from: Path | None = None
    """Start from the averaged weights in this checkpoint, as data/standin/model.pth; network and
    noise schedule default to its."""
    resume: Annotated[str, Field(min_length=1)] | None = None
    """auto, a run folder or a checkpoint: go on from there; other flags default to its."""
    save_interval: PositiveInt = 50
    """Epochs between checkpoints; the last epoch is always saved."""
    keep_last: PositiveInt | None = None
    """Checkpoints to keep, the oldest are deleted (default: all)."""
    keep_best: bool = False
    """Keep the weights of the best preview too, in checkpoints/best.pth. A preview is one draw
    of 32 pictures: the best of many is partly luck."""
    sample_interval: PositiveInt = 10
    """Epochs between previews; the last epoch always gets one."""
    log_interval: PositiveInt = 20
    """Steps between lines of metrics.jsonl."""
    num_workers: NonNegativeInt = 0
    """Processes that load pictures; the cache makes 0 fast enough."""
    device: str | None = None
    """cuda, cuda:1, mps, cpu ... (default: the best there is)."""
    wandb: WandbMode = "auto"
    """auto: online when logged in to Weights & Biases, else offline (files in the run folder)."""
    wandb_project: str = "iclevr-ddpm"
    """Project name at Weights & Biases."""
    dry_run: bool = False
    """Print the network's stages, parameters and FLOPs, and stop."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    noise: SchedulerConfig = field(default_factory=SchedulerConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.output_dir / self.run_name
