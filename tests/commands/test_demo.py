"""src/demo.py's stages."""

import demo
import guidance_scale
from diffusion.samplers import check_steps
from training.resume import read_config


def test_demo_stages_are_commands_that_parse():
    for size in (demo.QUICK, demo.FULL):
        config, _ = read_config(["--recipe", "tiny", "--dry_run"])
        flags = ["--ckpt_path", "x", *demo.SAMPLER, *size["sweep"].split()]
        sweep = guidance_scale.parse_args(guidance_scale.SweepConfig, flags)
        assert check_steps(config.noise, sweep.sampling) == 12
