"""Weights & Biases, so that it never stands in the way of a run."""

import atexit
import contextlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from runtime import processes
from runtime.settings import UserError, WandbMode


class Tracker:
    """Logs figures and pictures to Weights & Biases, or to nothing.

    Args:
        mode: "auto" is what WANDB_MODE says; else online when logged in, else offline. It never
            asks a question. "online" insists.
        project, name: where the run is filed.
        folder: gets the files of offline runs (`wandb sync` uploads them).
        config: settings shown with the run.

    Raises:
        UserError: mode "online" without a login or connection; "online" or "offline" where wandb
            is not installed.
    """

    def __init__(self, mode: WandbMode, project: str, name: str, folder: Path, config: dict):
        self.run = None
        asked, mode = mode, os.environ.get("WANDB_MODE", "") if mode == "auto" else mode
        if mode == "disabled" or not processes.is_main():
            return
        if importlib.util.find_spec("wandb") is None:
            if asked != "auto":
                raise UserError(
                    f"--wandb {asked}: wandb is not installed; pip install wandb, or use "
                    "--wandb disabled"
                )
            print(f"wandb: not installed; logging to files in {folder} only")
            return
        # Of a full disk under wandb's own log, our one warning is enough.
        logging.raiseExceptions = False
        try:
            import wandb

            online = mode != "offline" and wandb.login(prompt=False)
            if mode == "online" and not online:
                raise UserError("--wandb online: not logged in; run `wandb login` or use auto")
            folder.mkdir(parents=True, exist_ok=True)
            settings = wandb.Settings(
                silent=True, console="off", init_timeout=60, finish_timeout=300,
                finish_timeout_raises=True,
            )  # fmt: skip
            options = dict(
                project=project, name=name, dir=str(folder), config=config, settings=settings,
                reinit="finish_previous",
            )  # fmt: skip
            if online:
                try:
                    self.run = wandb.init(mode="online", **options)
                except Exception:  # logged in, but the service can't be reached
                    if asked == "online":
                        raise
            where = self.run.url if self.run else f"offline, {folder / 'wandb'}"
            self.run = self.run or wandb.init(mode="offline", **options)
            print(f"wandb: {where}")
        except UserError:
            raise
        except Exception as error:  # whatever the service or its client may come up with
            if asked == "online":
                raise UserError(f"--wandb online: {_line(error)}; use auto or offline") from None
            self._give_up(error)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Log figures, Pillow pictures as pictures, and {"columns", "data"} as tables."""
        if self.run is None:
            return
        try:
            self.run.log({key: _logged(value) for key, value in values.items()}, step=step)
        except Exception as error:
            self._give_up(error)

    def log_picture(self, name: str, path: Path) -> None:
        """Log a picture file."""
        if self.run is not None:
            with Image.open(path) as picture:
                self.log({name: picture.convert("RGB")})

    def finish(self) -> None:
        """Close the run; what has not been sent yet is sent."""
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                self._give_up(error)
            self.run = None

    def _give_up(self, error: Exception) -> None:
        """Say once that logging stops here; the work goes on."""
        self.run = None
        print(f"warning: wandb stopped ({_line(error)}); going on without it", file=sys.stderr)
        # Runs before wandb's own, which would end the script with a traceback.
        atexit.register(_close_quietly)


def _logged(value: Any) -> Any:
    import wandb

    if isinstance(value, Image.Image):
        return wandb.Image(value)
    return wandb.Table(**value) if isinstance(value, dict) else value


def _close_quietly() -> None:
    with contextlib.suppress(Exception):
        import wandb

        wandb.teardown()


def _line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:160]
