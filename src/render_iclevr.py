"""Render a stand-in for i-CLEVR in the layout of the course's data.

    python src/render_iclevr.py                        # 6,003 sequences, 18,009 pictures
    python src/render_iclevr.py --num_sequences 500    # a quick set; later runs can extend it
    python src/render_iclevr.py --out_dir data/held_out --hold_out_sets 0.1 --hold_out_pairs 0.05

i-CLEVR (El-Nouby et al. 2019) adds objects one by one to a scene of CLEVR (Johnson et al. 2017).
Here a sequence has three pictures of one, two and three objects (with --max_objects up to five),
ray traced in NumPy. Sequence i depends on the settings and i only, so any number of workers and any
interruption give the same files.

What --hold_out_sets and --hold_out_pairs keep out of train.json stands in unseen.json, seen.json
and unseen_pairs.json, for src/test.py --conditions. src/hold_out.py does the same for data that
is already there.
"""

import multiprocessing as mp
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field

from iclevr.placement import sample_sequence
from iclevr.ray_tracer import render_picture
from iclevr.scene import MOST_PICTURES, PICTURES, sample_labels
from iclevr.standin import draw_sheet, file_names, hold_out, write_labels
from runtime.files import (
    atomic_write,
    lock_folder,
    make_folder,
    read_json,
    remove_left_overs,
    write_json,
)
from runtime.output import progress_bar
from runtime.settings import (
    ROOT,
    PositiveInt,
    Probability,
    Seed,
    Settings,
    UserError,
    parse_args,
    run,
)

FOLLOWED = "seed", "width", "height", "samples", "max_objects", "hold_out_sets", "hold_out_pairs"
"""Settings that change the pictures."""
CHECKED = 100
"""Sequences whose labels are looked for before anything is rendered: can there be any?"""


