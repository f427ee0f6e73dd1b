"""Settings that are each fine and useless together: said before the work begins, which goes on."""

import sys
from collections.abc import Sequence

from diffusion.samplers import make_scheduler
from runtime import processes
from runtime.settings import RewardConfig, SamplerConfig, TrainConfig

MOST_SIGNAL = 0.01
"""Share of the variance at the last timestep that may still be the picture's: Stable Diffusion's
.0047 is known to cost contrast (Lin et al. 2023); "linear" leaves .006 of 500 timesteps."""


def of_training(config: TrainConfig, total_steps: int, pictures: int) -> list[str]:
    """Doubts about a training of so many steps on so many pictures."""
    warmup, limit = config.lr_warmup_steps, config.max_train_steps
    highest = config.lr * total_steps / (warmup + 1)
    interval = config.sample_interval * (pictures // min(config.batch_size, pictures))
    first, last = make_scheduler(config.noise).alphas_cumprod[[0, -1]].tolist()
    doubts = {
        f"--lr_warmup_steps {warmup}: there are only {total_steps} steps; the learning rate gets "
        f"no higher than {highest:.2g}, not {config.lr:g}": warmup >= total_steps,
        f"--max_train_steps {limit}: after {total_steps} steps --epochs {config.epochs} ends the "
        "training": limit is not None and limit > total_steps,
        f"--batch_size {config.batch_size}: there are only {pictures} pictures; a batch is all "
        "of them": config.batch_size > pictures,
        "--keep_best: only one preview is drawn, the last; for more lower --sample_interval "
        f"{config.sample_interval}": config.keep_best and interval >= total_steps,
        f"--align_weight {config.align_weight:g}: does nothing without --align_to": (
            config.align_to is None and config.align_weight != TrainConfig.align_weight
        ),
        "--reward_weight and the other --reward_ flags: do nothing without --reward_model": (
            config.reward.reward_model is None and config.reward != RewardConfig()
        ),
        f"--min_snr_gamma {config.min_snr_gamma}: --equal_levels divides its weights out again": (
            config.min_snr_gamma is not None and config.equal_levels
        ),
        f"--cfg_dropout_prob {config.cfg_dropout_prob:g}: no picture's condition is ever seen; "
        "the network can't draw what it is asked for": config.cfg_dropout_prob == 1,
        f"noise schedule: at the last of {config.noise.num_train_timesteps} timesteps {last:.2g} "
        "of the variance is still the picture's, but sampling starts from noise alone; raise "
        "--num_train_timesteps or use --beta_schedule squaredcos_cap_v2": last > MOST_SIGNAL,
        f"noise schedule: at the first timestep only {first:.2g} of the variance is the "
        "picture's; pictures stay noisy": first < 0.5,
    }
    scale = config.preview.preview_guidance_scale
    return [text for text, holds in doubts.items() if holds] + of_guidance(
        config, f"--preview_guidance_scale {scale:g}", [scale]
    )


def of_guidance(trained: TrainConfig, flag: str, scales: Sequence[float]) -> list[str]:
    """Doubts about guidance by a network that has (perhaps) never seen a dropped condition."""
    if trained.cfg_dropout_prob or all(scale == 1 for scale in scales):
        return []
    return [f"{flag}: guides by a network trained with --cfg_dropout_prob 0, which never learned "
            "to draw without a condition; only scale 1 is sure to make sense"]  # fmt: skip


def of_sampling(sampling: SamplerConfig, scales: Sequence[float]) -> list[str]:
    """Doubts about how pictures are drawn with these guidance scales."""
    whole, guided = (0, 1), any(scale != 1 for scale in scales)
    doubts = {
        "--guidance_scale 0: draws without the condition, whatever is asked for": (
            [*scales] == [0] and sampling.guidance_interval == whole
        ),
        "--guidance_interval: does nothing with a guidance scale of 1": (
            sampling.guidance_interval != whole and not guided
        ),
        "--resample_interval: does nothing without --resample": (
            sampling.resample_interval != whole and sampling.resample == 1
        ),
    }
    return [text for text, holds in doubts.items() if holds]


def warn(doubts: Sequence[str]) -> None:
    """Print them, once for all processes."""
    for doubt in doubts if processes.is_main() else ():
        print(f"warning: {doubt}", file=sys.stderr)
