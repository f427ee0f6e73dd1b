"""Checkpoints explain themselves, and are whole or absent."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from network.checkpoint import load_checkpoint, load_model, save_checkpoint
from runtime.settings import UserError


def test_checkpoint_explains_itself(trained):
    _, _, path = trained
    content = torch.load(path, weights_only=True)
    assert content["config"]["noise"]["num_train_timesteps"] == 20
    checkpoint = load_checkpoint(path)
    assert checkpoint.epoch == 4 and checkpoint.step == 12 and checkpoint.objects["red cube"] == 1
    model = load_model(checkpoint, path, torch.device("cpu"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint.ema[name])
    assert any(not torch.equal(checkpoint.ema[n], v) for n, v in checkpoint.model.items())


def test_a_checkpoint_that_comes_out_damaged_leaves_the_old_one(trained, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(trained[2])
    path = tmp_path / "model.pth"
    save_checkpoint(path, checkpoint)
    real = torch.save

    def flip_a_bit(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def cut_short(path):
        path.write_bytes(path.read_bytes()[:-100])

    for harm in (flip_a_bit, cut_short):

        def failing_disk(content, file, harm=harm):
            real(content, file)
            file.flush()
            harm(Path(file.name))

        monkeypatch.setattr(torch, "save", failing_disk)
        with pytest.raises(UserError, match="came out damaged; check the disk"):
            save_checkpoint(path, replace(checkpoint, step=99))
    assert load_checkpoint(path).step == checkpoint.step
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
