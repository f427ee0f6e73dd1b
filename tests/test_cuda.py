"""What may differ on a card: on CUDA where there is one, else rehearsed on the CPU."""

import functools
import os
import signal
from dataclasses import replace

import diffusers
import pytest
import torch
from conftest import train_argv
from networks import CONFIGS
from torch import nn

import train
from diffusion.samplers import make_scheduler
from diffusion.sampling import sample
from iclevr.labels import condition_files, read_conditions, read_objects
from judging.evaluator import load_evaluator
from network.checkpoint import PRETRAINED, load_checkpoint, load_model
from network.unet import UNet2DModel
from runtime.device import autocast_dtype
from runtime.seeds import picture_seeds
from runtime.settings import ModelConfig, SamplingConfig, TrainConfig
from training import trainer
from training.optimizer import Muon
from training.run_folder import latest_checkpoint
from training.step import TrainState, build_state, train_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NETWORK = ModelConfig(
    image_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
# cuBLAS reads it once, at its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """Full float32, in which rounding is small: cuDNN's convolutions take TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "name",
    [
        "spec" if DEVICE.type == "cuda" else "wide heads, narrowing channels",
        "embedding as scale and shift, dropout",
    ],
)
def test_network_and_gradients_equal_diffusers(name):
    arguments = CONFIGS[name]
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**arguments).to(DEVICE).eval()
    ours = UNet2DModel(**arguments).to(DEVICE, memory_format=torch.channels_last).eval()
    ours.load_state_dict(theirs.state_dict())
    size = arguments["sample_size"]
    x = torch.randn(2, 3, size, size).to(DEVICE)
    t = torch.tensor([3, 470], device=DEVICE)
    labels = torch.randn(2, ours.time_embed_dim).to(DEVICE)
    expected = theirs(x, t, labels).sample
    result = ours(x.to(memory_format=torch.channels_last), t, labels)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    expected.square().mean().backward()
    result.square().mean().backward()
    of_theirs = dict(theirs.named_parameters())
    gradient, expected = (
        torch.cat([p.grad.flatten() for p in parameters])
        for parameters in (ours.parameters(), [of_theirs[n] for n, _ in ours.named_parameters()])
    )
    assert (gradient - expected).norm() < 1e-3 * expected.norm()


def one_step(precision: str, optimizer: str) -> tuple[TrainState, torch.Tensor]:
    """A step of a fresh network on fixed pictures: the state after it, and its loss."""
    config = TrainConfig(
        model=NETWORK, mixed_precision=precision, optimizer=optimizer, lr=1e-3, lr_warmup_steps=0
    )  # fmt: skip
    state = build_state(config, 10, DEVICE)
    generator = torch.Generator().manual_seed(1)
    x_0 = (torch.rand(8, 3, 16, 16, generator=generator) * 2 - 1).to(DEVICE)
    labels = (torch.rand(8, 24, generator=generator) < 0.1).float().to(DEVICE)
    loss, _ = train_step(
        state, config, make_scheduler(config.noise), x_0, labels, autocast_dtype(precision, DEVICE)
    )
    return state, loss


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_step_in_low_precision_is_near_float32s(precision, optimizer):
    exact, exact_loss = one_step("no", optimizer)
    state, loss = one_step(precision, optimizer)
    assert state.skipped.tolist() == [0, 0]
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.02)
    gradients = [
        torch.cat([p.grad.flatten() for p in s.model.parameters()]) for s in (state, exact)
    ]
    # Before the step float16's gradients were brought back from their scale.
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
    assert gradients[0].norm().item() == pytest.approx(gradients[1].norm().item(), rel=0.05)
    before = build_state(TrainConfig(model=NETWORK), 10, DEVICE).model
    for p, q in zip(state.model.parameters(), before.parameters(), strict=True):
        assert p.isfinite().all() and not torch.equal(p, q)