@dataclass(frozen=True)
class RenderConfig(Settings):
    """Render a stand-in for i-CLEVR; rerun the same command to go on after an interruption."""

    out_dir: Path = ROOT / "data" / "standin"
    """Folder for the JSON files; the pictures go to iclevr/ inside it."""
    num_sequences: Annotated[int, Field(ge=1, le=10**6)] = 6003
    """Sequences of three pictures (of --max_objects); a larger number later extends the set."""
    max_objects: Annotated[int, Field(ge=PICTURES, le=MOST_PICTURES)] = PICTURES
    """Objects in the last picture of a sequence, which has as many pictures."""
    hold_out_sets: Probability = 0.0
    """Share of the sets of two and of three objects that no picture shows; they become unseen.json,
    beside as many that some do, seen.json. Sets with a held-out pair do not count."""
    hold_out_pairs: Probability = 0.0
    """Share of all pairs of objects that stand together in no picture; they become
    unseen_pairs.json."""
    seed: Seed = 0
    """Seed of objects, places, camera and lamps."""
    width: Annotated[int, Field(ge=32, le=1024)] = 96
    """Width of a picture in pixels."""
    height: Annotated[int, Field(ge=32, le=1024)] = 72
    """Height of a picture in pixels."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 16
    """Light paths per pixel; more is smoother at edges and takes longer."""
    num_workers: PositiveInt = os.cpu_count() or 1
    """Processes that render; the files do not depend on it."""


def _work(job: tuple[RenderConfig, int, list[int]]) -> int:
    """Render some pictures of a sequence; returns how many."""
    config, i, missing = job
    held_out = hold_out(config.seed, config.hold_out_sets, config.hold_out_pairs)
    sequence = sample_sequence(config.seed, i, config.max_objects, held_out)
    for k in missing:
        picture = render_picture(sequence, k + 1, config.width, config.height, config.samples)
        path = config.out_dir / "iclevr" / file_names(i, config.max_objects)[k]
        with atomic_write(path) as temporary:
            Image.fromarray(picture).save(temporary)
    return len(missing)


def _start_worker() -> None:
    """Let no worker outlive a parent that was killed."""
    parent = mp.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _settings(config: RenderConfig) -> dict[str, Any]:
    """What the pictures follow from."""
    return {name: getattr(config, name) for name in FOLLOWED}


def _check_made_here(config: RenderConfig) -> None:
    """Refuse a folder whose pictures were not made by this script with the same settings."""
    path = config.out_dir / "render.json"
    if not path.exists():
        for name in ("train.json", "iclevr"):
            if (config.out_dir / name).exists():
                raise UserError(
                    f"{config.out_dir}: holds {name}, which this script has not made; "
                    "choose another --out_dir"
                )
        return
    stored = read_json(path, "delete the folder or choose another --out_dir")
    if not isinstance(stored, dict):
        raise UserError(f"{path}: not a dict of settings; delete the folder or change --out_dir")
    for name, value in _settings(config).items():
        # Folders from before there was a setting were made with its default.
        made_with = stored.get(name, RenderConfig.__dataclass_fields__[name].default)
        if made_with != value:
            raise UserError(
                f"{path}: made with --{name} {made_with}, not {value}; "
                f"use --{name} {made_with} or another --out_dir"
            )


def _render_all(config: RenderConfig, jobs: list[tuple[RenderConfig, int, list[int]]]) -> None:
    total = config.num_sequences * config.max_objects
    done = total - sum(len(missing) for _, _, missing in jobs)
    spawn = mp.get_context("spawn")  # works the same on every system
    with (
        ProcessPoolExecutor(config.num_workers, spawn, _start_worker) as pool,
        progress_bar(total=total, initial=done, unit="picture") as bar,
    ):
        # Ctrl-C is this process's business: the workers inherit that it is ignored.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        counts = pool.map(_work, jobs)
        signal.signal(signal.SIGINT, handler)
        try:
            for count in counts:
                bar.update(count)
        except KeyboardInterrupt:
            bar.close()
            print("stopped; rerun the same command to go on")
            raise SystemExit(130) from None
        except BrokenProcessPool:
            raise UserError(
                f"--num_workers {config.num_workers}: a worker was killed, perhaps for lack of "
                "memory; rerun the same command with fewer"
            ) from None


def main(argv: list[str] | None = None) -> None:
    config = parse_args(RenderConfig, argv)
    _check_made_here(config)  # a folder of something else gets no lock, either
    make_folder(config.out_dir, "--out_dir")
    lock = lock_folder(config.out_dir, "wait for it or choose another --out_dir")
    try:
        _check_made_here(config)  # since then, another process may have been at work
        _render(config)
    finally:
        lock.release()


def _render(config: RenderConfig) -> None:
    held_out = hold_out(config.seed, config.hold_out_sets, config.hold_out_pairs)
    for i in range(min(config.num_sequences, CHECKED)):
        sample_labels(config.seed, i, config.max_objects, held_out)
    write_json(config.out_dir / "render.json", _settings(config))
    image_dir = config.out_dir / "iclevr"
    make_folder(image_dir, "--out_dir")
    for folder in (config.out_dir, image_dir):
        remove_left_overs(folder)
    with os.scandir(image_dir) as entries:  # what a full disk left empty is not there
        done = {entry.name for entry in entries if entry.stat().st_size}
    jobs = []
    for i in range(config.num_sequences):
        names = file_names(i, config.max_objects)
        missing = [k for k, name in enumerate(names) if name not in done]
        if missing:
            jobs.append((config, i, missing))
    if jobs:
        _render_all(config, jobs)
    write_labels(config.out_dir, config.seed, config.num_sequences, config.max_objects, held_out)
    draw_sheet(config.out_dir, config.num_sequences, config.max_objects)
    total = config.num_sequences * config.max_objects
    print(f"{total} pictures in {config.out_dir}; sheet.png shows some")
    if left_out := len(done) + sum(len(missing) for _, _, missing in jobs) - total:
        print(
            f"{left_out} more are there, which train.json leaves out; a larger --num_sequences "
            "takes them in"
        )


if __name__ == "__main__":
    run(main)
