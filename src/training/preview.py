"""Pictures of the test conditions, drawn and scored while a network trains."""

from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion.sampling import sample
from iclevr.dataset import DataPaths
from iclevr.labels import condition_files, read_conditions
from judging.evaluator import Evaluator, evaluate
from judging.figures import grid, save_image
from judging.metrics import record, summarise
from judging.realism import draw_conditions, frechet_distance, load_reference
from network.model import DiffusionModel
from runtime import processes
from runtime.seeds import picture_seeds
from runtime.settings import SamplingConfig, TrainConfig


def preview_sampling(config: TrainConfig) -> SamplingConfig:
    """How previews are drawn."""
    return SamplingConfig(
        scheduler="ddim",
        num_inference_steps=config.preview.preview_steps,
        guidance_scale=config.preview.preview_guidance_scale,
        mixed_precision=config.mixed_precision,
    )


class Preview:
    """Draws the test conditions with the current weights, always from the same noise.

    Args:
        judge: scores the pictures; may be None if config asks for no Frechet distance.
    """

    def __init__(
        self, config: TrainConfig, paths: DataPaths, objects: dict, judge: Evaluator | None
    ):
        self.config, self.judge = config, judge
        _, self.labels = read_conditions(condition_files(paths.data_dir)["test"], objects)
        self.fd_samples = config.preview.preview_fd_samples
        if self.fd_samples:
            self.reference = load_reference(paths, judge)
            if processes.is_main():
                _ = self.reference.features  # now: what fails should not fail hours later

    def __call__(self, model: DiffusionModel, path: Path) -> dict[str, Any]:
        """Draw with all processes; the first writes the grid and returns what to log."""
        images = self.draw(model, self.labels)
        if self.fd_samples:
            labels = draw_conditions(self.reference, self.fd_samples, self.config.seed)
            many = self.draw(model, labels, purpose=2)
        if not processes.is_main():
            return {}
        picture = grid(images)
        save_image(picture, path)
        values: dict[str, Any] = {"preview": picture}
        if self.judge is not None:
            values["judge"] = self.judge.name
            figures = summarise([record(evaluate(self.judge, images, self.labels))])
            values |= {f"preview_{name}": interval.mean for name, interval in figures.items()}
        if self.fd_samples:
            distance = frechet_distance(self.reference.features, self.judge.features(many))
            values["preview_frechet_distance"] = distance
        return values

    def draw(self, model: DiffusionModel, labels: Tensor, purpose: int = 0) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] of conditions (N, K), by all processes together."""
        config = self.config
        seeds = picture_seeds(config.seed, len(labels), purpose)
        images, _ = sample(model, config.noise, labels, seeds, preview_sampling(config))
        return images