def whole_and_resumed(world, folder, monkeypatch, *flags):
    """Final checkpoints of a run, and of the same run stopped after 5 of 12 steps."""
    more = ("--epochs", 4, "--device", DEVICE.type, *flags)
    whole = load_checkpoint(train.main(train_argv(world, folder / "a", *more)))
    real_step = trainer.train_step

    def stop_after_5(state, *rest):
        result = real_step(state, *rest)
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(trainer, "train_step", stop_after_5)
    with pytest.raises(SystemExit):
        train.main(train_argv(world, folder / "b", *more))
    monkeypatch.setattr(trainer, "train_step", real_step)
    assert load_checkpoint(latest_checkpoint(folder / "b" / "r")).step == 5
    argv = ["--output_dir", str(folder / "b"), "--run_name", "r", "--resume", "auto"]
    return whole, load_checkpoint(train.main(argv))


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("bf16", "adamw"), ("fp16", "adamw"), ("bf16", "muon")]
)
def test_resumed_run_equals_the_uninterrupted_one(
    world, tmp_path, monkeypatch, deterministic, precision, optimizer
):
    flags = ("--mixed_precision", precision, "--optimizer", optimizer, "--dropout", 0.1)
    whole, resumed = whole_and_resumed(world, tmp_path, monkeypatch, *flags)
    for a, b in ((whole.model, resumed.model), (whole.ema, resumed.ema)):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_resumed_run_without_deterministic_algorithms(
    world, tmp_path, monkeypatch, record_property
):
    """As users run it; whether it is the same to the last bit is noted, not demanded."""
    whole, resumed = whole_and_resumed(world, tmp_path, monkeypatch)
    same = all(torch.equal(whole.model[name], resumed.model[name]) for name in whole.model)
    record_property("resumed run equal to the last bit", same)
    for name, value in whole.model.items():
        torch.testing.assert_close(resumed.model[name], value, atol=1e-3, rtol=1e-2)


def test_a_compiled_network_trains_the_same(world, tmp_path, monkeypatch):
    if DEVICE.type == "cpu":  # there the compiler takes half a minute
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    runs = []
    for name, flag in (("a", ()), ("b", ("--compile",))):
        argv = train_argv(world, tmp_path / name, "--epochs", 1, "--device", DEVICE.type, *flag)
        runs.append(load_checkpoint(train.main(argv)))
    for name, value in runs[0].model.items():
        torch.testing.assert_close(runs[1].model[name], value, atol=1e-4, rtol=1e-3)


def test_muon_moves_weights_as_on_the_cpu():
    torch.manual_seed(0)
    start = [torch.randn(32, 16, 3, 3), torch.randn(32, 16, 3, 3), torch.randn(64, 32),
             torch.randn(32)]  # fmt: skip
    gradients = [[torch.randn_like(w) for w in start] for _ in range(3)]
    moves = []
    for device in ("cpu", DEVICE):
        weights = [nn.Parameter(w.clone().to(device)) for w in start]
        optimizer = Muon(weights[:3], weights[3:], 0.01, (0.9, 0.99), 0.1)
        for of_weights in gradients:
            for weight, gradient in zip(weights, of_weights, strict=True):
                weight.grad = gradient.to(device)
            optimizer.step()
        moves.append([w.detach().cpu() - s for w, s in zip(weights, start, strict=True)])
    for a, b in zip(*moves, strict=True):  # Newton-Schulz runs in bfloat16
        assert (a - b).norm() < 0.03 * a.norm()


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpmpp", "unipc"])
def test_pictures_and_scores_equal_the_cpus(scheduler):
    """Drawn by the network that comes with the repository."""
    data = PRETRAINED.parent
    objects = read_objects(data)
    files = condition_files(data).values()
    labels = torch.cat([read_conditions(path, objects)[1][:2] for path in files])
    checkpoint = load_checkpoint(PRETRAINED)
    sampling = SamplingConfig(
        scheduler=scheduler, num_inference_steps=10, mixed_precision="no", batch_size=4
    )
    drawn = {}
    for device, how in (("cpu", sampling), (DEVICE.type, replace(sampling, batch_size=3))):
        model = load_model(checkpoint, PRETRAINED, torch.device(device))
        seeds = picture_seeds(0, len(labels))
        images, _ = sample(model, checkpoint.config.noise, labels, seeds, how, progress=False)
        judge = load_evaluator(data / "evaluator.pth", objects, torch.device(device))
        drawn[how.batch_size] = images, judge.scores(images).cpu()
    for ours, expected in zip(drawn[3], drawn[4], strict=True):
        torch.testing.assert_close(ours, expected, atol=5e-3, rtol=0)
