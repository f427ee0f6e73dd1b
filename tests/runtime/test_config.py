"""Flags, settings in files, atomic writes, intervals and devices."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SRC
from scipy import stats

from judging.intervals import accuracy_interval, mean_interval, proportion_interval
from runtime.command_line import _first_paragraph
from runtime.device import autocast_dtype, pick_device, warn_of_launcher
from runtime.files import atomic_write, check_folder, read_json, write_json
from runtime.settings import (
    ModelConfig,
    TrainConfig,
    UserError,
    from_dict,
    parse_args,
    run,
    to_dict,
)


def test_flags_of_nested_settings():
    config = parse_args(
        TrainConfig, ["--epochs", "3", "--norm_num_groups", "8", "--no_ema", "--prediction_type",
                      "v_prediction", "--block_out_channels", "8", "16"],
    )  # fmt: skip
    assert (config.epochs, config.model.norm_num_groups, config.ema) == (3, 8, False)
    assert config.noise.prediction_type == "v_prediction"
    assert config.model.block_out_channels == (8, 16)
    default = parse_args(TrainConfig, [])
    assert default == TrainConfig() and default.model == ModelConfig()


@pytest.mark.parametrize(
    ("flags", "ema", "compiled"),
    [
        ("--ema=False --compile=True", False, True),
        ("--ema false --compile true", False, True),
        ("--ema=0 --compile 1 --epochs 3", False, True),
        ("--no_ema=True --no-compile=False", False, True),
        ("--ema --no-compile", True, False),
        ("--no-ema --compile", False, True),
        ("--compile --ema", True, True),
    ],
)
def test_flags_that_are_true_or_false_as_a_sweep_writes_them(flags, ema, compiled):
    config = parse_args(TrainConfig, flags.split())
    assert (config.ema, config.compile) == (ema, compiled)
    assert parse_args(TrainConfig, ["--lr-warmup-steps=4", "--data-dir", "1"]).lr_warmup_steps == 4


def test_flags_default_to_given_settings():
    stored = TrainConfig(epochs=7, lr=0.5)
    config = parse_args(TrainConfig, ["--lr", "0.25"], default=stored)
    assert (config.epochs, config.lr) == (7, 0.25)


def test_defaults_are_the_originals():
    c = TrainConfig()
    assert (c.epochs, c.batch_size, c.lr, c.lr_warmup_steps, c.cfg_dropout_prob) == (
        500, 64, 1e-4, 500, 0.1,
    )  # fmt: skip
    assert (c.noise.beta_schedule, c.noise.num_train_timesteps) == ("squaredcos_cap_v2", 500)
    assert c.noise.prediction_type == "epsilon" and c.run_name == "ddpm-cfg-v1"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 0", "--epochs 0: .*greater than or equal to 1"),
        ("--epochs x", "--epochs"),
        ("--epoch 3", r"--epoch.*did you mean --epochs\?"),
        ("--lr nan", "--lr nan"),
        ("--lr inf", "--lr inf"),
        ("--lr -1", "--lr -1"),
        ("--cfg_dropout_prob 1.5", "--cfg_dropout_prob 1.5"),
        ("--block_out_channels 64 0", "--block_out_channels 0"),
        ("--down_block_types Foo", "Foo"),
        ("--run_name ../x", "--run_name"),
        ("--seed -1", "--seed -1"),
        ("--resume", "--resume"),
        ("--ema_decay 1", "--ema_decay"),
        ("--mixed_precision fp8", "fp8"),
    ],
)
def test_bad_flags_end_in_one_line(flags, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_args(TrainConfig, flags.split())
    assert "\n" not in str(caught.value)


def test_settings_survive_a_file(tmp_path):
    config = TrainConfig(epochs=3, model=ModelConfig(block_out_channels=(8, 16)))
    write_json(tmp_path / "c.json", to_dict(config))
    assert from_dict(TrainConfig, read_json(tmp_path / "c.json"), "c.json") == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nonsense": 1}, "c.json: nonsense 1: unexpected"),
        ({"epochs": -1}, "c.json: epochs -1"),
        ({"model": {"norm_num_groups": "x"}}, "c.json: model.norm_num_groups 'x'"),
        ({"model": {"widths": 3}}, "c.json: model.widths 3"),
    ],
)
def test_bad_settings_in_a_file_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        from_dict(TrainConfig, to_dict(TrainConfig()) | change, "c.json")


@pytest.mark.parametrize(
    "command",
    [
        "train.py --epochs 0",
        "test.py --ckpt_path nowhere.pth",
        "test.py --ckpt_path",
        "demo.py --quick --pretrained",
        "guidance_scale.py --ckpt_path nowhere.pth",
        "train_evaluator.py --data_dir nowhere",
        "render_iclevr.py --width 1",
        "demo.py --quik",
    ],
)
def test_scripts_end_with_code_2_and_one_line(command, tmp_path):
    script, *flags = command.split()
    result = subprocess.run(
        [sys.executable, SRC / script, *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_ctrl_c_says_how_to_go_on(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run(main, if_stopped="stopped; the same command goes on from here")
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == 1 and os.listdir(tmp_path) == ["a.json"]
    with open(path) as reader:  # whoever reads the old file keeps it whole
        write_json(path, 2)
        assert reader.read() == "1\n" and read_json(path) == 2


def test_a_file_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    """Else a power failure could leave the new name with nothing behind it."""
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*args, real=real, name=name):
            order.append((name, (tmp_path / "a.json").exists()))
            return real(*args)

        monkeypatch.setattr(os, name, noted)
    write_json(tmp_path / "a.json", {"a": 1})
    assert order == [("fsync", False), ("replace", False)]


def test_a_folder_is_checked_without_being_left_behind(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    for path in (tmp_path / "a" / "b", tmp_path / "old" / "c", tmp_path / "old"):
        check_folder(path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["old", "old/file"]
    with pytest.raises(UserError, match="can't be written to"):
        check_folder(tmp_path / "old" / "file" / "c")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_json_as_other_tools_write_it(tmp_path, encoding):
    """Windows' editors begin with a byte-order mark, PowerShell writes UTF-16."""
    path = tmp_path / "a.json"
    path.write_bytes('{"r\u00f6t": 1}\r\n'.encode(encoding))
    assert read_json(path) == {"r\u00f6t": 1}
    path.write_bytes('{"r\u00f6t": 1,}'.encode(encoding))
    with pytest.raises(UserError, match="a.json: not valid JSON .*; mend the file, or do that"):
        read_json(path, "do that")


