"""An object added to a picture: where it goes, what is drawn anew, and that the rest stays."""

import numpy as np
import pytest
import torch

from diffusion.insertion import add_objects, busy, find_places
from diffusion.sampling import Inpainting, sample
from diffusion.schedule import scale
from iclevr.labels import encode_labels, read_objects
from network.checkpoint import PRETRAINED, load_checkpoint, load_model
from runtime.seeds import draw_noise
from runtime.settings import SamplingConfig, UserError


@pytest.fixture(scope="module")
def network():
    checkpoint = load_checkpoint(PRETRAINED)
    return load_model(checkpoint, PRETRAINED, torch.device("cpu")), checkpoint.config.noise


def scene(*squares: tuple[int, int]) -> torch.Tensor:
    """(1, 3, 64, 64): gray ground that grows lighter to the front, red squares of 10 pixels."""
    image = torch.linspace(-0.1, 0.1, 64)[None, None, :, None].expand(1, 3, 64, 64).clone()
    for y, x in squares:
        image[0, :, y - 5 : y + 5, x - 5 : x + 5] = torch.tensor([0.4, -0.6, -0.6])[:, None, None]
    return image


def labels(*names: str) -> torch.Tensor:
    return encode_labels(names, read_objects(PRETRAINED.parent))[None]


BEFORE, AFTER = labels("red cube"), labels("red cube", "cyan sphere")


def test_busy_is_where_something_stands():
    image = scene((30, 20), (40, 50))
    image[0, :, 5, 5] = 1.0  # a speck
    found = busy(image)[0, 0].bool()
    assert found[26:34, 16:24].all() and found[36:44, 46:54].all()
    assert found.sum() <= 2 * 12**2 and not found[:15].any()


def test_places_are_free_and_inside(network):
    for seed, square in enumerate([(32, 32), (28, 20), (40, 44)]):
        disc = find_places(*network, scene(square), BEFORE, AFTER, [seed])[0, 0]
        y, x = (part.float().mean().item() for part in torch.where(disc == 1))
        assert 8 <= y <= 56 and 8 <= x <= 56
        assert np.hypot(y - square[0], x - square[1]) > 10, "on top of what is there"
        assert 0.05 < (disc > 0).float().mean() < 0.15
    full = scene(*((y, x) for y in range(5, 64, 9) for x in range(5, 64, 22)))
    with pytest.raises(UserError, match="no free place"):
        find_places(*network, full, BEFORE, AFTER, [0])


def test_a_place_is_looked_for_with_other_noise_than_the_picture_s(network, monkeypatch):
    drawn = []

    def spy(generators, size):
        drawn.append(draw_noise(generators, size))
        return drawn[-1]

    monkeypatch.setattr("diffusion.insertion.draw_noise", spy)
    find_places(*network, scene((32, 32)), BEFORE, AFTER, [3])
    assert len(drawn) == 12
    own = torch.Generator().manual_seed(3)
    picture_s = {draw_noise([own], 64).sum().item() for _ in range(len(drawn))}
    assert not picture_s & {noise.sum().item() for noise in drawn}


@pytest.mark.parametrize("more", [{"resample": 2}, {"best_of": 2}])
def test_all_but_the_disc_stays(network, more):
    sampling = SamplingConfig(num_inference_steps=3, **more)
    image = scene((32, 32))
    result, free = add_objects(*network, image, BEFORE, AFTER, [3], sampling)
    outside = (free == 0).expand_as(image)
    assert torch.equal(result[outside], image[outside])
    assert (result - image)[~outside].abs().max() > 0.05
    again, _ = add_objects(*network, image, BEFORE, AFTER, [3], sampling)
    assert torch.equal(result, again)
    other, _ = add_objects(*network, image, BEFORE, AFTER, [4], sampling)
    assert not torch.equal(result, other)


def test_pictures_do_not_depend_on_the_batch(network):
    images = torch.cat([scene((32, 32)), scene((28, 20)), scene((40, 44))])
    sampling = SamplingConfig(num_inference_steps=4, batch_size=2)
    before, after = BEFORE.expand(3, -1), AFTER.expand(3, -1)
    together, _ = add_objects(*network, images, before, after, [1, 2, 3], sampling)
    alone, _ = add_objects(*network, images[2:], BEFORE, AFTER, [3], sampling)
    torch.testing.assert_close(together[2:], alone, atol=1e-3, rtol=0)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpmpp", "unipc"])
def test_what_is_held_has_the_noise_of_the_step(network, scheduler, monkeypatch):
    """Nothing is free: after every step the batch is x_0 noised to the level of the next one."""
    model, noise = network
    seen = []
    hold = Inpainting.hold

    def spy(self, x_t, alpha_bar, z):
        held = hold(self, x_t, alpha_bar, z)
        torch.testing.assert_close(held, alpha_bar.sqrt() * self.x_0 + (1 - alpha_bar).sqrt() * z)
        seen.append(alpha_bar.item())
        return held

    monkeypatch.setattr(Inpainting, "hold", spy)
    image = scene((32, 32))
    nothing = Inpainting(scale(image, noise), torch.zeros(1, 1, 64, 64))
    sampling = SamplingConfig(scheduler=scheduler, num_inference_steps=4, mixed_precision="no")
    result, _ = sample(model, noise, AFTER, [0], sampling, progress=False, inpainting=nothing)
    assert seen == sorted(seen) and len(set(seen)) == 4 and seen[-1] == 1.0
    torch.testing.assert_close(result, image, atol=1e-5, rtol=0)
