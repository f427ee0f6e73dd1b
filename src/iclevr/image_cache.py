"""Pictures decoded once into a memory-mapped uint8 array, so that an epoch costs no decoding."""

import contextlib
import functools
import hashlib
import os
import stat
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.files import atomic_write, check_folder, remove_left_overs
from runtime.output import progress_bar
from runtime.settings import UserError

MAX_SIDE = 8192  # a 64 px training picture needs no more; guards against decompression bombs
MODES = ("RGB", "RGBA", "L", "P")  # 8 bits a channel; CLEVR's own pictures are RGBA


def load_images(
    image_dir: Path,
    names: Sequence[str],
    image_size: int,
    cache_dir: Path,
    follow_links: bool = False,
) -> Path:
    """Make sure that the cache of these pictures is there and current.

    The file's name holds a hash of every picture's name, size and time, so that a change of the
    sources makes a new cache; two processes may build it at once.

    Args:
        names: N file names in `image_dir`.
        image_size: side S in pixels that pictures are resized to (bilinear, antialiased).

    Returns:
        a .npy file: (N, 3, S, S) uint8, in the order of `names`.

    Raises:
        UserError: pictures are missing or broken, or the cache can't be written.
    """
    folder = hashlib.sha256(str(image_dir.resolve()).encode()).hexdigest()[:8]
    sources = _hash_of_sources(image_dir, names, follow_links)
    path = cache_dir / f"{image_size}px-{folder}-{sources}.npy"
    if path.exists():
        if not (fault := _fault(path)):
            return path
        print(f"warning: {path}: damaged ({fault}); decoding again", file=sys.stderr)
    check_folder(cache_dir, "--cache_dir")
    remove_left_overs(cache_dir, older_than_s=24 * 3600)  # younger ones may be still in the making
    try:
        with atomic_write(path) as temporary:
            _decode_all([image_dir / name for name in names], image_size, temporary)
    except UserError:
        if not path.exists() or _fault(path):
            raise
        # Another process was faster, and uses it: Windows replaces no such file.
    for old in cache_dir.glob(f"{image_size}px-{folder}-*.npy"):
        if old != path:
            with contextlib.suppress(OSError):  # still in use
                old.unlink()
    return path


def _fault(path: Path) -> Exception | None:
    """Why a cache can't be used: cut short, after it was written; or None."""
    try:
        np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        return error
    return None


def _hash_of_sources(image_dir: Path, names: Sequence[str], follow_links: bool) -> str:
    """16 hex digits that follow from every picture's name, size and time."""
    sources, missing, inside = hashlib.sha256(), [], image_dir.resolve()
    for name in names:
        path = image_dir / name
        try:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                if not follow_links and inside not in Path(os.path.realpath(path)).parents:
                    raise UserError(
                        f"{path}: a link that leads out of the folder; put the picture itself "
                        "there, or take such links with --follow_links"
                    )
                found = os.stat(path)
            sources.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
        except (OSError, ValueError):  # ValueError: no name that a file could have
            missing.append(name)
    if missing:
        few = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        if os.path.islink(image_dir / missing[0]):
            raise UserError(
                f"{image_dir}: {len(missing)} of {len(names)} pictures are missing ({few}): links "
                "to where nothing is; fetch them, such as with git annex get or dvc pull"
            )
        raise UserError(
            f"{image_dir}: {len(missing)} of {len(names)} pictures are missing ({few}); "
            "put them there, name their folder with --image_dir, or use a rendered stand-in "
            "with --data_dir data/standin"
        )
    return sources.hexdigest()[:16]


def _decode_all(paths: Sequence[Path], image_size: int, target: Path) -> None:
    """Write the pictures to `target`, a .npy file (N, 3, S, S) uint8."""
    shape = (len(paths), 3, image_size, image_size)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    # One after the other, not through a map: a full disk would crash that, and Windows renames no
    # file that is mapped. Pillow decodes outside the interpreter's lock.
    with open(target, "wb") as file, ThreadPoolExecutor() as pool:
        np.lib.format.write_array_header_1_0(file, header)
        read = functools.partial(
            read_image, image_size=image_size,
            remedy="replace it; a rendered one: delete it, and run src/render_iclevr.py again",
        )  # fmt: skip
        jobs = pool.map(read, paths)  # an error cancels the rest
        for picture in progress_bar(jobs, total=len(paths), desc="decode pictures", unit="img"):
            file.write(picture.tobytes())


def read_image(path: Path, image_size: int, remedy: str = "replace it") -> np.ndarray:
    """Decode and resize one picture: (3, S, S) uint8.

    Args:
        remedy: of a picture that can't be decoded.

    Raises:
        UserError: no 8-bit picture, truncated, animated, or absurdly large.
    """
    try:
        with Image.open(path) as image:
            if max(image.size) > MAX_SIDE:
                raise UserError(f"{path}: {image.size[0]}x{image.size[1]} pixels are too many")
            frames = getattr(image, "n_frames", 1)
            if image.mode not in MODES or frames > 1:
                raise UserError(
                    f"{path}: mode {image.mode}, {frames} frame(s); "
                    "convert it to one 8-bit RGB picture"
                )
            resized = image.convert("RGB").resize((image_size, image_size), Image.BILINEAR)
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: not found, or a folder; name a picture") from None
    except Exception as error:  # whatever the decoder makes of a damaged file
        raise UserError(f"{path}: not a readable picture ({error}); {remedy}") from None
    return np.asarray(resized).transpose(2, 0, 1)
