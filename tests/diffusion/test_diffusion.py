"""The forward process, the loss, guidance and sampling, against equations and diffusers."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from conftest import LinearModel

from diffusion.guidance import UNWANTED_SHARE, guided_evaluations, guided_prediction
from diffusion.loss import draw_timesteps, drop_labels, min_snr_weight, training_loss
from diffusion.samplers import check_steps, make_scheduler
from diffusion.sampling import evaluations, relay, renoise, sample, sample_steps
from diffusion.schedule import scale, unscale
from judging.drawing import Drawing
from network.model import DiffusionModel
from runtime.seeds import derive_seed, picture_seeds
from runtime.settings import ModelConfig, SamplingConfig, SchedulerConfig, UserError, from_dict

NOISE = SchedulerConfig(num_train_timesteps=20)
FLOAT = SamplingConfig(mixed_precision="no", guidance_scale=2.5)


def labels_of(*indices):
    return torch.nn.functional.one_hot(torch.tensor(indices), 24).float()


def test_schedule_is_the_squared_cosine():
    """Nichol & Dhariwal 2021, equation 17: betas from alpha-bar(t), capped at 0.999."""
    total = 500
    alpha_bar = np.cos((np.arange(total + 1) / total + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    scheduler = make_scheduler(SchedulerConfig())
    np.testing.assert_allclose(scheduler.betas.numpy(), betas, atol=1e-6)
    assert scheduler.config.num_train_timesteps == 500 and not scheduler.config.clip_sample


@pytest.mark.parametrize("t", [0, 120, 499])
def test_forward_process_has_the_right_mean_and_variance(t):
    """q(x_t | x_0) = N(sqrt(alphas_cumprod) x_0, 1 - alphas_cumprod)."""
    scheduler = make_scheduler(SchedulerConfig())
    torch.manual_seed(0)
    x_0 = torch.full((20000, 1, 1, 1), 0.7)
    x_t = scheduler.add_noise(x_0, torch.randn_like(x_0), torch.full((20000,), t))
    alpha_bar = float(torch.cumprod(1 - scheduler.betas, 0)[t])
    sigma = (1 - alpha_bar) ** 0.5
    assert x_t.mean() == pytest.approx(alpha_bar**0.5 * 0.7, abs=5 * sigma / 20000**0.5 + 1e-6)
    assert x_t.std() == pytest.approx(sigma, rel=0.03)


def test_labels_are_dropped_one_by_one():
    labels = torch.ones(20000, 24)
    dropped = drop_labels(labels, 0.1, torch.Generator().manual_seed(0))
    rows = dropped.sum(dim=1)
    assert set(rows.tolist()) == {0.0, 24.0}  # a condition goes whole
    assert (rows == 0).float().mean() == pytest.approx(0.1, abs=4 * (0.09 / 20000) ** 0.5)
    assert torch.equal(drop_labels(labels, 0.0), labels) and drop_labels(labels, 1.0).sum() == 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_equals_the_equations(kind, gamma):
    scheduler = make_scheduler(replace(NOISE, prediction_type=kind))
    model, x_0, y = LinearModel(), torch.rand(6, 3, 8, 8) * 2 - 1, labels_of(0, 1, 2, 3, 4, 5)
    t, eps = torch.tensor([0, 3, 9, 15, 18, 19]), torch.randn(x_0.shape)
    loss = training_loss(model, scheduler, x_0, y, t, eps, gamma)
    alpha_bar = torch.cumprod(1 - scheduler.betas, 0)[t]
    a, s = alpha_bar.sqrt()[:, None, None, None], (1 - alpha_bar).sqrt()[:, None, None, None]
    out = model(a * x_0 + s * eps, t, y)
    x_t = a * x_0 + s * eps
    if gamma is None:
        target = {"epsilon": eps, "v_prediction": a * eps - s * x_0, "sample": x_0}[kind]
        expected = ((out - target) ** 2).mean(dim=(1, 2, 3))
    else:  # Min-SNR: min(SNR, gamma) |x_0 - x_0_hat|^2, whatever the network predicts
        x_0_hat = {"epsilon": (x_t - s * out) / a, "v_prediction": a * x_t - s * out, "sample": out}
        weight = (alpha_bar / (1 - alpha_bar)).clamp(max=gamma)
        expected = weight * ((x_0 - x_0_hat[kind]) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_min_snr_weight_of_eps_is_the_papers():
    scheduler = make_scheduler(SchedulerConfig())
    t = torch.arange(500)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    torch.testing.assert_close(min_snr_weight(scheduler, t, 5.0), (5 / snr).clamp(max=1))


def test_guidance():
    model, x, t = LinearModel(), torch.randn(2, 3, 8, 8), torch.tensor(7)
    y = labels_of(3, 20)
    cond, uncond = model(x, t, y), model(x, t, torch.zeros_like(y))
    model.calls.clear()
    torch.testing.assert_close(guided_prediction(model, x, t, y, 4.0), uncond + 4 * (cond - uncond))
    assert model.calls == [4]  # both passes in one batch
    assert torch.equal(guided_prediction(model, x, t, y, 1.0), cond)
    assert torch.equal(guided_prediction(model, x, t, y, 0.0), uncond)
    assert model.calls == [4, 2, 2]  # the pass that is not needed is left out


@pytest.mark.parametrize("compose", ["joint", "objects", "both"])
@pytest.mark.parametrize("w", [1.0, 2.5])
def test_composed_guidance_equals_the_sum_by_hand(compose, w):
    """Liu et al. 2022, equation 11, and what an unwanted object adds, one picture at a time.

    Another UNWANTED_SHARE draws other pictures: "format" in drawing.py has to say so."""
    assert UNWANTED_SHARE == 0.25 and Drawing.format == "iclevr-picture-2"
    model, x, t = LinearModel(), torch.randn(3, 3, 8, 8), torch.tensor(7)
    labels = torch.zeros(3, 24)
    asked, unwanted = ([3, 20], [5], [1, 9, 23]), ([], [7, 8], [2])
    for row, (some, others) in enumerate(zip(asked, unwanted, strict=True)):
        labels[row, some], labels[row, others] = 1, -1
    expected = []
    for picture, some, others in zip(x, asked, unwanted, strict=True):

        def eps(*objects, picture=picture):
            y = torch.zeros(1, 24)
            y[0, list(objects)] = 1
            return model(picture[None], t, y)[0]

        joint = eps(*some) - eps()
        single = sum(eps(n) - eps() for n in some)
        terms = {"joint": joint, "objects": single, "both": (joint + single) / 2}
        unwanted_too = sum(eps(*some, n) - eps(*some) for n in others)
        expected.append(eps() + w * terms[compose] - w * UNWANTED_SHARE * unwanted_too)
    model.calls.clear()
    found = guided_prediction(model, x, t, labels, w, compose)
    torch.testing.assert_close(found, torch.stack(expected))
    # Of single objects alone, the joint condition is run beside unwanted objects only.
    terms = {"joint": 3, "objects": 6 + 2, "both": 9}[compose]
    assert model.calls == [3 + terms + 3]  # one batch: pictures, terms, unwanted objects
    assert guided_evaluations(labels, w, compose) == pytest.approx(sum(model.calls) / 3)
    plain = labels.clamp(min=0)
    assert guided_evaluations(plain, 1.0, "joint") == guided_evaluations(plain, 0.0, compose) == 1


def by_hand(model, y, seed, config, noise=NOISE):
    """DDPM (Ho et al. 2020, algorithm 2) and DDIM (Song et al. 2021, equation 12), one picture."""
    total, steps = noise.num_train_timesteps, config.num_inference_steps
    betas = make_scheduler(noise).betas.double()
    alpha_bar = torch.cumprod(1 - betas, 0)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3, 8, 8, generator=g).double()
    stride = total // steps
    for t in range(total - stride, -1, -stride):
        before = alpha_bar[t - stride] if t >= stride else torch.tensor(1.0).double()
        repeats = config.resample if config.resample_interval[0] <= t / total else 1
        for repeat in range(repeats):
            if repeat:  # RePaint's algorithm 1, line 9
                z = torch.randn(1, 3, 8, 8, generator=g).double()
                x = (alpha_bar[t] / before).sqrt() * x + (1 - alpha_bar[t] / before).sqrt() * z
            cond, uncond = model(x, t, y), model(x, t, torch.zeros_like(y))
            eps = uncond + config.guidance_scale * (cond - uncond)
            if config.scheduler == "ddpm":
                alpha = alpha_bar[t] / before
                x_mean = (x - (1 - alpha) / (1 - alpha_bar[t]).sqrt() * eps) / alpha.sqrt()
                sigma2 = (1 - before) / (1 - alpha_bar[t]) * (1 - alpha)
                z = torch.randn(1, 3, 8, 8, generator=g).double() if t > 0 else 0
                x = x_mean + sigma2.sqrt() * z
            else:
                x_0 = (x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
                ratio = (1 - before) / (1 - alpha_bar[t]) * (1 - alpha_bar[t] / before)
                sigma = config.eta * ratio.sqrt()
                z = torch.randn(1, 3, 8, 8, generator=g).double() if config.eta > 0 else 0
                x = before.sqrt() * x_0 + (1 - before - sigma**2).sqrt() * eps + sigma * z
    return x.clamp(-1, 1)


@pytest.mark.parametrize(
    ("name", "steps", "more"),
    [("ddpm", 20, {}), ("ddpm", 5, {}), ("ddim", 20, {}), ("ddim", 5, {}),
     ("ddim", 10, {"eta": 0.6}), ("ddim", 20, {"eta": 1.0}),
     ("ddpm", 10, {"resample": 3}), ("ddim", 5, {"resample": 2}),
     ("ddpm", 5, {"resample": 2, "resample_interval": (0.3, 1.0)})],
)  # fmt: skip
def test_sampling_equals_the_equations(name, steps, more):
    # A schedule without the cosine's huge last steps, so that rounding doesn't blur the comparison.
    noise = SchedulerConfig(beta_schedule="linear", num_train_timesteps=20)
    model, y = LinearModel(), labels_of(1, 9, 17)
    config = replace(FLOAT, scheduler=name, num_inference_steps=steps, **more)
    images, _ = sample(model, noise, y, [5, 6, 7], config, progress=False)
    assert len(model.calls) * 2 == evaluations(noise, config, y)
    model = model.double()
    for i in range(3):
        expected = by_hand(model, y[i : i + 1].double(), 5 + i, config, noise)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(images[i : i + 1].double(), expected, atol=2e-4, rtol=1e-3)


LOOPS = {
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "dpmpp": (diffusers.DPMSolverMultistepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sampling_equals_a_plain_diffusers_loop(name, kind):
    noise = replace(NOISE, prediction_type=kind, timestep_spacing="trailing")
    model, y = LinearModel(), labels_of(4)
    config = replace(FLOAT, scheduler=name, num_inference_steps=10, guidance_scale=1.0)
    images, _ = sample(model, noise, y, [11], config, progress=False)
    kind_of, extra = LOOPS[name]
    scheduler = kind_of(
        20, beta_schedule="squaredcos_cap_v2", prediction_type=kind, timestep_spacing="trailing",
        **extra,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 19
    g = torch.Generator().manual_seed(11)
    draws = {"generator": g} if name in ("ddpm", "ddim") else {}
    x = torch.randn(1, 3, 8, 8, generator=g)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, y), t, x, **draws).prev_sample
    assert torch.equal(images, x.clamp(-1, 1))


class KnowsItsGaussian(LinearModel):
    """The perfect network for pixels that are normally distributed, N(MEAN, STD^2)."""

    MEAN, STD = 0.3, 0.3

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def forward(self, x_t, t, labels):
        alpha_bar = make_scheduler(self.noise).alphas_cumprod.double()[int(t)]
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        away = (x_t.double() - a * self.MEAN) / (a**2 * self.STD**2 + s**2)
        x_0, eps = self.MEAN + a * self.STD**2 * away, s * away
        return (a * eps - s * x_0 if self.noise.prediction_type == "v_prediction" else eps).float()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_samplers_follow_the_probability_flow_ode(kind, spacing):
    """For Gaussian pixels its solution is known: x_T's quantile becomes x_0's (Song et al. 2021,
    Score-based generative modeling, section 4.3)."""
    noise = SchedulerConfig(prediction_type=kind, timestep_spacing=spacing)
    model = KnowsItsGaussian(noise)
    x_T = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    exact = (model.MEAN + model.STD * x_T).clamp(-1, 1)

    def error(name, steps):
        config = replace(FLOAT, scheduler=name, num_inference_steps=steps, guidance_scale=1.0)
        images, _ = sample(model, noise, torch.zeros(1, 24), [3], config, progress=False)
        return (images - exact).abs().max().item()

    assert error("ddim", 500) < 0.006
    assert 1.7 < error("ddim", 50) / error("ddim", 100) < 2.3  # first order
    for name in ("dpmpp", "unipc"):
        assert error(name, 24) < min(0.02, error("ddim", 100))
        assert error(name, 12) / error(name, 24) > 3  # second order


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_going_back_a_step_has_the_forward_process_variance(name):
    """x_prev of the forward process, noised again, is x_t of the forward process."""
    scheduler = make_scheduler(NOISE, name)
    scheduler.set_timesteps(10)
    x_0, generator = torch.tensor(0.7), torch.Generator().manual_seed(0)
    for t, previous in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        eps, z = torch.randn(2, 100_000, generator=generator)
        x_prev = x_0 if previous is None else scheduler.add_noise(x_0, eps, previous)
        x_t, alpha_bar = renoise(x_prev, t, scheduler, z), scheduler.alphas_cumprod[t]
        assert abs(x_t.mean() - alpha_bar.sqrt() * x_0) < 0.015
        assert abs(x_t.var() / (1 - alpha_bar) - 1) < 0.02


def test_guidance_interval_costs_half_outside():
    """Noise levels t / T = .95, .85 ... .05: the middle ones are guided."""
    noise = replace(NOISE, timestep_spacing="trailing")
    model, y = LinearModel(), labels_of(3)
    config = replace(FLOAT, scheduler="ddim", num_inference_steps=10)
    whole, _ = sample(model, noise, y, [1], config, progress=False)
    assert model.calls == [2] * 10
    model.calls.clear()
    part, _ = sample(
        model, noise, y, [1], replace(config, guidance_interval=(0.3, 0.8)), progress=False
    )
    assert model.calls == [1] * 2 + [2] * 5 + [1] * 3
    assert evaluations(noise, replace(config, guidance_interval=(0.3, 0.8)), y) == sum(model.calls)
    assert not torch.equal(part, whole)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return DiffusionModel(config).eval()


@pytest.mark.parametrize(
    ("name", "eta"),
    [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("dpmpp", 0.0), ("unipc", 0.0)],
)
def test_a_picture_does_not_depend_on_the_batch(network, name, eta):
    noise = replace(NOISE, prediction_type="v_prediction", timestep_spacing="trailing")
    y, seeds = labels_of(*range(7)), picture_seeds(0, 7)
    config = replace(FLOAT, scheduler=name, eta=eta, num_inference_steps=10)
    together, _ = sample(network, noise, y, seeds, config, progress=False)
    for batch_size in (1, 3):
        apart, _ = sample(
            network, noise, y, seeds, replace(config, batch_size=batch_size), progress=False
        )
        torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)
    alone, _ = sample(network, noise, y[4:5], seeds[4:5], config, progress=False)
    torch.testing.assert_close(alone[0], together[4], atol=1e-4, rtol=0)
    other, _ = sample(network, noise, y[4:5], [seeds[4] + 1], config, progress=False)
    assert (other[0] - together[4]).abs().max() > 0.1


def test_scale_1_is_conditional_and_scale_0_unconditional(network):
    def draw(y, scale):
        config = replace(FLOAT, scheduler="ddim", num_inference_steps=5, guidance_scale=scale)
        return sample(network, NOISE, y, [1, 2], config, progress=False)[0]

    y, nothing = labels_of(2, 3), torch.zeros(2, 24)
    assert torch.equal(draw(y, 0.0), draw(nothing, 1.0))
    assert not torch.equal(draw(y, 1.0), draw(nothing, 1.0))
    torch.testing.assert_close(draw(y, 1.0), draw(y, 1.0 + 1e-6), atol=1e-3, rtol=0)


def test_intermediates_go_from_noise_to_picture(network):
    config = replace(FLOAT, scheduler="ddim", num_inference_steps=10)
    images, kept = sample(network, NOISE, labels_of(0, 1), [3, 4], config, 6, progress=False)
    assert kept.shape == (6, 2, 3, 16, 16)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(4)).clamp(-1, 1)
    assert torch.equal(kept[0, 1:], noise) and torch.equal(kept[-1], images)
    _, repeated = sample(
        network, NOISE, labels_of(0), [3], replace(config, num_inference_steps=5), 9, progress=False
    )
    assert repeated.shape[0] == 9 and torch.equal(repeated[1], repeated[2])
    _, none = sample(network, NOISE, labels_of(0), [3], config, progress=False)
    assert none.shape[0] == 0


@pytest.mark.parametrize("best_of", [1, 2])
def test_sampling_can_be_watched_and_left(network, best_of):
    config = replace(FLOAT, scheduler="ddim", num_inference_steps=10, best_of=best_of)
    images, _ = sample(network, NOISE, labels_of(0), [3], config, progress=False)
    steps, seen = sample_steps(network, NOISE, labels_of(0), [3], config, progress=False), []

    def watch():
        yield (yield from relay(steps, seen.append))

    *_, (watched, _) = watch()
    assert torch.equal(watched, images) and len(seen) == 11
    assert any(torch.equal(x_0.clamp(-1, 1), images[0]) for x_0 in seen[-1])
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(seen[0][:1], noise)
    calls, real = [], network.forward
    network.forward = lambda *args: calls.append(1) or real(*args)
    steps = sample_steps(network, NOISE, labels_of(0), [3], config, progress=False)
    next(steps), next(steps), steps.close()
    assert len(calls) == 1


def test_sampling_undoes_the_scaling():
    """A network that knows x_0: sampling ends at that picture, in [-1, 1] whatever the scale."""
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 8, 8) * 0.4 - 0.3
    config = SchedulerConfig(prediction_type="sample", shift_factor=-0.1, scaling_factor=8.0)
    assert torch.allclose(unscale(scale(picture, config), config), picture, atol=1e-6)
    assert scale(torch.tensor(0.15), config).item() == pytest.approx(2.0)

    class Knows(LinearModel):
        def forward(self, x_t, t, labels):
            return scale(picture, config).expand(len(x_t), -1, -1, -1)

    for name in LOOPS:
        sampling = replace(FLOAT, scheduler=name, num_inference_steps=10)
        images, kept = sample(Knows(), config, labels_of(0), [1], sampling, 3, progress=False)
        torch.testing.assert_close(images, picture, atol=2e-3, rtol=0)
        noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(kept[0], (noise / 8 - 0.1).clamp(-1, 1))


@pytest.mark.parametrize(
    ("total", "spacing", "name", "steps", "expected"),
    [
        (500, "leading", "ddpm", None, 500),
        (500, "leading", "ddim", None, 50),
        (20, "leading", "ddim", None, 20),
        (509, "leading", "ddim", None, 509),  # a prime: no other number divides it
        (500, "trailing", "ddpm", 300, 300),
        (500, "trailing", "ddim", 1, 1),
        (500, "trailing", "dpmpp", None, 12),
        (500, "trailing", "unipc", 7, 7),
        (8, "trailing", "dpmpp", None, 8),
        (500, "leading", "unipc", 300, "300: sampling would begin at t = 300 .* 249"),
        (500, "trailing", "dpmpp", 61, "61: diffusers' timesteps .* 6[02]"),
        (500, "trailing", "ddpm", 61, "61: diffusers' timesteps .* 6[02]"),
        (500, "leading", "ddpm", 501, "501: the network knows 500"),
        (500, "leading", "ddpm", 300, "300: does not divide .* 250"),
        (500, "trailing", "ddim", 30, "30: does not divide"),
        (500, "leading", "ddim", 2, "2: sampling would begin at t = 250"),
    ],
)
def test_step_counts_that_miss_the_start_are_refused(total, spacing, name, steps, expected):
    noise = SchedulerConfig(num_train_timesteps=total, timestep_spacing=spacing)
    config = SamplingConfig(scheduler=name, num_inference_steps=steps)
    if isinstance(expected, int):
        assert check_steps(noise, config) == expected
        scheduler = make_scheduler(noise, name)
        scheduler.set_timesteps(expected)
        assert len(scheduler.timesteps) == expected
        assert scheduler.timesteps[0] >= 0.95 * (total - 1)
    else:
        with pytest.raises(UserError, match=expected):
            check_steps(noise, config)


def test_resampling_needs_a_scheduler_without_memory():
    with pytest.raises(UserError, match="--resample 3: dpmpp .*; use --scheduler ddpm"):
        check_steps(NOISE, SamplingConfig(scheduler="dpmpp", resample=3))


def test_eta_needs_ddim():
    with pytest.raises(UserError, match="--eta 0.5: only --scheduler ddim"):
        check_steps(NOISE, SamplingConfig(eta=0.5))


def test_diverged_network_is_refused():
    model = LinearModel()
    model.a.data.fill_(float("nan"))
    with pytest.raises(UserError, match="diverged"):
        sample(model, NOISE, labels_of(0), [0], FLOAT, progress=False)


def test_timestep_power_favours_noisy_steps():
    """t / T has the distribution function x^power: its median is 2^(-1 / power)."""
    for power in (1.0, 4.0):
        for stratified in (False, True):
            generator = torch.Generator().manual_seed(0)
            t = draw_timesteps(20000, 500, power, stratified, generator=generator)
            assert t.float().median() / 500 == pytest.approx(0.5 ** (1 / power), abs=0.02)
            assert t.min() >= 0 and t.max() == 499


def test_half_of_the_timesteps_are_drawn_from_the_interval():
    """And as many of the others lie there as its length says; stratified, in every batch."""
    for stratified, batches in ((False, [20000]), (True, [64] * 100)):
        generator = torch.Generator().manual_seed(0)
        drawn = [
            draw_timesteps(count, 500, 1.0, stratified, (0.3, 0.9), generator) for count in batches
        ]
        t = torch.cat(drawn) / 500
        inside = (t >= 0.3) & (t < 0.9)
        assert inside.float().mean() == pytest.approx(0.5 + 0.5 * 0.6, abs=0.01)
        assert t[inside].mean() == pytest.approx(0.6, abs=0.01)
        assert (t < 0.3).float().mean() == pytest.approx(0.5 * 0.3, abs=0.01)
        assert t.min() == 0 and t.max() == 499 / 500
        if stratified:
            halves = [((b >= 150) & (b < 450)).sum().item() for b in drawn]
            assert max(halves) - min(halves) <= 2  # 32 in the first half, 32 * .6 in the other


def test_the_timesteps_outside_the_interval_are_drawn_by_power(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    t = draw_timesteps(20000, 500, 3.0, True, (0.5, 1.0), generator) / 500
    assert (t >= 0.5).float().mean() == pytest.approx(0.5 + 0.5 * (1 - 0.5**3), abs=0.01)
    # The last stratum's u may round up to 1: the largest timestep then, not the least.
    monkeypatch.setattr(torch, "rand", lambda count, **_: torch.full((count,), 1 - 2**-24))
    assert draw_timesteps(64, 500, 1.0, True, (0.3, 0.9), generator)[-1] == 499


def test_stratified_timesteps_are_spread_over_every_batch():
    """One in each part of the range, and uniform within it."""
    seen = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        t = draw_timesteps(10, 500, 1.0, True, generator=generator)
        assert (t // 50).tolist() == list(range(10))
        seen.append(t % 50)
    within = torch.stack(seen).float()
    assert within.mean() == pytest.approx(24.5, abs=4 * 14.4 / 2000**0.5)
    assert within.min() == 0 and within.max() == 49


def test_shifted_schedule():
    """log SNR moves by log_snr_shift at every timestep, in every scheduler; 0 leaves it alone."""
    plain = make_scheduler(SchedulerConfig()).alphas_cumprod.double()
    for name in ("ddpm", "ddim", "dpmpp", "unipc"):
        shifted = make_scheduler(SchedulerConfig(log_snr_shift=-4.0), name).alphas_cumprod
        moved = shifted.double().logit() - plain.logit()
        # Near pure noise alphas_cumprod is nearly 0: float32 products of betas near 1 are coarse.
        torch.testing.assert_close(moved[:-1], torch.full_like(moved[:-1], -4), atol=0.02, rtol=0)
        assert shifted[-1] < 1e-6
    with pytest.raises(UserError, match="log_snr_shift"):
        from_dict(SchedulerConfig, {"log_snr_shift": 99.0}, "x")


def test_seeds_are_distinct():
    seeds = [s for seed in range(1000) for s in picture_seeds(seed, 64)]
    seeds += [derive_seed(0, 1, step) for step in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert picture_seeds(3, 8) == picture_seeds(3, 64)[:8]
