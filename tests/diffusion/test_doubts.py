"""Settings that are each fine and useless together."""

import pytest
from conftest import error_of, train_argv

import guidance_scale
import test
import train
from diffusion.doubts import of_sampling, of_training
from runtime.settings import SamplerConfig, TrainConfig, parse_args
from training.recipes import RECIPES


def doubts(flags: str, steps: int = 1000, pictures: int = 640) -> str:
    """What is said of a training of so many steps."""
    return "\n".join(of_training(parse_args(TrainConfig, flags.split()), steps, pictures))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr_warmup_steps 1000", "--lr_warmup_steps 1000: there are only 1000 steps"),
        ("--lr_warmup_steps 3999", "no higher than 2.5e-05, not 0.0001"),
        ("--max_train_steps 1001 --epochs 100", "--max_train_steps 1001: after 1000 steps"),
        ("--batch_size 641", "there are only 640 pictures"),
        ("--min_snr_gamma 5 --equal_levels", "--equal_levels divides its weights out again"),
        ("--keep_best --sample_interval 100", "--keep_best: only one preview"),
        ("--align_weight 0.7", "--align_weight 0.7: does nothing"),
        ("--reward_steps 10", "do nothing without --reward_model"),
        ("--cfg_dropout_prob 1", "can't draw what it is asked for"),
        ("--cfg_dropout_prob 0", "--preview_guidance_scale 3: guides by a network trained with"),
        ("--beta_schedule linear --num_train_timesteps 100", "100 timesteps 0.36 of the variance"),
        ("--beta_schedule scaled_linear", "500 timesteps 0.027 of the variance"),
        ("--log_snr_shift 15", "of the variance is still the picture's"),
        ("--log_snr_shift -20", "pictures stay noisy"),
    ],
)
def test_a_training_that_can_hardly_succeed_is_doubted(flags, words):
    assert words in doubts(flags)
    assert len(doubts(flags).splitlines()) == 1


@pytest.mark.parametrize(
    "flags",
    ["", "--lr_warmup_steps 999", "--keep_best --keep_last 1 --sample_interval 99",
     "--beta_schedule linear", "--cfg_dropout_prob 0 --preview_guidance_scale 1",
     "--sample_interval 1000 --save_interval 1000", "--batch_size 640"],
)  # fmt: skip
def test_what_makes_sense_is_not_doubted(flags):
    assert doubts(flags) == ""
    assert not of_training(RECIPES["small"], 1000, 640)


def test_doubts_about_sampling():
    plain = SamplerConfig()
    assert not of_sampling(plain, [1.0]) and not of_sampling(plain, [3.0])
    (doubt,) = of_sampling(plain, [0.0])
    assert "draws without the condition" in doubt
    assert not of_sampling(plain, [0.0, 1.0])  # a sweep that begins there
    (doubt,) = of_sampling(SamplerConfig(guidance_interval=(0.2, 1)), [1.0])
    assert "--guidance_interval: does nothing" in doubt
    assert not of_sampling(SamplerConfig(guidance_interval=(0.2, 1)), [1.0, 2.0])
    (doubt,) = of_sampling(SamplerConfig(resample_interval=(0.2, 1)), [3.0])
    assert "--resample_interval: does nothing" in doubt


def test_what_cannot_work_ends_before_the_training(world, tmp_path):
    argv = train_argv(world, tmp_path)
    assert "--dropout 1: nothing is left" in error_of(train.main, [*argv, "--dropout", 1])
    message = error_of(train.main, [*argv, "--lr", 0.1, "--weight_decay", 10])
    assert message.startswith("--weight_decay 10: with --lr 0.1")
    assert not (tmp_path / "r").exists()


def test_commands_say_their_doubts_and_go_on(world, tmp_path, capsys):
    flags = ("--epochs", 1, "--cfg_dropout_prob", 0)
    path = train.main(train_argv(world, tmp_path, *flags))
    error = capsys.readouterr().err
    assert "warning: --lr_warmup_steps 500: there are only 3 steps" in error
    assert "warning: --preview_guidance_scale 3: guides" in error
    argv = [*f"--ckpt_path {path} --data_dir {world} --output_dir {tmp_path / 'x'} --device cpu "
            "--wandb disabled --scheduler ddim --num_inference_steps 5".split()]  # fmt: skip
    guidance = "warning: guidance: guides by a network trained with --cfg_dropout_prob 0"
    for scale, said in ((1, False), (2, True)):
        test.main([*argv, "--guidance_scale", str(scale), "--prompt", "red cube"])
        assert (guidance in capsys.readouterr().err) is said
    test.main([*argv, "--prompt", "red cube", "--num_seeds", "2"])
    assert "warning: --prompt and --add: draw one picture" in capsys.readouterr().err
    guidance_scale.main([*argv, "--scale_max", "1.5", "--num_seeds", "1"])
    assert guidance in capsys.readouterr().err
