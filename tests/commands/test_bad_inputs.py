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


def of_json(script: str, name: str, content: str | bytes, *words: str) -> Case:
    """A JSON file of the data with another content; the message names it."""
    content = content.encode() if isinstance(content, str) else content
    name += ".json"
    return Case(script, (name, *words), "", lambda f: (f["data"] / name).write_bytes(content))


def of_picture(image: Image.Image | bytes, *words: str, script="train", **how) -> Case:
    """A training picture replaced by another one, or by other bytes."""

    def change(files):
        path = files["data"] / "iclevr" / NAME
        if isinstance(image, Image.Image):
            image.save(path, **how)
        else:
            path.write_bytes(image)

    return Case(script, (NAME, *words), change=change)


def of_file(script: str, key: str, content: bytes | None, *words: str) -> Case:
    """The checkpoint or the judge with another content; None: the first half of its own."""

    def change(files):
        whole = files[key].read_bytes()
        files[key].write_bytes(whole[: len(whole) // 2] if content is None else content)

    return Case(script, (f"{'model' if key == 'ckpt' else key}.pth", *words), change=change)


def of_checkpoint(edit: Callable[[dict], object], *words: str, script: str = "test") -> Case:
    """The checkpoint, rewritten after `edit` has changed its content."""

    def change(files):
        content = torch.load(files["ckpt"], weights_only=True)
        edit(content)
        torch.save(content, files["ckpt"])

    return Case(script, ("model.pth", *words), change=change)


def with_folder(script: str, path: Callable[[dict[str, Path]], Path], *words: str) -> Case:
    """A folder where a file should be."""
    return Case(script, words, change=lambda files: (path(files).unlink(), path(files).mkdir()))


def spoil(path: Path) -> None:
    """A NaN among the weights of an evaluator."""
    content = torch.load(path, weights_only=True)
    content["model"]["fc.0.bias"][0] = torch.nan
    torch.save(content, path)


class Runs:
    """Unpickling it would run code."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


NAME = "CLEVR_train_000002_1.png"
CASES = {
    # --- JSON
    "objects: a list": of_json("train", "objects", "[]", "dict"),
    "objects: empty": of_json("train", "objects", ""),
    "objects: a gap": of_json("train", "objects", '{"a": 0, "b": 2}', "0 ... 1"),
    "objects: other ones": of_json("test", "objects", '{"red ball": 0}', "other objects"),
    "objects: a float": of_json("train", "objects", '{"a": 1.5}', "1.5"),
    "objects: text for an index": of_json("train", "objects", '{"a": "0"}', "not an integer"),
    "objects: true for an index": of_json("train", "objects", '{"a": true}', "not an integer"),
    "objects: huge nesting": of_json("train", "objects", "[" * 100000),
    "objects: a name that leads out": of_json("test", "objects", '{"../red": 0}', "'../red'"),
    "objects: not UTF-8": of_json("train", "objects", b"\xff{}"),
    "train: absolute name": of_json(
        "train", "train", '{"/etc/passwd": ["red cube"]}', "/etc/passwd"
    ),
    "train: leads out": of_json("train", "train", '{"../a.png": ["red cube"]}', "../a.png"),
    "train: Windows separator": of_json("train", "train", '{"..\\\\a.png": ["red cube"]}', "a.png"),
    "train: NUL in a name": of_json("train", "train", '{"a\\u0000.png": ["red cube"]}'),
    "train: unknown object": of_json("train", "train", '{"a.png": ["red ball"]}', "'red ball'"),
    "train: another case": of_json(
        "train", "train", '{"a.png": ["Red Cube"]}', "did you mean 'red cube'"
    ),
    "train: an object twice": of_json(
        "train", "train", '{"a.png": ["red cube", "red cube"]}', "twice"
    ),
    "train: a list": of_json("train", "train", "[]", "dict of file name"),
    "train: no names": of_json("train", "train", '{"a.png": []}', "entry 'a.png'"),
    "train: null": of_json("train", "train", "null"),
    "train: a number for names": of_json("train", "train", '{"a.png": 7}', "a.png"),
    "train: missing pictures": of_json("train", "train", '{"a.png": ["red cube"]}')._replace(
        words=("1 of 1 pictures are missing", "a.png")
    ),
    "train: a lone surrogate": of_json("train", "train", '{"\\ud800.png": ["red cube"]}')._replace(
        words=("pictures are missing",)
    ),
    "train: not there": Case(
        "train", ("train.json: not found", "render_iclevr.py"),
        change=lambda files: (files["data"] / "train.json").unlink(),
    ),
    "test: a dict": of_json("test", "test", "{}", "list"),
    "test: a string for a list": of_json("test", "test", '["red cube"]', "entry 0"),
    "test: no object": of_json("test", "test", "[[]]", "entry 0"),
    "test: a string in the second entry": of_json(
        "test", "test", '[["red cube"], "red cube"]', "entry 1"
    ),
    "new_test: cut short": of_json("test", "new_test", '[["red cube"', "JSON"),
    "new_test: nested": of_json("guidance_scale", "new_test", '[[["a"]]]', "entry 0"),
    "no data there": Case(
        "train", ("nowhere: no such folder", "render_iclevr.py"), "--data_dir {out}/nowhere"
    ),
    "data: a file": Case("train", ("objects.json",), "--data_dir {ckpt}"),
    # --- pictures
    "picture: truncated": Case(
        "train", (NAME, "not a readable picture", "run src/render_iclevr.py again"),
        change=lambda files: os.truncate(files["data"] / "iclevr" / NAME, 200),
    ),
    "conditions are read before pictures": Case(
        "train", ("test.json",),
        change=lambda files: (of_json("train", "test", "[]").change(files),
                              of_picture(b"").change(files)),
    ),
    "cache folder: below a file": Case(
        "train", ("another with --cache_dir",), "--cache_dir {ckpt}/cache"
    ),
    "output folder: below a file": Case(
        "test", ("another with --output_dir",), "--output_dir {ckpt}/out"
    ),
    "picture: empty": of_picture(b""),
    "picture: text": of_picture(b"no picture", script="train_evaluator"),
    "picture: 16 bit": of_picture(Image.fromarray(np.zeros((9, 9), np.uint16)), "8-bit"),
    "picture: CMYK": of_picture(Image.new("CMYK", (9, 9)), "CMYK", format="TIFF"),
    "picture: animated": of_picture(
        Image.new("L", (9, 9)), "2 frame", format="GIF", save_all=True,
        append_images=[Image.new("L", (9, 9), 9)],
    ),
    "picture: float": of_picture(Image.new("F", (9, 9)), "mode F", format="TIFF"),
    "picture: absurdly wide": of_picture(Image.new("L", (9000, 1)), "9000x1"),
    "picture: gray with alpha": of_picture(Image.new("LA", (9, 9)), "mode LA"),
    "picture: a folder": with_folder("train", lambda f: f["data"] / "iclevr" / NAME, NAME),
    "no folder of pictures": Case(
        "train", ("12 of 12 pictures are missing",), "--image_dir {out}/nowhere"
    ),
    # --- checkpoints and evaluators
    "checkpoint: half": of_file("test", "ckpt", None, "damaged"),
    "checkpoint: empty": of_file("guidance_scale", "ckpt", b""),
    "checkpoint: text": of_file("export", "ckpt", b"weights"),
    "checkpoint: a folder": with_folder("test", lambda files: files["ckpt"], "model.pth"),
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
    "checkpoint: another format": of_checkpoint(lambda c: c.update(format="x"), "'x'"),
    "checkpoint: an entry is missing": of_checkpoint(lambda c: c.pop("ema"), "has no ema"),
    "checkpoint: unknown setting": of_checkpoint(lambda c: c["config"].update(depth=3), "depth"),
    "checkpoint: another architecture": of_checkpoint(
        lambda c: c["config"]["model"].update(layers_per_block=2), "weights are not those"
    ),
    "checkpoint: NaN setting": of_checkpoint(lambda c: c["config"].update(lr=float("nan")), "lr"),
    "checkpoint: objects are a number": of_checkpoint(
        lambda c: c.update(objects=3), "dict of object name", script="export"
    ),
    "checkpoint: no objects": of_checkpoint(
        lambda c: c.update(objects={}), "dict of object name", script="export"
    ),
    "checkpoint: weights are a tensor": of_checkpoint(
        lambda c: c.update(ema=torch.zeros(3)), "ema is a Tensor"
    ),
    "checkpoint: a schedule without end": of_checkpoint(
        lambda c: c["config"]["noise"].update(num_train_timesteps=10**12), "num_train_timesteps"
    ),
    "checkpoint: a network beyond all memory": of_checkpoint(
        lambda c: c["config"]["model"].update(block_out_channels=(16384,) * 2),
        "weights are not those",
    ),
    "evaluator: half": of_file("test", "judge", None, "damaged"),
    "evaluator: a checkpoint": Case(
        "test", ("model.pth", "weights are not those"), "--evaluator {ckpt}"
    ),
    "evaluator: a numpy file": Case(
        "test", ("judge.pth",), change=lambda f: np.save(f["judge"].open("wb"), np.zeros(3))
    ),
    "evaluator: NaN": Case(
        "test", ("judge.pth: NaN or infinite weights",), "", lambda f: spoil(f["judge"])
    ),
    "Frechet distance without training pictures": Case(
        "test", ("--num_fd_samples 4", "--data_dir"), "--num_fd_samples 4",
        lambda f: (f["data"] / "train.json").unlink(),
    ),
    "evaluator: not there": Case("test", ("nothing.pth: not found",), "--judge {out}/nothing.pth"),
    "start from nothing": Case(
        "train", ("nothing.pth: not found",), "--init_from {out}/nothing.pth"
    ),
    "resume from nothing": Case("train", ("--resume",), "--resume {out}/nowhere"),
    "resume from an unset variable": Case("train", ("--resume ''",), "--resume="),
    # --- flags
    "endless epochs": Case("train", ("--epochs",), "--epochs 1000000000000000000000"),
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
    "run name of the results": Case("train", ("--run_name 'result'",), "--run_name result"),
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
    "no step taken again": Case("test", ("--resample", "0"), "--resample 0"),
    "steps taken again by a solver": Case(
        "test", ("--resample 2", "--scheduler ddpm"), "--resample 2 --scheduler unipc"
    ),
    "timesteps backwards": Case("train", ("--timestep_interval",), "--timestep_interval 1 0.5"),
    "resampling backwards": Case("test", ("--resample_interval",), "--resample_interval 1 0.5"),
    "the best of none": Case("guidance_scale", ("--best_of", "0"), "--best_of 0"),
    "no classifier": Case("train", ("teacher.pth: not found",), "--align_to {out}/teacher.pth"),
    "a classifier that is a network": Case(
        "train", ("model.pth",), "--align_to {ckpt}"
    ),
    "a negative weight": Case("train", ("--align_weight", "-1"), "--align_weight -1"),
    "embeddings of nothing": Case("train", ("--time_embedding_dim", "0"), "--time_embedding_dim 0"),
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
    "a judge without a name": Case("train_evaluator", ("--name", "of one line"), "--name ' '"),
    "a name of two lines": Case("train_evaluator", ("--name", "of one line"), "--name 'a\nb'"),
    "a flag that is half true": Case("train", ("--ema 'maybe'", "--ema False"), "--ema=maybe"),
    "export under a bad name": Case("export", ("--run_name",), "--to half --run_name a/b"),
    "rendering over other data": Case(
        "render_iclevr", ("train.json", "not made"), "--out_dir {data}"
    ),
    "rendering: settings that are a list": Case(
        "render_iclevr", ("render.json", "not a dict"), "--out_dir {data}",
        lambda files: (files["data"] / "render.json").write_text("[]"),
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
