"""Bad input, through the scripts: one line that names the culprit, and nothing changed on disk."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import SMALL_NETWORK, SRC, error_of
from PIL import Image

import export
import guidance_scale
import render_iclevr
import test
import train
import train_evaluator

SCRIPTS = {
    "train": train, "test": test, "guidance_scale": guidance_scale, "export": export,
    "train_evaluator": train_evaluator, "render_iclevr": render_iclevr,
}  # fmt: skip
BASE = {
    "train": f"--data_dir {{data}} --evaluator {{judge}} --output_dir {{out}} --device cpu "
    f"--wandb disabled {shlex.join(SMALL_NETWORK)}",
    "test": "--data_dir {data} --evaluator {judge} --output_dir {out} --device cpu "
    "--wandb disabled --ckpt_path {ckpt}",
    "guidance_scale": "--data_dir {data} --evaluator {judge} --output_dir {out} --device cpu "
    "--wandb disabled --ckpt_path {ckpt} --scheduler ddpm --num_fd_samples 0",
    "export": "--ckpt_path {ckpt} --out {out}/folder",
    "train_evaluator": "--data_dir {data} --device cpu --out {out}/judge.pth",
    "render_iclevr": "--out_dir {out}/rendered --num_sequences 1",
}
"""Flags with which every script would work; {names} stand for the files of the test."""


class Case(NamedTuple):
    """A way to go wrong: what is changed, the script and flags, and words of the message."""

    script: str
    words: tuple[str, ...]
    flags: str = ""
    change: Callable[[dict[str, Path]], object] = lambda files: None


def text(name: str, content: str) -> Callable:
    return lambda files: (files["data"] / name).write_text(content, encoding="utf-8")


def raw(name: str, content: bytes) -> Callable:
    return lambda files: (files["data"] / name).write_bytes(content)


def half(key: str) -> Callable:
    """Keep the first half of a file."""

    def change(files):
        content = files[key].read_bytes()
        files[key].write_bytes(content[: len(content) // 2])

    return change


def folder_for(key: str) -> Callable:
    """A folder where a file should be."""

    def change(files):
        files[key].unlink()
        files[key].mkdir()

    return change


def picture(image: Image.Image | bytes, **how) -> Callable:
    def change(files):
        path = files["data"] / "iclevr" / "CLEVR_train_000002_1.png"
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path, **how)

    return change


def checkpoint(edit: Callable[[dict], object]) -> Callable:
    """Rewrite the checkpoint after `edit` has changed its content."""

    def change(files):
        content = torch.load(files["ckpt"], weights_only=True)
        edit(content)
        torch.save(content, files["ckpt"])

    return change


class Runs:
    """Unpickling it would run code."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def gray(*size: int) -> Image.Image:
    return Image.new("L", size)


