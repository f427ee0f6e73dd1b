"""Systems unlike the one that we have: Windows imitated, files without locks and fsync."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from conftest import error_of, train_argv
from PIL import Image
from windows import windows  # noqa: F401

import export
import guidance_scale
import render_iclevr
import test
import train
from iclevr import standin
from iclevr.dataset import IclevrDataset, get_dataloader
from network.checkpoint import load_checkpoint
from runtime import files
from runtime.command_line import as_typed
from runtime.files import UNSUPPORTED, atomic_write, lock_folder, write_json
from runtime.settings import UserError
from training.run_folder import own_folder


@pytest.mark.usefixtures("windows")
def test_the_imitation_of_windows_refuses_what_windows_does(tmp_path):
    path = tmp_path / "a"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(9,))
    images = np.load(path, mmap_mode="r")
    with pytest.raises(PermissionError):
        os.replace(path, tmp_path / "b")
    with pytest.raises(PermissionError):
        path.unlink()
    del images
    with open(path, "rb") as file, pytest.raises(OSError):
        os.fsync(file.fileno())
    with pytest.raises(UnicodeEncodeError):
        path.write_text("实验")
    with pytest.raises(OSError):
        (tmp_path / "a:b").write_bytes(b"")
    path.unlink()


@pytest.mark.usefixtures("windows")
def test_all_scripts_under_windows_rules(world, tmp_path):
    argv = train_argv(world, tmp_path, "--epochs", 2, "--sample_interval", 2, "--save_interval", 1,
                      "--keep_best", "--keep_last", 1)  # fmt: skip
    argv[argv.index("--run_name") + 1] = "实验"
    checkpoint = train.main(argv)
    assert checkpoint.parent.parent.name == "实验"
    argv = ["--ckpt_path", checkpoint, "--data_dir", world, "--output_dir", tmp_path / "result",
            "--device", "cpu", "--wandb", "disabled", "--num_inference_steps", 5]  # fmt: skip
    flags = [str(flag) for flag in argv]
    test.main([*flags, "--num_fd_samples", "4"])
    guidance_scale.main([*flags, "--scale_max", "1", "--num_seeds", "1", "--scheduler", "ddpm"])
    (sweep,) = tmp_path.rglob("sweep.csv")
    assert "实验" in sweep.read_text(encoding="utf-8")
    export.main(["--ckpt_path", str(checkpoint), "--out", str(tmp_path / "folder")])
    train.main(["--resume", str(tmp_path / "实验"), "--epochs", "3"])
    standin.write_labels(tmp_path / "rendered", 0, 2)
    config = render_iclevr.RenderConfig(out_dir=tmp_path, width=32, height=32, samples=1)
    assert render_iclevr._work((config, 0, [0])) == 1


@pytest.mark.usefixtures("windows")
def test_a_cache_in_use_stays_and_another_is_made(world, tmp_path):
    first = IclevrDataset(world, world / "iclevr", "train", 8)
    Image.new("RGB", (20, 15), "red").save(world / "iclevr" / first.names[5])
    second = IclevrDataset(world, world / "iclevr", "train", 8)
    assert second.cache != first.cache and first.cache.exists()
    assert (second.images[5][0] == 255).all()


@pytest.mark.usefixtures("windows")
def test_a_cache_that_another_process_was_faster_to_make_is_taken(world, monkeypatch):
    first = IclevrDataset(world, world / "iclevr", "train", 8)
    other, moved = first.cache.with_name("moved"), []
    images, path = np.array(first.images), first.cache
    del first
    os.replace(path, other)
    from iclevr import image_cache

    real = image_cache._decode_all

    def decode_while_another_does(*args):
        real(*args)
        os.replace(other, path)
        moved.append(np.load(path, mmap_mode="r"))

    monkeypatch.setattr(image_cache, "_decode_all", decode_while_another_does)
    assert np.array_equal(IclevrDataset(world, world / "iclevr", "train", 8).images, images)


@pytest.mark.usefixtures("windows")
def test_spawned_workers_load_the_same_batches(world):
    batches = [
        next(iter(get_dataloader(world, world / "iclevr", "train", 4, workers, image_size=8)))
        for workers in (0, 1)
    ]
    assert all(map(torch.equal, *batches))


def test_a_prompts_file_has_a_name_that_windows_allows(trained, tmp_path):
    data, _, checkpoint = trained
    objects = {f"{name}: ?" if i == 0 else name: i
               for i, name in enumerate(load_checkpoint(checkpoint).objects)}  # fmt: skip
    from dataclasses import replace

    from network.checkpoint import save_checkpoint

    strange = tmp_path / "model.pth"
    save_checkpoint(strange, replace(load_checkpoint(checkpoint), objects=objects))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "objects.json").write_text(json.dumps(objects))
    for split in ("test", "new_test"):
        (folder / f"{split}.json").write_text(json.dumps([[next(iter(objects))]]))
    judge = torch.load(data / "evaluator.pth")
    torch.save(judge | {"objects": objects}, folder / "evaluator.pth")
    path = test.main(
        ["--ckpt_path", str(strange), "--data_dir", str(folder), "--output_dir", str(tmp_path),
         "--device", "cpu", "--num_inference_steps", "5", "--prompt", next(iter(objects))]
    )  # fmt: skip
    assert path.exists() and not set(path.name) & set('<>:"|?*')


def test_commands_are_quoted_for_the_shell_of_the_system(monkeypatch):
    words = ["--ckpt_path", "a folder/it's", 3]
    assert as_typed(words) == """--ckpt_path 'a folder/it'"'"'s' 3"""
    monkeypatch.setattr("runtime.command_line.os.name", "nt")
    line = as_typed(words)
    monkeypatch.undo()
    assert line == """--ckpt_path "a folder/it's" 3"""


def test_a_scanner_of_viruses_delays_a_file_only(tmp_path, monkeypatch):
    real, refusals = os.replace, iter([PermissionError(13, "in use")] * 2)

    def replace(*paths):
        for refusal in refusals:
            raise refusal
        real(*paths)

    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / ".tmp-a").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        files._replace(tmp_path / ".tmp-a", tmp_path / "a")
    assert (tmp_path / "a").exists()


@pytest.mark.parametrize("number", sorted(UNSUPPORTED))
def test_a_file_system_without_fsync_gets_its_files(tmp_path, monkeypatch, number):
    def fsync(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", 1)
    number = errno.EIO  # but what the disk has lost is told
    with pytest.raises(UserError, match="Input/output error"), atomic_write(tmp_path / "b") as path:
        path.touch()


def refuse_locks(monkeypatch, error: BaseException) -> None:
    def acquire(self, *_, **__):
        raise error

    monkeypatch.setattr(files.FileLock, "acquire", acquire)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys, number):
    """NFS, Lustre, FUSE."""
    refuse_locks(monkeypatch, OSError(number, os.strerror(number)))
    with own_folder(tmp_path, None):
        pass
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {tmp_path}: can't be locked here")
    assert "see to it that no other process works in it" in warning and warning.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="flock is Unix's")
def test_a_lock_file_that_came_along_locks_nothing(tmp_path, monkeypatch, capsys):
    """A run's folder, copied to a file system without locks: filelock itself would wait for it."""
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with own_folder(tmp_path, None):
            pass
    warning = f"warning: {tmp_path}: can't be locked here (Function not implemented); "
    assert capsys.readouterr().err.count(warning) == 2


def test_a_lock_of_another_user_ends_in_one_line(tmp_path, monkeypatch):
    refuse_locks(monkeypatch, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(UserError) as caught:
        lock_folder(tmp_path, "choose another --run_name")
    words = f"{tmp_path / '.lock'}: can't be locked: Permission denied; choose another --run_name"
    assert str(caught.value) == words
    message = error_of(render_iclevr.main, ["--out_dir", tmp_path, "--num_sequences", 1])
    assert message.endswith("choose another --out_dir")
    refuse_locks(monkeypatch, OSError("no number"))  # as some file systems in user space answer
    with pytest.raises(UserError, match="can't be locked: no number; "):
        lock_folder(tmp_path, "choose another --run_name")


def test_the_owner_of_a_lock_need_not_be_readable(tmp_path):
    lock = lock_folder(tmp_path, "")
    (tmp_path / ".lock-owner").write_bytes(b"\xff")
    with pytest.raises(UserError, match="another process works here; wait"):
        lock_folder(tmp_path, "wait")
    lock.release()
