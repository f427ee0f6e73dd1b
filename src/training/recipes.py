"""The recipes: what all flags of src/train.py default to."""

from dataclasses import replace

from runtime.settings import ModelConfig, RecipeName, SchedulerConfig, TrainConfig

# What a CPU can train: a narrow network on patches of 2x2 pixels, pictures
# scaled to unit variance, Muon, a condition that is heard from the start and scales features.
# Objects of unit variance show through much noise: they have their places while alphas_cumprod is
# still below about .01. So the schedule is shifted towards noise, for training and sampling to
# spend their steps there.
SMALL = TrainConfig(
    recipe="small",
    model=ModelConfig(
        patch_size=2,
        resnet_time_scale_shift="scale_shift",
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
    ),
    noise=SchedulerConfig(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        shift_factor=-0.08,
        scaling_factor=8.0,
        log_snr_shift=-4.0,
    ),
    zero_init=True,
    batch_size=32,
    optimizer="muon",
    lr=1.5e-3,
    lr_warmup_steps=50,
    adam_beta2=0.99,
    ema_decay=0.998,
    stratified_timesteps=True,
)

# What gets furthest in ten minutes of two cores. Patches of 4x4 pixels take less time a
# picture; batches of 64, as Muon's step costs as much for 64 pictures as for one. A network that
# little training has made predicts pictures without grain if it predicts x_0: noise need not pass
# through it (Li & He 2025). What is learned last are the colors and shapes of full scenes, at
# noise levels in the middle, where the loss is smaller than on mere noise: so full scenes and these
# levels come more often, and a picture counts the same at every level.
TINY = replace(
    SMALL,
    recipe="tiny",
    model=replace(
        SMALL.model,
        patch_size=4,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ),
    noise=replace(SMALL.noise, prediction_type="sample"),
    batch_size=64,
    lr=2e-3,
    objects_power=2.0,
    timestep_interval=(0.3, 0.9),
    equal_levels=True,
)

RECIPES: dict[RecipeName, TrainConfig] = {"original": TrainConfig(), "small": SMALL, "tiny": TINY}
"""Defaults of src/train.py by the name of --recipe."""
