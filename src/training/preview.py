"""Pictures of the test conditions, drawn and scored while a network trains."""

from pathlib import Path
from typing import Any

from diffusion.sampling import sample
from iclevr.dataset import DataPaths, read_conditions
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
        _, self.labels = read_conditions(paths.data_dir, "test", objects)
        self.seeds = picture_seeds(config.seed, len(self.labels))
        self.noise = config.noise
        self.sampling = preview_sampling(config)
        self.judge = judge
        self.seed, self.fd_samples = config.seed, config.preview.preview_fd_samples
        if self.fd_samples:
            self.reference = load_reference(paths, judge)
            if processes.is_main():
                _ = self.reference.features  # now: what fails should not fail hours later

    def __call__(self, model: DiffusionModel, path: Path) -> dict[str, Any]:
        """Draw with all processes; the first writes the grid and returns what to log."""
        images, _ = sample(model, self.noise, self.labels, self.seeds, self.sampling)
        many = None
        if self.fd_samples:
            labels = draw_conditions(self.reference, self.fd_samples, self.seed)
            seeds = picture_seeds(self.seed, self.fd_samples, purpose=2)
            many, _ = sample(model, self.noise, labels, seeds, self.sampling)
        picture = grid(images)
        if not processes.is_main():
            return {}
        save_image(picture, path)
        values: dict[str, Any] = {"preview": picture}
        if self.judge is not None:
            values["judge"] = self.judge.name
            figures = summarise([record(evaluate(self.judge, images, self.labels))])
            values |= {f"preview_{name}": interval.mean for name, interval in figures.items()}
        if many is not None:
            values["preview_frechet_distance"] = frechet_distance(
                self.reference.features, self.judge.features(many)
            )
        return values
