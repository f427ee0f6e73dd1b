"""A ray tracer in NumPy: area lamps, sun and sky, one bounce, matte surfaces, no grain.

Vectors are (3, N) arrays, a column for each ray or point; distances are in ray lengths.
"""

import numpy as np

from iclevr.scene import RADIUS, Item, Sequence

HALF_WIDTH = 16 / 35
"""Half the picture's width at distance 1: lens of 35 mm, sensor of 32 mm."""
GROUND = 0.81
"""Albedo of the ground."""

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


def object_ids(sequence: Sequence, count: int, width: int, height: int) -> np.ndarray:
    """(height, width): which of the first `count` objects a pixel's centre shows, -1: none."""
    rays = rays_of(sequence.camera, width, height)
    _, ids = _nearest(sequence.items[:count], sequence.camera[:, None], rays)
    return ids.reshape(height, width)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """np.cross, which takes 20 times as long for two single vectors."""
    return np.array(
        [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
    )


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def rays_of(
    camera: np.ndarray, width: int, height: int, x: float = 0.5, y: float = 0.5
) -> np.ndarray:
    """(3, height * width): directions through the point (x, y), each in [0, 1], of the pixels."""
    forward = -unit(camera)
    right = unit(_cross(forward, (0, 0, 1)))
    down = _cross(forward, right)
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
def hit(item: Item, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
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
        met = hit(item, origin, rays)
        ids[met < distance] = k
        distance = np.minimum(met, distance)
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
    far = 1e5 * unit(np.array(SUN))  # the sun: a lamp so far away that distances don't matter
    lamps = [(far, -unit(far), np.full(3, SUN_IRRADIANCE * 1e10))]
    for centre, (_, side, intensity) in zip(sequence.lamps, LAMPS, strict=True):
        aim = -unit(centre)
        right = unit(_cross(aim, (0, 0, 1)))
        shift = (u - 0.5) * right + (v - 0.5) * _cross(right, aim)
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
            amount *= hit(item, points, rays) >= 1
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
        rays = rays_of(sequence.camera, width, height, *pixel)
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
