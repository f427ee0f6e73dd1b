"""The rendered stand-in: layout, CLEVR's rules, and files that no interruption can change."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import wait_for
from PIL import Image

import render_iclevr
from iclevr import ray_tracer
from iclevr.placement import _well_seen, sample_sequence
from iclevr.ray_tracer import hit, object_ids, render_picture, unit
from iclevr.scene import NAMES, PICTURES, RADIUS, Item, Sequence, make_conditions, sample_labels
from iclevr.standin import file_names
from render_iclevr import main
from runtime.files import lock_folder
from runtime.settings import UserError

SMALL = ["--width", "48", "--height", "36", "--samples", "2"]


def flags(folder: Path, sequences: int, workers: int = 2) -> list[str]:
    counts = ["--num_sequences", str(sequences), "--num_workers", str(workers)]
    return ["--out_dir", str(folder), *counts, *SMALL]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standin")
    main(flags(folder, 12, workers=1))
    return folder


def test_names_have_the_course_order():
    assert len(NAMES) == 24
    assert NAMES[0] == "gray cube" and NAMES[9] == "red sphere" and NAMES[23] == "yellow cylinder"


def test_layout_and_label_order(rendered: Path):
    objects = json.loads((rendered / "objects.json").read_text())
    assert objects == {name: n for n, name in enumerate(NAMES)}
    train = json.loads((rendered / "train.json").read_text())
    assert list(train) == [f"CLEVR_train_{i:06d}_{k}.png" for i in range(12) for k in range(3)]
    assert sorted(os.listdir(rendered / "iclevr")) == sorted(train)
    for i in range(12):
        names = [NAMES[n] for n in sample_labels(0, i)]
        assert len(set(names)) == PICTURES
        for k, file_name in enumerate(file_names(i)):
            assert train[file_name] == names[: k + 1]
    assert Image.open(rendered / "iclevr" / "CLEVR_train_000003_1.png").size == (48, 36)


def test_conditions():
    test, new_test = make_conditions(0)
    assert [Counter(map(len, split)) for split in (test, new_test)] == [
        {1: 6, 2: 12, 3: 14},
        {2: 12, 3: 20},
    ]
    sets = [frozenset(names) for names in test + new_test]
    assert len(set(sets)) == 64
    assert sum(map(len, sets)) == 156, "an object twice in one condition"
    counts = Counter(name for names in sets for name in names)
    assert set(counts) == set(NAMES) and min(counts.values()) >= 5 and max(counts.values()) <= 8
    known = {
        frozenset(NAMES[n] for n in sample_labels(0, i)[:k]) for i in range(200) for k in (1, 2, 3)
    }
    assert set(sets) <= known, "a condition that no training picture shows"
    assert make_conditions(0) == (test, new_test) != make_conditions(1)


def test_every_object_visible_and_inside_the_frame():
    for i in range(40):
        sequence = sample_sequence(0, i)
        assert (sequence.items[0].x, sequence.items[0].y) == (0, 0)
        for count in range(1, PICTURES + 1):
            ids = object_ids(sequence, count, 320, 240)
            border = np.concatenate([ids[0], ids[-1], ids[:, 0], ids[:, -1]])
            assert (border == -1).all(), f"sequence {i}: an object is cut by the frame"
            pixels = [(ids == k).sum() for k in range(count)]
            # 200 on the coarser grid of the check; a pixel more or less at the edges here.
            assert min(pixels) >= 180, f"sequence {i}: an object is hidden, {pixels}"


def test_hidden_and_cut_objects_are_refused():
    camera, lamps = sample_sequence(0, 0).camera, sample_sequence(0, 0).lamps
    toward = camera[:2] / np.linalg.norm(camera[:2])

    def well_seen(*places: np.ndarray) -> bool:
        # A cylinder, a ball behind or before it, a cube.
        items = [Item(index, *place, 0.0) for index, place in zip((16, 8, 0), places, strict=True)]
        return _well_seen(Sequence(camera, lamps, tuple(items)))

    side = 2.5 * np.array([-toward[1], toward[0]])
    assert well_seen(0 * toward, side, -side)
    assert not well_seen(0 * toward, -0.5 * toward, side), "hidden behind the first object"
    assert not well_seen(0 * toward, side, 2 * side), "cut by the frame"
    assert not well_seen(0 * toward, side, 9 * side), "outside the frame"


def test_each_picture_adds_one_object():
    for i in range(6):
        sequence = sample_sequence(5, i)
        pictures = [render_picture(sequence, k, 96, 72, 4).astype(int) for k in (1, 2, 3)]
        for k in (1, 2):
            change = np.abs(pictures[k] - pictures[k - 1]).max(-1)
            new = object_ids(sequence, k + 1, 96, 72) == k
            assert np.median(change[new]) > 12, "the new object does not show"
            # Away from it and from its shadow nothing changes: same camera, lamps and objects.
            assert (change == 0).mean() > 0.5
            earlier = (object_ids(sequence, k + 1, 96, 72) >= 0) & ~new
            assert np.median(change[earlier]) <= 12, "earlier objects changed"


def test_object_shows_its_color():
    rgb = {"red": [0], "green": [1], "blue": [2], "cyan": [1, 2], "yellow": [0, 1]}
    seen = set()
    for i in range(30):
        sequence = sample_sequence(0, i)
        color = NAMES[sequence.items[0].index].split()[0]
        if color in rgb and color not in seen:
            seen.add(color)
            pixels = render_picture(sequence, 1, 96, 72, 4)[object_ids(sequence, 1, 96, 72) == 0]
            mean = pixels.mean(0)
            others = [c for c in range(3) if c not in rgb[color]]
            assert mean[rgb[color]].min() > mean[others].max() + 20, (color, mean)
    assert seen == set(rgb)


def test_analytic_shapes_agree_with_points_on_them():
    """A ray towards a point inside an object meets it, where the object's surface is."""
    rng = np.random.default_rng(0)
    for index in (0, 8, 16):  # cube, sphere, cylinder
        item = Item(index, 1.0, -2.0, 0.4)
        centre = np.array([1.0, -2.0, RADIUS])
        origins = centre[:, None] + 5 * unit(rng.normal(size=3))[:, None]
        inner = centre[:, None] + rng.uniform(-0.5, 0.5, (3, 500)) * RADIUS
        rays = (inner - origins).astype(np.float32)
        distance = hit(item, origins.astype(np.float32), rays)
        assert (distance < 1).all()
        local = origins + distance * rays - centre[:, None]
        c, s = np.cos(0.4), np.sin(0.4)
        x, y, z = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) @ local / RADIUS
        level = {
            0: np.abs([x, y, z]).max(0),
            8: np.sqrt(x**2 + y**2 + z**2),
            16: np.maximum(np.hypot(x, y), abs(z)),
        }[index]
        assert np.allclose(level, 1, atol=1e-3)
        away = hit(item, origins.astype(np.float32), -rays)
        assert np.isinf(away).all()