NAME = "CLEVR_train_000002_1.png"
CASES = {
    # --- JSON
    "objects: a list": Case("train", ("objects.json", "dict"), change=text("objects.json", "[]")),
    "objects: empty": Case("train", ("objects.json",), change=text("objects.json", "")),
    "objects: a gap": Case(
        "train", ("objects.json", "0 ... 1"), change=text("objects.json", '{"a": 0, "b": 2}')
    ),
    "objects: other ones": Case(
        "test", ("objects.json", "other objects"), change=text("objects.json", '{"red ball": 0}')
    ),
    "objects: a float": Case(
        "train", ("objects.json", "1.5"), change=text("objects.json", '{"a": 1.5}')
    ),
    "objects: huge nesting": Case(
        "train", ("objects.json",), change=text("objects.json", "[" * 100000)
    ),
    "objects: a name that leads out": Case(
        "test", ("objects.json", "'../red'"), change=text("objects.json", '{"../red": 0}')
    ),
    "objects: not UTF-8": Case("train", ("objects.json",), change=raw("objects.json", b"\xff{}")),
    "train: absolute name": Case(
        "train", ("train.json", "/etc/passwd"),
        change=text("train.json", '{"/etc/passwd": ["red cube"]}'),
    ),
    "train: leads out": Case(
        "train", ("train.json", "../a.png"), change=text("train.json", '{"../a.png": ["red cube"]}')
    ),
    "train: Windows separator": Case(
        "train", ("train.json", "a.png"), change=text("train.json", '{"..\\\\a.png": ["red cube"]}')
    ),
    "train: NUL in a name": Case(
        "train", ("train.json",), change=text("train.json", '{"a\\u0000.png": ["red cube"]}')
    ),
    "train: unknown object": Case(
        "train", ("train.json", "'red ball'"), change=text("train.json", '{"a.png": ["red ball"]}')
    ),
    "train: another case": Case(
        "train", ("train.json", "did you mean 'red cube'"),
        change=text("train.json", '{"a.png": ["Red Cube"]}'),
    ),
    "train: an object twice": Case(
        "train", ("train.json", "twice"),
        change=text("train.json", '{"a.png": ["red cube", "red cube"]}'),
    ),
    "train: null": Case("train", ("train.json",), change=text("train.json", "null")),
    "train: a number for names": Case(
        "train", ("train.json", "a.png"), change=text("train.json", '{"a.png": 7}')
    ),
    "train: missing pictures": Case(
        "train", ("1 of 1 pictures are missing", "a.png"),
        change=text("train.json", '{"a.png": ["red cube"]}'),
    ),
    "train: a lone surrogate": Case(
        "train", ("pictures are missing",),
        change=text("train.json", '{"\\ud800.png": ["red cube"]}'),
    ),
    "train: not there": Case(
        "train", ("train.json: not found", "render_iclevr.py"),
        change=lambda files: (files["data"] / "train.json").unlink(),
    ),
    "test: a dict": Case("test", ("test.json", "list"), change=text("test.json", "{}")),
    "test: a string for a list": Case(
        "test", ("test.json", "entry 0"), change=text("test.json", '["red cube"]')
    ),
    "test: no object": Case("test", ("test.json", "entry 0"), change=text("test.json", "[[]]")),
    "new_test: cut short": Case(
        "test", ("new_test.json", "JSON"), change=text("new_test.json", '[["red cube"')
    ),
    "new_test: nested": Case(
        "guidance_scale", ("new_test.json", "entry 0"), change=text("new_test.json", '[[["a"]]]')
    ),
    "no data there": Case(
        "train", ("nowhere: no such folder", "render_iclevr.py"), "--data_dir {out}/nowhere"
    ),
    "data: a file": Case("train", ("objects.json",), "--data_dir {ckpt}"),
    # --- pictures
    "picture: truncated": Case(
        "train", (NAME, "not a readable picture"),
        change=lambda files: picture((files["data"] / "iclevr" / NAME).read_bytes()[:200])(files),
    ),
    "conditions are read before pictures": Case(
        "train", ("test.json",),
        change=lambda files: (text("test.json", "[]")(files), picture(b"")(files)),
    ),
    "cache folder: below a file": Case(
        "train", ("another with --cache_dir",), "--cache_dir {ckpt}/cache"
    ),
    "output folder: below a file": Case(
        "test", ("another with --output_dir",), "--output_dir {ckpt}/out"
    ),
    "picture: empty": Case("train", (NAME,), change=picture(b"")),
    "picture: text": Case("train_evaluator", (NAME,), change=picture(b"no picture")),
    "picture: 16 bit": Case(
        "train", (NAME, "8-bit"), change=picture(Image.fromarray(np.zeros((9, 9), np.uint16)))
    ),
    "picture: CMYK": Case(
        "train", (NAME, "CMYK"), change=picture(Image.new("CMYK", (9, 9)), format="TIFF")
    ),
    "picture: animated": Case(
        "train", (NAME, "2 frame"),
        change=picture(
            gray(9, 9), format="GIF", save_all=True, append_images=[Image.new("L", (9, 9), 9)]
        ),
    ),
    "picture: float": Case(
        "train", (NAME, "mode F"), change=picture(Image.new("F", (9, 9)), format="TIFF")
    ),
    "picture: absurdly wide": Case("train", (NAME, "9000x1"), change=picture(gray(9000, 1))),
    "picture: gray with alpha": Case(
        "train", (NAME, "mode LA"), change=picture(Image.new("LA", (9, 9)))
    ),
    "picture: a folder": Case(
        "train", (NAME,),
        change=lambda files: (
            (files["data"] / "iclevr" / NAME).unlink(), (files["data"] / "iclevr" / NAME).mkdir()
        ),
    ),
    "no folder of pictures": Case(
        "train", ("12 of 12 pictures are missing",), "--image_dir {out}/nowhere"
    ),
    # --- checkpoints and evaluators
    "checkpoint: half": Case("test", ("model.pth", "damaged"), change=half("ckpt")),
    "checkpoint: empty": Case(
        "guidance_scale", ("model.pth",), change=lambda files: files["ckpt"].write_bytes(b"")
    ),
    "checkpoint: text": Case(
        "export", ("model.pth",), change=lambda files: files["ckpt"].write_text("weights")
    ),
    "checkpoint: a folder": Case("test", ("model.pth",), change=folder_for("ckpt")),
    "checkpoint: not there": Case(
        "test", ("nothing.pth: not found",), "--ckpt_path {out}/nothing.pth"
    ),
    "checkpoint: the evaluator": Case("test", ("judge.pth",), "--ckpt_path {judge}"),
    "checkpoint: would run code": Case(
        "test", ("model.pth", "would run code"),
        change=lambda files: torch.save({"format": Runs()}, files["ckpt"]),
    ),
    "checkpoint: a tensor": Case(
        "test", ("model.pth", "not a dict"),
        change=lambda files: torch.save(torch.zeros(3), files["ckpt"]),
    ),
    "checkpoint: another format": Case(
        "test", ("model.pth", "'x'"), change=checkpoint(lambda content: content.update(format="x"))
    ),
    "checkpoint: an entry is missing": Case(
        "test", ("model.pth", "has no ema"), change=checkpoint(lambda content: content.pop("ema"))
    ),
    "checkpoint: unknown setting": Case(
        "test", ("model.pth", "depth"),
        change=checkpoint(lambda content: content["config"].update(depth=3)),
    ),
    "checkpoint: another architecture": Case(
        "test", ("model.pth", "weights are not those"),
        change=checkpoint(lambda c: c["config"]["model"].update(layers_per_block=2)),
    ),
    "checkpoint: NaN setting": Case(
        "test", ("model.pth", "lr"),
        change=checkpoint(lambda content: content["config"].update(lr=float("nan"))),
    ),
    "checkpoint: objects are a number": Case(
        "export", ("model.pth", "dict of object name"),
        change=checkpoint(lambda content: content.update(objects=3)),
    ),
    "checkpoint: no objects": Case(
        "export", ("model.pth", "dict of object name"),
        change=checkpoint(lambda content: content.update(objects={})),
    ),
    "checkpoint: weights are a tensor": Case(
        "test", ("model.pth", "ema is a Tensor"),
        change=checkpoint(lambda content: content.update(ema=torch.zeros(3))),
    ),
    "checkpoint: a schedule without end": Case(
        "test", ("model.pth", "num_train_timesteps"),
        change=checkpoint(lambda c: c["config"]["noise"].update(num_train_timesteps=10**12)),
    ),
    "checkpoint: a network beyond all memory": Case(
        "test", ("model.pth", "weights are not those"),
        change=checkpoint(lambda c: c["config"]["model"].update(block_out_channels=(16384,) * 2)),
    ),
    "evaluator: half": Case("test", ("judge.pth", "damaged"), change=half("judge")),
    "evaluator: a checkpoint": Case(
        "test", ("model.pth", "weights are not those"), "--evaluator {ckpt}"
    ),
    "evaluator: a numpy file": Case(
        "test", ("judge.pth",), change=lambda f: np.save(f["judge"].open("wb"), np.zeros(3))
    ),
    "evaluator: not there": Case("test", ("nothing.pth: not found",), "--judge {out}/nothing.pth"),
    "start from nothing": Case(
        "train", ("nothing.pth: not found",), "--init_from {out}/nothing.pth"
    ),
    "resume from nothing": Case("train", ("--resume",), "--resume {out}/nowhere"),
    # --- flags
    "negative epochs": Case("train", ("--epochs", "-1"), "--epochs -1"),
    "no epochs": Case("train", ("--epochs", "0"), "--epochs 0"),
    "huge batch": Case("train", ("--batch_size",), "--batch_size 1e99"),
    "batch of half": Case("train", ("--batch_size", "0.5"), "--batch_size 0.5"),
    "lr NaN": Case("train", ("--lr", "nan"), "--lr nan"),
    "lr infinite": Case("train", ("--lr", "inf"), "--lr inf"),
    "lr a word": Case("train", ("--lr", "fast"), "--lr fast"),
    "seed too large": Case("train", ("--seed",), "--seed 99999999999"),
    "a chance above 1": Case("train", ("--cfg_dropout_prob", "1.5"), "--cfg_dropout_prob 1.5"),
    "unknown flag": Case("train", ("--epoch",), "--epoch 3"),
    "unknown recipe": Case("train", ("--recipe", "large"), "--recipe large"),
    "unknown device": Case("train", ("--device tpu",), "--device tpu"),
    "device not there": Case("test", ("--device cuda:99",), "--device cuda:99"),
    "run name leads out": Case("train", ("--run_name", "../x"), "--run_name ../x"),
    "run name with a Windows separator": Case("train", ("--run_name",), "--run_name a\\\\b"),
    "a size that can't be halved": Case(
        "train", ("sample_size 15", "halved"), "--image_size 15"
    ),
    "patches that do not fit": Case("train", ("--patch_size 3",), "--patch_size 3"),
    "groups that do not fit": Case("train", ("norm_num_groups 7",), "--norm_num_groups 7"),
    "blocks of different number": Case("train", ("block_out_channels",), "--block_out_channels 16"),
    "unknown block": Case("train", ("--down_block_types",), "--down_block_types Conv Conv"),
    "wrong number of classes": Case("train", ("--num_classes",), "--num_classes 10"),
    "preview of more steps than trained": Case("train", ("--preview_steps",), "--preview_steps 99"),
    "more steps than trained": Case(
        "test", ("--num_inference_steps 21",), "--num_inference_steps 21"
    ),
    "steps that don't divide": Case(
        "test", ("--num_inference_steps 7", "nearest"), "--scheduler ddim --num_inference_steps 7"
    ),
    "guidance NaN": Case("test", ("--guidance_scale", "nan"), "--guidance_scale nan"),
    "guidance huge": Case("test", ("--guidance_scale",), "--guidance_scale 1e6"),
    "interval backwards": Case("test", ("--guidance_interval",), "--guidance_interval 0.9 0.1"),
    "eta without ddim": Case("test", ("--eta",), "--eta 0.5"),
    "no seeds": Case("test", ("--num_seeds",), "--num_seeds 0"),
    "one picture for a distance": Case("test", ("--num_fd_samples",), "--num_fd_samples 1"),
    "prompt: unknown object": Case("test", ("--prompt", "red ball"), "--prompt 'red ball'"),
    "prompt: an object twice": Case("test", ("twice",), "--prompt 'red cube, red cube'"),
    "prompt: another case": Case("test", ("did you mean 'red cube'",), "--prompt 'Red cube'"),
    "prompt: empty": Case("test", ("--prompt",), "--prompt ''"),
    "prompt: a comma too many": Case("test", ("--prompt", "empty name"), "--prompt 'red cube,'"),
    "no scales": Case("guidance_scale", ("--scale_max",), "--scale_min 3 --scale_max 1"),
    "scales too fine": Case("guidance_scale", ("--scale_step",), "--scale_step 1e-9"),
    "scale of a word": Case("guidance_scale", ("--scale_min", "one"), "--scale_min one"),
    "export over a file": Case("export", ("is there already",), "--out {ckpt}"),
    "export of a folder": Case("export", ("is a folder",), "--ckpt_path {data}"),
    "export back from a file": Case("export", ("no folder",), "--to checkpoint"),
    "export under a bad name": Case("export", ("--run_name",), "--to half --run_name a/b"),
    "rendering over other data": Case(
        "render_iclevr", ("train.json", "not made"), "--out_dir {data}"
    ),
    "tiny rendering": Case("render_iclevr", ("--width", "1"), "--width 1"),
    "no sequences": Case("render_iclevr", ("--num_sequences",), "--num_sequences 0"),
    "output is a file": Case("test", ("model.pth", "can't be written"), "--output_dir {ckpt}"),
    "output under a file": Case("train", ("model.pth",), "--output_dir {ckpt}/deeper"),
}  # fmt: skip
AS_PROCESSES = (
    "objects: empty", "train: leads out", "picture: truncated", "checkpoint: half",
    "checkpoint: would run code", "lr NaN", "unknown flag", "prompt: unknown object",
    "export over a file", "tiny rendering",
)  # fmt: skip