def test_an_error_leaves_no_new_folder(tmp_path):
    with pytest.raises(UserError, match="too long"):
        write_json(tmp_path / "new" / ("x" * 300) / "a.json", 1)
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "new" / "b" / "a.json"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be written"):
        write_json(tmp_path / "file" / "a.json", 1)


def test_wilson_equals_the_formula():
    """Wilson 1927, as written out on paper."""
    for k, n in ((0, 72), (61, 72), (84, 84)):
        z, p = stats.norm.ppf(0.975), k / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        i = proportion_interval(k, n)
        assert i.mean == p and i.low == pytest.approx(centre - half, abs=1e-9)
        assert i.high == pytest.approx(centre + half, abs=1e-9)


def test_t_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        i = mean_interval(rng.normal(3, 2, size=4))
        hits += i.low <= 3 <= i.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)
    values = [0.8, 0.9, 0.85]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert mean_interval(values).low == pytest.approx(low)
    assert accuracy_interval([50, 51], 100) == mean_interval([0.50, 0.51])
    assert accuracy_interval([8], 10) == proportion_interval(8, 10)
    # Draws that happen to be equal are no proof of certainty; nothing leaves [0, 1].
    assert accuracy_interval([8, 8], 10) == proportion_interval(16, 20)
    assert accuracy_interval([10, 9], 10).high == 1.0


def test_error_box_without_box_characters():
    assert _first_paragraph("Error parsing --epochs:\n x") == "Error parsing --epochs: x"


def test_devices():
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cuda", "mps", "cpu")
    for name in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(UserError, match=f"--device {name}"):
            pick_device(name)
    cpu = torch.device("cpu")
    assert autocast_dtype("no", cpu) is None and autocast_dtype("bf16", cpu) == torch.bfloat16


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"cpu_name": "AMD Zen4", "avx512_bf16": True}, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, None),  # slower than float32
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ({}, None),
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster(has, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert autocast_dtype("auto", torch.device("cpu")) is expected


@pytest.mark.parametrize(("told", "said"), [("fp16", True), ("fp8", True), ("no", False),
                                            ("bf16", False), (None, False)])  # fmt: skip
def test_a_number_format_told_to_the_launcher_is_not_ignored_in_silence(
    told, said, monkeypatch, capsys
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if told:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    warn_of_launcher("bf16")
    assert (f"warning: --mixed_precision {told} of accelerate" in capsys.readouterr().err) is said


PAGE_FAULTS = """
import resource, sys
import torch
from runtime import device
if sys.argv[1] == "keep":
    device.pick_device("cpu")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(10 * 2**20)  # 40 MiB, 10,240 pages: above what glibc may keep by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's mallopt")
def test_freed_memory_is_kept_on_a_cpu():
    faults = {}
    for how in ("keep", "leave"):
        command = [sys.executable, "-c", PAGE_FAULTS, how]
        env = os.environ | {"PYTHONPATH": str(SRC)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert 10 * faults["keep"] < faults["leave"]
