"""Render a stand-in for i-CLEVR in the layout of the course's data.

    python src/render_iclevr.py                        # 6,003 sequences, 18,009 pictures
    python src/render_iclevr.py --num_sequences 500    # a quick set; later runs can extend it

i-CLEVR (El-Nouby et al. 2019) adds objects one by one to a scene of CLEVR (Johnson et al. 2017).
Here a sequence has three pictures of one, two and three objects, ray traced in NumPy. Sequence i
depends on (seed, i) only, so any number of workers and any interruption give the same files.
"""

import multiprocessing as mp
import os
import signal
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field
from tqdm import tqdm

from config import ROOT, PositiveInt, Seed, Settings, UserError, parse_args, run
from files import (
    atomic_write,
    lock_folder,
    make_folder,
    read_json,
    remove_left_overs,
    write_json,
)

SHAPES = ("cube", "sphere", "cylinder")
COLORS = {  # linear RGB times 255: decoding them as sRGB comes out far too dark
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
NAMES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
"""Object names in the order of their index, 8 * shape + color."""

PICTURES = 3
"""Pictures of a sequence."""
RADIUS = 0.58
"""Radius of spheres and cylinders and half side of cubes, in scene units: the size in the
pictures of i-CLEVR."""
GROUND = 0.81
"""Albedo of the ground."""
CAMERA = (7.48113, -6.50764, 5.34367)
"""Where the camera stands; it looks at the origin (CLEVR)."""
HALF_WIDTH = 16 / 35
"""Half the picture's width at distance 1: lens of 35 mm, sensor of 32 mm."""
CAMERA_JITTER, LAMP_JITTER = 0.5, 1.0
"""Largest shift of camera and lamps along each axis (CLEVR)."""

# CLEVR's area lamps, which aim at the origin: position, side, radiant intensity (RGB) ahead. The
# figures give the mean background of i-CLEVR's pictures; they lie near those of CLEVR's scene.
LAMPS = (
    ((6.87, -3.13, 3.89), 0.5, (15.4, 14.2, 12.0)),  # key
    ((-4.59, -4.13, 2.36), 0.5, (4.20, 4.56, 5.60)),  # fill
    ((-1.13, 2.63, 4.74), 1.0, (6.83, 6.84, 6.64)),  # back
)
SUN, SUN_IRRADIANCE = (11.6608, -6.62799, 25.8232), 0.42
"""Direction to the sun (CLEVR), and its light on a surface that faces it."""
AMBIENT = 0.05
"""Radiance of the sky."""

# Where the objects after the first stand, measured on pictures of i-CLEVR: near the edge of
# CLEVR's square [-3, 3]^2, that is max(|x|, |y|) in [INNER, OUTER], and seldom far back.
INNER, OUTER = 2.3, 3.0
FRONT_BIAS = np.array([0.6, 0.12])
"""Chance to keep a place: a + b * (its distance in front of the centre, -4.2 to 4.2)."""
GAP, MARGIN = 0.25, 0.4
"""Least distance between objects, and between their centres along the camera's axes (CLEVR)."""
MIN_PIXELS = 200
"""Least visible pixels of an object in a picture of 320x240 (CLEVR)."""

CONDITION_SEQUENCES = 200
"""Test conditions are label sets of the first this many sequences."""
TEST_COUNTS, NEW_TEST_COUNTS = (6, 12, 14), (0, 12, 20)
"""Conditions of 1, 2 and 3 objects in the course's test.json and new_test.json."""


@dataclass(frozen=True)
class RenderConfig(Settings):
    """Render a stand-in for i-CLEVR; rerun the same command to go on after an interruption."""

    out_dir: Path = ROOT / "data" / "standin"
    """Folder for the JSON files; the pictures go to iclevr/ inside it."""
    num_sequences: Annotated[int, Field(ge=1, le=10**6)] = 6003
    """Sequences of three pictures; a larger number later extends the set."""
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


@dataclass(frozen=True)
class Item:
    """One object: index into NAMES, place on the ground, rotation in radians."""

    index: int
    x: float
    y: float
    angle: float

    @property
    def shape(self) -> str:
        return SHAPES[self.index // len(COLORS)]

    @property
    def albedo(self) -> list[float]:
        return [value / 255 for value in COLORS[NAMES[self.index].split()[0]]]


@dataclass(frozen=True)
class Sequence:
    """Camera (3,), lamps (3, 3) and the three objects in the order in which they appear."""

    camera: np.ndarray
    lamps: np.ndarray
    items: tuple[Item, ...]


def sample_labels(seed: int, i: int) -> list[int]:
    """Indices of the distinct objects of sequence i, in order of appearance."""
    rng = np.random.default_rng([seed, i, 0])
    return rng.permutation(len(NAMES))[:PICTURES].tolist()


def sample_sequence(seed: int, i: int) -> Sequence:
    """Draw sequence i; it depends on nothing but the two numbers."""
    rng = np.random.default_rng([seed, i, 1])
    camera = CAMERA + rng.uniform(-CAMERA_JITTER, CAMERA_JITTER, 3)
    positions = np.array([lamp[0] for lamp in LAMPS])
    lamps = positions + rng.uniform(-LAMP_JITTER, LAMP_JITTER, positions.shape)
    labels = sample_labels(seed, i)
    while True:
        places = np.zeros((PICTURES, 2))
        places[1:] = rng.uniform(-OUTER, OUTER, (PICTURES - 1, 2))
        angles = rng.uniform(0, 2 * np.pi, PICTURES)
        chances = rng.random(PICTURES - 1)
        items = tuple(
            Item(index, float(x), float(y), float(angle))
            for index, (x, y), angle in zip(labels, places, angles, strict=True)
        )
        sequence = Sequence(camera, lamps, items)
        if _well_placed(places, camera, chances) and _well_seen(sequence):
            return sequence


def _well_placed(places: np.ndarray, camera: np.ndarray, chances: np.ndarray) -> bool:
    """CLEVR's gap and margins; near the edge of the square and seldom far back, as in i-CLEVR."""
    front = _unit(camera[:2])
    right = np.array([-front[1], front[0]])
    first, second = np.triu_indices(len(places), 1)
    apart = places[first] - places[second]
    return bool(
        np.abs(places[1:]).max(1).min() >= INNER
        and (chances < FRONT_BIAS @ [np.ones(len(chances)), places[1:] @ front]).all()
        and np.linalg.norm(apart, axis=1).min() >= 2 * RADIUS + GAP
        and np.abs(apart @ np.stack([front, right], 1)).min() >= MARGIN
    )


def _well_seen(sequence: Sequence) -> bool:
    """Every object inside the frame and, behind all others, with enough visible pixels."""
    width, height = 160, 120
    origin, rays = sequence.camera[:, None], _rays(sequence.camera, width, height)
    alone = [np.isfinite(_hit(item, origin, rays)) for item in sequence.items]
    alone = np.reshape(alone, (PICTURES, height, width))
    cut = alone[:, [0, -1]].any() or alone[:, :, [0, -1]].any()
    ids = object_ids(sequence, PICTURES, width, height)
    shown = min((ids == k).sum() for k in range(PICTURES))
    return not cut and shown * (320 * 240) / (width * height) >= MIN_PIXELS


def object_ids(sequence: Sequence, count: int, width: int, height: int) -> np.ndarray:
    """(height, width): which of the first `count` objects a pixel's centre shows, -1: none."""
    rays = _rays(sequence.camera, width, height)
    _, ids = _nearest(sequence.items[:count], sequence.camera[:, None], rays)
    return ids.reshape(height, width)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _rays(
    camera: np.ndarray, width: int, height: int, x: float = 0.5, y: float = 0.5
) -> np.ndarray:
    """(3, height * width): directions through the point (x, y), each in [0, 1], of the pixels."""
    forward = -_unit(camera)
    right = _unit(np.cross(forward, (0, 0, 1)))
    down = np.cross(forward, right)
    u = ((np.arange(width) + x) / width * 2 - 1) * HALF_WIDTH
    v = ((np.arange(height) + y) / height * 2 - 1) * HALF_WIDTH * height / width
    rays = forward[:, None, None] + u * right[:, None, None] + v[:, None] * down[:, None, None]
    return rays.reshape(3, -1).astype(np.float32)


def _turn(item: Item, vectors: np.ndarray, way: int) -> tuple[np.ndarray, ...]:
    """(3, N) vectors seen along the object's own axes (way 1), or back along the scene's (-1)."""
    x, y, z = vectors
    if item.shape != "cube":
        return x, y, z
    c, s = np.float32(np.cos(item.angle)), np.float32(np.sin(way * item.angle))
    return c * x + s * y, c * y - s * x, z


def _centre(item: Item) -> np.ndarray:
    return np.array([[item.x], [item.y], [RADIUS]], np.float32)


@np.errstate(divide="ignore", invalid="ignore")
def _hit(item: Item, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """(N,): where rays (3, N) from outside an object meet it, in ray lengths; inf: nowhere."""
    ox, oy, oz = _turn(item, (origin - _centre(item)) / np.float32(RADIUS), 1)
    dx, dy, dz = _turn(item, rays / np.float32(RADIUS), 1)
    near, far = np.float32(0), np.float32(np.inf)
    slabs = {"cube": ((ox, dx), (oy, dy), (oz, dz)), "cylinder": ((oz, dz),), "sphere": ()}
    for o, d in slabs[item.shape]:
        inverse = 1 / d
        middle, half = -o * inverse, abs(inverse)
        near, far = np.maximum(near, middle - half), np.minimum(far, middle + half)
    if item.shape != "cube":
        a, b, c = dx * dx + dy * dy, dx * ox + dy * oy, ox * ox + oy * oy - 1
        if item.shape == "sphere":
            a, b, c = a + dz * dz, b + dz * oz, c + oz * oz
        root = np.sqrt(b * b - a * c)  # NaN: the ray passes by, and no comparison holds
        near, far = np.maximum(near, (-b - root) / a), np.minimum(far, (root - b) / a)
    return np.where(near < far, near, np.float32(np.inf))


def _nearest(
    items: tuple[Item, ...], origin: np.ndarray, rays: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What rays (3, N) meet first: distance in ray lengths, and object or -1 (ground, sky)."""
    drop = -rays[2]
    downward = drop > 1e-4
    distance = np.where(downward, origin[2] / np.where(downward, drop, 1), np.float32(np.inf))
    ids = np.full(distance.shape, -1)
    for k, item in enumerate(items):
        hit = _hit(item, origin, rays)
        ids[hit < distance] = k
        distance = np.minimum(hit, distance)
    return distance, ids


def _surface(
    items: tuple[Item, ...], points: np.ndarray, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (3, N) on objects or, where ids is -1, the ground; with their normals and albedos.

    The points come back a little off the surface, so that rays from there don't meet it.
    """
    normals, albedos = np.zeros_like(points), np.full_like(points, GROUND)
    normals[2] = 1
    for k, item in enumerate(items):
        (here,) = np.nonzero(ids == k)
        albedos[:, here] = np.array(item.albedo)[:, None]
        normal = (points[:, here] - _centre(item)) / RADIUS
        if item.shape == "cylinder":
            lid = normal[2] > 0.999
            normal[2] = lid
            normal[:2, lid] = 0
        elif item.shape == "cube":
            local = np.stack(_turn(item, normal, 1))
            local = np.trunc(local / abs(local).max(0))  # 1 or -1 along one axis, else 0
            normal = np.stack(_turn(item, local, -1))
        normals[:, here] = normal
    return points + np.float32(1e-3) * normals, normals, albedos


def _lamps(sequence: Sequence, u: float, v: float) -> list[tuple[np.ndarray, ...]]:
    """Lamps as points: place, direction of the beam, intensity, each (3, 1).

    u and v, in [0, 1], tell which point of an area lamp it is.
    """
    far = 1e5 * _unit(np.array(SUN))  # the sun: a lamp so far away that distances don't matter
    lamps = [(far, -_unit(far), np.full(3, SUN_IRRADIANCE * 1e10))]
    for centre, (_, side, intensity) in zip(sequence.lamps, LAMPS, strict=True):
        aim = -_unit(centre)
        right = _unit(np.cross(aim, (0, 0, 1)))
        shift = (u - 0.5) * right + (v - 0.5) * np.cross(right, aim)
        lamps.append((centre + side * shift, aim, np.array(intensity)))
    return [tuple(value[:, None].astype(np.float32) for value in lamp) for lamp in lamps]


def _direct(
    items: tuple[Item, ...], points: np.ndarray, normals: np.ndarray, lamps: list
) -> np.ndarray:
    """(3, N): irradiance of points from the lamps, divided by pi: what a white surface shows."""
    light = np.zeros_like(points)
    for place, aim, intensity in lamps:
        rays = place - points
        square = _dot(rays, rays)
        # Cosines at the surface and, as lamps are flat, at the lamp.
        amount = np.maximum(_dot(normals, rays), 0) * np.maximum(_dot(aim, -rays), 0)
        amount /= square * square * np.float32(np.pi)
        for item in items:
            amount *= _hit(item, points, rays) >= 1
        light += intensity * amount
    return light


def _spread(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n points in the square, n others in the square, n on the sphere: each set evenly spread."""
    k = np.arange(n)
    roots = np.array([0.7548776662, 0.5698402910])  # R2 sequence (Roberts 2018)
    z, turn = 1 - (2 * k + 1) / n, 2.399963 * k  # golden angle spiral
    ring = np.sqrt(1 - z * z)
    sphere = np.stack([ring * np.cos(turn), ring * np.sin(turn), z], 1)
    pixels, lamps = (k[:, None] * roots) % 1, (k[:, None] * roots[::-1]) % 1
    pixels, lamps = (points - points.mean(0) + 0.5 for points in (pixels, lamps))  # centred
    return pixels, lamps, sphere.astype(np.float32)


def render_picture(
    sequence: Sequence, count: int, width: int = 96, height: int = 72, samples: int = 16
) -> np.ndarray:
    """The picture of the first `count` objects, uint8 (height, width, 3).

    Each sample of a pixel looks through another point of it, is lit from another point of every
    lamp and gathers indirect light from another direction. All pixels share these choices, so
    there is no grain.
    """
    items = sequence.items[:count]
    camera = sequence.camera[:, None].astype(np.float32)
    total = np.zeros((3, height * width), np.float32)
    for pixel, lamp, ball in zip(*_spread(samples), strict=True):
        lamps = _lamps(sequence, *lamp)
        rays = _rays(sequence.camera, width, height, *pixel)
        distance, ids = _nearest(items, camera, rays)
        points, normals, albedos = _surface(items, camera + distance * rays, ids)
        light = _direct(items, points, normals, lamps)
        # One bounce: normal + point on the unit sphere is spread like the cosine. (Not quite 1:
        # their sum must not vanish.)
        rays = normals + np.float32(0.999) * ball[:, None]
        distance, ids = _nearest(items, points, rays)
        (seen,) = np.nonzero(np.isfinite(distance))
        there = points[:, seen] + distance[seen] * rays[:, seen]
        there, there_normals, there_albedos = _surface(items, there, ids[seen])
        gathered = np.full_like(points, AMBIENT)
        gathered[:, seen] = there_albedos * (_direct(items, there, there_normals, lamps) + AMBIENT)
        total += albedos * (light + gathered)
    linear = (total / samples).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (srgb * 255).round().astype(np.uint8).reshape(3, height, width).transpose(1, 2, 0)


def make_conditions(seed: int) -> tuple[list[list[str]], list[list[str]]]:
    """The conditions of test.json and new_test.json: no set of objects twice, all 24 objects
    about equally often, all from the first sequences, so that training pictures show them."""
    rng = np.random.default_rng([seed, 0, 2])  # 0 and 1 are those of sequence 0
    used: set[frozenset[int]] = set()
    seen: Counter[int] = Counter()

    def pick(size: int) -> list[str]:
        sets = [sample_labels(seed, i)[:size] for i in range(CONDITION_SEQUENCES)]
        free = [labels for labels in sets if frozenset(labels) not in used]
        rng.shuffle(free)
        best = min(free, key=lambda labels: sum(2 * seen[n] + 1 for n in labels))
        used.add(frozenset(best))
        seen.update(best)
        return [NAMES[n] for n in best]

    def split(counts: tuple[int, ...]) -> list[list[str]]:
        return [pick(size) for size, n in enumerate(counts, 1) for _ in range(n)]

    return split(TEST_COUNTS), split(NEW_TEST_COUNTS)


def file_names(i: int) -> list[str]:
    """Names of the pictures of sequence i."""
    return [f"CLEVR_train_{i:06d}_{k}.png" for k in range(PICTURES)]


def _work(job: tuple[RenderConfig, int, list[int]]) -> int:
    """Render some pictures of a sequence; returns how many."""
    config, i, missing = job
    sequence = sample_sequence(config.seed, i)
    for k in missing:
        picture = render_picture(sequence, k + 1, config.width, config.height, config.samples)
        with atomic_write(config.out_dir / "iclevr" / file_names(i)[k]) as temporary:
            Image.fromarray(picture).save(temporary)
    return len(missing)


def _start_worker() -> None:
    """Let no worker outlive a parent that was killed."""
    parent = mp.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _made_here(config: RenderConfig) -> dict[str, int] | None:
    """The settings that the folder's pictures were made with; None: it holds none yet.

    Raises:
        UserError: they were made with others, or elsewhere.
    """
    path = config.out_dir / "render.json"
    if not path.exists():
        for name in ("train.json", "iclevr"):
            if (config.out_dir / name).exists():
                raise UserError(
                    f"{config.out_dir}: holds {name}, which this script has not made; "
                    "choose another --out_dir"
                )
        return None
    stored = read_json(path, "delete the folder or choose another --out_dir")
    if not isinstance(stored, dict):
        raise UserError(f"{path}: not a dict of settings; delete the folder or change --out_dir")
    for name, value in _settings(config).items():
        if stored.get(name) != value:
            raise UserError(
                f"{path}: made with --{name} {stored.get(name)}, not {value}; "
                f"use --{name} {stored.get(name)} or another --out_dir"
            )
    return stored


def _settings(config: RenderConfig) -> dict[str, int]:
    """What the pictures follow from."""
    return {name: getattr(config, name) for name in ("seed", "width", "height", "samples")}


def _render_all(config: RenderConfig, jobs: list[tuple[RenderConfig, int, list[int]]]) -> None:
    total = config.num_sequences * PICTURES
    done = total - sum(len(missing) for _, _, missing in jobs)
    spawn = mp.get_context("spawn")  # works the same on every system
    with (
        ProcessPoolExecutor(config.num_workers, spawn, _start_worker) as pool,
        tqdm(total=total, initial=done, unit="picture") as bar,
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


def _draw_sheet(config: RenderConfig) -> None:
    """sheet.png: the last pictures of the first 32 sequences, squeezed as a network sees them."""
    side, columns = 128, 8
    numbers = range(min(32, config.num_sequences))
    sheet = Image.new("RGB", (columns * side, -(-len(numbers) // columns) * side))
    for i in numbers:
        with Image.open(config.out_dir / "iclevr" / file_names(i)[-1]) as picture:
            small = picture.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
        place = (i % columns * side, i // columns * side)
        sheet.paste(small.resize((side, side), Image.Resampling.BICUBIC), place)
    with atomic_write(config.out_dir / "sheet.png") as temporary:
        sheet.save(temporary)


def main(argv: list[str] | None = None) -> None:
    config = parse_args(RenderConfig, argv)
    _made_here(config)  # a folder of something else gets no lock, either
    make_folder(config.out_dir, "--out_dir")
    lock = lock_folder(config.out_dir, "wait for it or choose another --out_dir")
    try:
        _render(config)
    finally:
        lock.release()


def _render(config: RenderConfig) -> None:
    if _made_here(config) is None:
        write_json(config.out_dir / "render.json", _settings(config))
    image_dir = config.out_dir / "iclevr"
    make_folder(image_dir, "--out_dir")
    for folder in (config.out_dir, image_dir):
        remove_left_overs(folder)
    done = set(os.listdir(image_dir))
    jobs = []
    for i in range(config.num_sequences):
        missing = [k for k, name in enumerate(file_names(i)) if name not in done]
        if missing:
            jobs.append((config, i, missing))
    if jobs:
        _render_all(config, jobs)
    test, new_test = make_conditions(config.seed)
    write_json(config.out_dir / "objects.json", {name: n for n, name in enumerate(NAMES)})
    write_json(config.out_dir / "test.json", test)
    write_json(config.out_dir / "new_test.json", new_test)
    train = {}
    for i in range(config.num_sequences):
        names = [NAMES[n] for n in sample_labels(config.seed, i)]
        train |= {name: names[: k + 1] for k, name in enumerate(file_names(i))}
    write_json(config.out_dir / "train.json", train)
    _draw_sheet(config)
    print(f"{len(train)} pictures in {config.out_dir}; sheet.png shows some")


if __name__ == "__main__":
    run(main)
