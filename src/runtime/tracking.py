"""Weights & Biases, so that it never stands in the way of a run."""

import atexit
import contextlib
import importlib.util
import logging
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from runtime import processes
from runtime.files import read_json, write_json
from runtime.settings import UserError, WandbMode

LONGEST_NAME = 128
"""Characters that Weights & Biases allows in a run's name."""


class Tracker:
    """Logs figures and pictures to Weights & Biases, or to nothing.

    Args:
        mode: "auto" is what WANDB_MODE says; else online when logged in, else offline. It never
            asks a question. "online" insists.
        project, name: where the run is filed.
        folder: gets the files of offline runs (`wandb sync` uploads them), and keeps which run it
            is: what goes on later goes on with the same one.
        config: settings shown with the run.
        fresh: nothing goes on: it is another run than the one that may have been kept.

    Raises:
        UserError: mode "online" without a login or connection; "online" or "offline" where wandb
            is not installed.
    """

    def __init__(
        self, mode: WandbMode, project: str, name: str, folder: Path, config: dict,
        fresh: bool = False,
    ):  # fmt: skip
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

            folder.mkdir(parents=True, exist_ok=True)
            settings = wandb.Settings(
                silent=True, console="off", init_timeout=60, finish_timeout=300,
                finish_timeout_raises=True,
            )  # fmt: skip
            options = dict(
                project=project, name=name[:LONGEST_NAME], dir=str(folder), config=config,
                settings=settings, reinit="finish_previous",
            )  # fmt: skip
            if "WANDB_RUN_ID" not in os.environ:  # as the agent of a sweep sets it
                options |= {"id": run_id(folder, project, name, fresh), "resume": "allow"}
            why = ""
            if mode != "offline":
                try:
                    if wandb.login(prompt=False):
                        self.run = wandb.init(mode="online", **options)
                    elif mode == "online":
                        raise UserError("--wandb online: not logged in; run `wandb login`")
                except Exception as error:  # the service can't be reached, or refuses the key
                    if asked == "online":
                        raise
                    why = f" ({_line(error)})"
            where = self.run.url if self.run else f"offline, {folder / 'wandb'}{why}"
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


def run_id(folder: Path, project: str, name: str, fresh: bool) -> str:
    """What Weights & Biases knows a run by; kept in a folder, by project and name.

    A copy of the folder has another name, and so becomes another run.
    """
    path, key, known = folder / "wandb.json", f"{project}/{name}", {}
    if path.exists():
        with contextlib.suppress(UserError):  # damaged: a new run
            known = read_json(path)
    known = known if isinstance(known, dict) else {}
    if fresh or not isinstance(known.get(key), str):
        known[key] = secrets.token_hex(4)
        write_json(path, known)
    return known[key]


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
