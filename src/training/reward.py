"""Learning from a classifier's opinion of what the network draws (ReFL, Xu et al. 2023).

The loss on training pictures never sees the network's own drawings: a cube that was begun as a
sphere is finished as a sphere, and nothing tells. Here some pictures are drawn while the network
trains, each at another stage. Every training step takes all of them one step of the sampler
further, and a classifier looks at the x_0 that this step predicts: how unlikely it finds the
objects asked for is one more part of the loss. Its gradient goes through that one prediction
(Xu et al. 2023, algorithm 1, with the drawing itself in place of a new one for each step), and
not through the network's unconditional half, which should know nothing of conditions.

A condition that the classifier misses in the finished picture is mostly drawn again, from other
noise: most are right at once, and a few that the network always gets wrong hold nearly all errors.

The classifier must not be the judge, which would then score its own pupil.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion.guidance import Guide, guided_prediction
from diffusion.samplers import check_steps, make_scheduler
from diffusion.schedule import unscale
from judging.augmentation import disturb
from runtime import processes
from runtime.device import autocast
from runtime.seeds import derive_seed, draw_noise
from runtime.settings import SamplingConfig, TrainConfig, UserError


def reward_sampling(config: TrainConfig) -> SamplingConfig:
    """How the pictures are drawn that the classifier sees."""
    reward = config.reward
    return SamplingConfig(
        scheduler="ddpm",
        num_inference_steps=reward.reward_steps,
        guidance_scale=reward.reward_guidance_scale,
    )


class Reward:
    """Pictures being drawn, and what a classifier thinks of them.

    Of several processes each draws its share; the pictures are the same, but for rounding.

    Raises:
        UserError: no such steps, or the classifier is asked at none of them.
    """

    def __init__(self, guide: Guide, config: TrainConfig, device: torch.device):
        self.guide, self.config, self.device = guide, config, device
        self.count = config.reward.reward_batch_size
        self.mine = processes.shard(self.count)
        self.scheduler = make_scheduler(config.noise)
        steps = check_steps(config.noise, reward_sampling(config), flag="--reward_steps")
        self.scheduler.set_timesteps(steps)
        first, last = config.reward.reward_interval
        times = self.scheduler.timesteps / config.noise.num_train_timesteps
        self.asked = (first <= times) & (times <= last)
        """(steps,) at which stages the classifier is asked."""
        if not self.asked.any():
            raise UserError(
                f"--reward_interval {first:g} {last:g}: none of the {steps} steps is in there; "
                "take a wider one"
            )
        self.offsets = torch.arange(self.count) * steps // self.count
        """(count,) stages by which a picture is ahead of the training step."""
        size, classes = config.model.image_size, config.model.num_classes
        mine = len(self.offsets[self.mine])
        self.x_t = torch.zeros(mine, 3, size, size, device=device)
        self.labels = torch.zeros(mine, classes, device=device)
        """Of this process's share; a picture that has not begun has no label."""
        self.last = torch.zeros((), device=device)
        """This process's part of the last step's loss."""

    def state_dict(self) -> dict[str, Tensor]:
        """The pictures of all processes, which all have to call this."""
        parts = {"x_t": self.x_t.cpu(), "labels": self.labels.cpu()}
        return {name: processes.gather(part, self.count) for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the pictures of `state_dict`, of however many processes."""
        self.x_t.copy_(state["x_t"][self.mine])
        self.labels.copy_(state["labels"][self.mine])

    def loss(
        self, model: nn.Module, labels: Tensor, step: int, dtype: torch.dtype | None
    ) -> Tensor:
        """Take every picture one step further.

        Args:
            labels: (n, K) multi-hot on the CPU, of the training batch: a picture that begins takes
                one of them
            step:   the training step

        Returns:
            scalar: this process's part of the mean of -log p(objects | x_0_hat) over the pictures
        """
        stages = (step + self.offsets) % len(self.scheduler.timesteps)
        # One generator for each picture and step, so that neither a share nor a stop changes them.
        numbers = range(self.count)[self.mine]
        generators = [
            torch.Generator().manual_seed(derive_seed(self.config.seed, 6, step * self.count + n))
            for n in numbers
        ]
        if (stages == 0).any():
            self.begin(stages[self.mine] == 0, labels, step, generators)
        stages = stages[self.mine]
        begun = self.labels.any(dim=1).cpu()
        if not begun.any():
            self.last = torch.zeros((), device=self.device)
            return self.last
        rows = begun.nonzero().flatten()
        asked = self.asked[stages[rows]]
        rows = torch.cat([rows[asked], rows[~asked]])
        count = int(asked.sum())
        with autocast(self.device, dtype):
            parts = [self.predict(model, rows[:count], stages)]
            with torch.no_grad():
                parts.append(self.predict(model, rows[count:], stages))
        prediction = torch.cat(parts)
        x_0_hat = torch.zeros(self.count, *self.x_t.shape[1:], device=self.device)
        for stage in stages[rows].unique():
            here = stages[rows] == stage
            at = rows[here]
            result = self.scheduler.step(
                prediction[here], self.scheduler.timesteps[stage], self.x_t[at],
                generator=[generators[n] for n in at],
            )  # fmt: skip
            x_0_hat[at + self.mine.start] = result.pred_original_sample
            self.x_t[at] = result.prev_sample.detach()
        images = self.disturbed(unscale(x_0_hat, self.config.noise), step)
        likelihood = self.guide.log_likelihood(images[rows + self.mine.start], self.labels[rows])
        loss = -likelihood[:count].sum() / self.count
        right = (likelihood > math.log(0.5)).cpu()
        finished = stages[rows] == len(self.scheduler.timesteps) - 1
        self.labels[rows[right & finished]] = 0
        self.last = loss.detach()
        return loss

    def predict(self, model: nn.Module, rows: Tensor, stages: Tensor) -> Tensor:
        """Guided prediction for some of the pictures: `rows`, (n,) of this process's share."""
        if not len(rows):
            return torch.empty_like(self.x_t[rows])
        t = self.scheduler.timesteps[stages[rows]].to(self.device)
        return guided_prediction(
            half_differentiated(model), self.x_t[rows], t, self.labels[rows],
            self.config.reward.reward_guidance_scale,
        )  # fmt: skip

    def begin(
        self, fresh: Tensor, labels: Tensor, step: int, generators: list[torch.Generator]
    ) -> None:
        """Noise and a condition for the pictures of this process that begin: `fresh`, (n,) bool.

        Conditions of more objects come more often, as most mistakes are made there.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, 7, step))
        weights = labels.sum(dim=1).square() + 1e-6  # there may be pictures without objects
        chosen = torch.multinomial(weights, self.count, replacement=True, generator=generator)
        retry = torch.rand(self.count, generator=generator) < self.config.reward.reward_retry
        for n in fresh.nonzero().flatten():
            self.x_t[n] = draw_noise([generators[n]], self.config.model.image_size)[0]
            if not (retry[self.mine][n] and self.labels[n].any()):
                self.labels[n] = labels[chosen[self.mine][n]]

    def disturbed(self, images: Tensor, step: int) -> Tensor:
        """Pictures (count, 3, H, W) as a judge learns from them, so that no pixel pleases alone."""
        generator = torch.Generator(self.device)
        generator.manual_seed(derive_seed(self.config.seed, 8, step))
        return disturb(images, generator, compress=False)


def half_differentiated(model: nn.Module) -> Callable[..., Tensor]:
    """The network without a gradient for those who get no condition."""

    def predict(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        cond = labels.any(dim=1)
        out = torch.empty_like(x_t)
        with torch.no_grad():
            out[~cond] = model(x_t[~cond], t[~cond], labels[~cond]).float()
        out[cond] = model(x_t[cond], t[cond], labels[cond]).float()
        return out

    return predict