def test_workers_do_not_change_the_files(rendered: Path, tmp_path: Path):
    main(flags(tmp_path, 12, workers=2))
    assert contents(tmp_path) == contents(rendered)


def test_sequences_can_be_added_and_left_out(rendered: Path, tmp_path: Path, capsys):
    main(flags(tmp_path, 4))
    first = contents(tmp_path)
    (tmp_path / "iclevr" / file_names(0)[1]).write_bytes(b"")  # as a full disk leaves it
    main(flags(tmp_path, 12))
    assert contents(tmp_path) == contents(rendered)
    assert "leaves out" not in capsys.readouterr().out
    main(flags(tmp_path, 4))
    assert "24 more are there, which train.json leaves out" in capsys.readouterr().out
    assert (tmp_path / "train.json").read_bytes() == first["train.json"]


def start(folder: Path, sequences: int) -> subprocess.Popen:
    command = [sys.executable, render_iclevr.__file__, *flags(folder, sequences)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A background job inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def pictures_of(folder: Path) -> list[Path]:
    return list(folder.glob("iclevr/CLEVR*.png"))


def test_resumes_after_sigkill(tmp_path: Path):
    process = start(tmp_path / "killed", 120)
    assert wait_for(lambda: len(pictures_of(tmp_path / "killed")) >= 20, process)
    process.kill()
    process.communicate(timeout=20)  # ends when no worker holds the pipes any more
    assert not (tmp_path / "killed" / "train.json").exists()
    left = pictures_of(tmp_path / "killed")
    assert len(left) < 360, "nothing left to do: the kill came too late to test anything"
    (tmp_path / "killed" / "iclevr" / ".tmp-CLEVR_train_000119_2-x.png").write_bytes(b"half")
    stamps = {path: path.stat().st_mtime_ns for path in left}
    main(flags(tmp_path / "killed", 120))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    main(flags(tmp_path / "whole", 120))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_second_renderer_in_the_folder_is_refused(tmp_path: Path):
    lock = lock_folder(tmp_path, "")
    with pytest.raises(UserError, match=f"process {os.getpid()} .* works here"):
        main(flags(tmp_path, 1))
    assert not (tmp_path / "iclevr").exists()
    lock.release()
    main(flags(tmp_path, 1))


def test_a_picture_is_whole_or_absent(tmp_path: Path, monkeypatch):
    def stopped_half_way(self, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stopped_half_way)
    config = render_iclevr.RenderConfig(out_dir=tmp_path, width=24, height=18, samples=1)
    with pytest.raises(KeyboardInterrupt):
        render_iclevr._work((config, 0, [0]))
    assert not list(tmp_path.rglob("*.png"))


def test_ctrl_c_stops_with_one_line(tmp_path: Path):
    process = start(tmp_path, 400)
    assert wait_for(lambda: len(pictures_of(tmp_path)) >= 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "rerun the same command" in out and out.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(("flag", "value"), [("seed", "1"), ("samples", "3"), ("width", "50")])
def test_other_settings_are_refused(rendered: Path, flag: str, value: str):
    before = contents(rendered)
    with pytest.raises(UserError, match=f"--{flag}.*another --out_dir") as error:
        main([*flags(rendered, 12), f"--{flag}", value])
    assert "\n" not in str(error.value)
    assert contents(rendered) == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [("num_sequences", "0"), ("width", "31"), ("height", "2000"), ("samples", "0"), ("seed", "-1")],
)
def test_bad_settings_are_refused(tmp_path: Path, flag: str, value: str):
    with pytest.raises(UserError, match=flag):
        main(["--out_dir", str(tmp_path), f"--{flag}", value])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("i", [1, 3])
def test_light_equals_mitsubas_path_tracer(i):
    """The same scene in Mitsuba 3, all bounces, compared as means of 8x8 pixels (its grain)."""
    mi = pytest.importorskip("mitsuba")
    mi.set_variant("scalar_rgb")
    width, height, radius = 64, 48, RADIUS
    sequence, turn = sample_sequence(0, i), mi.ScalarTransform4f

    def matte(albedo):
        return {"type": "diffuse", "reflectance": {"type": "rgb", "value": list(albedo)}}

    def scene(emitters):
        result = {
            "type": "scene",
            "integrator": {"type": "path"},
            "sensor": {
                "type": "perspective",
                "fov": 2 * float(np.degrees(np.arctan(ray_tracer.HALF_WIDTH))),
                "fov_axis": "x",
                "to_world": turn().look_at(sequence.camera.tolist(), [0, 0, 0], [0, 0, 1]),
                "film": {"type": "hdrfilm", "width": width, "height": height,
                         "rfilter": {"type": "box"}, "pixel_format": "rgb"},
                "sampler": {"type": "multijitter", "sample_count": 400},
            },
            "ground": {"type": "rectangle", "to_world": turn().scale(300),
                       "bsdf": matte([ray_tracer.GROUND] * 3)},
            **emitters,
        }  # fmt: skip
        for k, item in enumerate(sequence.items):
            centre = turn().translate([item.x, item.y, radius])
            bsdf = matte(item.albedo)
            if item.shape == "cube":
                place = centre.rotate([0, 0, 1], float(np.degrees(item.angle))).scale(radius)
                result[f"item{k}"] = {"type": "cube", "to_world": place, "bsdf": bsdf}
            elif item.shape == "sphere":
                place = centre.scale(radius)
                result[f"item{k}"] = {"type": "sphere", "to_world": place, "bsdf": bsdf}
            else:
                ends = {"p0": [item.x, item.y, 0], "p1": [item.x, item.y, 2 * radius]}
                result[f"item{k}"] = {"type": "cylinder", "radius": radius, "bsdf": bsdf, **ends}
                lid = centre.translate([0, 0, radius]).scale(radius)
                result[f"lid{k}"] = {"type": "disk", "to_world": lid, "bsdf": bsdf}
        return np.array(mi.render(mi.load_dict(result), seed=0))

    sky = {
        "ambient": {"type": "constant", "radiance": ray_tracer.AMBIENT},
        "sun": {"type": "directional", "direction": [-v for v in ray_tracer.SUN],
                "irradiance": ray_tracer.SUN_IRRADIANCE},
    }  # fmt: skip
    lamps = {
        f"lamp{n}": {
            "type": "rectangle",
            "to_world": turn().look_at(place.tolist(), [0, 0, 0], [0, 0, 1]).scale(side / 2),
            "bsdf": matte([0, 0, 0]),
            "emitter": {"type": "area",
                        "radiance": {"type": "rgb", "value": [v / side**2 for v in light]}},
        }
        for n, (place, (_, side, light)) in enumerate(
            zip(sequence.lamps, ray_tracer.LAMPS, strict=True)
        )
    }  # fmt: skip
    # Apart, as a lamp's rectangle would shade the ground from sun and sky.
    linear = (scene(sky) + scene(lamps)).clip(0, 1)
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    ours = render_picture(sequence, 3, width, height, 64).astype(float)

    def blocks(picture):
        return picture.reshape(height // 8, 8, width // 8, 8, 3).mean(axis=(1, 3))

    difference = blocks(ours) - blocks(255 * expected)
    assert abs(difference).max() < 5 and np.sqrt((difference**2).mean()) < 1  # of 255