@pytest.fixture
def files(trained, tmp_path):
    """Copies to damage, in a folder with a space and a letter outside ASCII."""
    root = tmp_path / "a folder \N{SNOWMAN}"
    shutil.copytree(trained[0], root / "data", ignore=shutil.ignore_patterns("*.pth", ".cache"))
    shutil.copy(trained[2], root / "model.pth")
    shutil.copy(trained[0] / "evaluator.pth", root / "judge.pth")
    (root / "out").mkdir()
    return {"data": root / "data", "ckpt": root / "model.pth", "judge": root / "judge.pth",
            "out": root / "out"}  # fmt: skip


def arguments(case: Case, files: dict[str, Path]) -> list[str]:
    return [a.format(**files) for a in shlex.split(f"{BASE[case.script]} {case.flags}")]


def tree(files: dict[str, Path]) -> dict[str, tuple[int, int]]:
    """Every file, its size and time; and every folder."""
    found = {}
    for path in files["data"].parent.rglob("*"):
        is_file = path.is_file()
        found[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns) if is_file else (0, 0)
    return found


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_changes_nothing(name, files, monkeypatch):
    monkeypatch.chdir(files["out"])  # where code from a file would leave its trace
    case = CASES[name]
    case.change(files)
    before = tree(files)
    message = error_of(SCRIPTS[case.script].main, arguments(case, files))
    for word in case.words:
        assert word in message
    assert tree(files) == before


@pytest.mark.parametrize("name", AS_PROCESSES)
def test_as_a_process_it_ends_with_code_2(name, files):
    case = CASES[name]
    case.change(files)
    before = tree(files)
    result = subprocess.run(
        [sys.executable, SRC / f"{case.script}.py", *arguments(case, files)],
        cwd=files["out"], capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert tree(files) == before


def test_the_base_commands_work(files):
    """What the cases break works unbroken: no case passes for a reason of the base."""
    train.main([*arguments(Case("train", ()), files), "--epochs", "1", "--batch_size", "4"])
    test.main(
        [*arguments(Case("test", ()), files), "--scheduler", "ddim", "--num_inference_steps", "5",
         "--num_fd_samples", "0"]
    )  # fmt: skip
    export.main(arguments(Case("export", ()), files))
    report = guidance_scale.main(
        [*arguments(Case("guidance_scale", ()), files), "--scale_max", "1", "--num_seeds", "1"]
    )
    assert json.dumps(report)
