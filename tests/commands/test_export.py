"""A network given to diffusers, and taken back, draws the same."""

import re
from dataclasses import replace

import diffusers
import pytest
import torch
from conftest import error_of
from safetensors.torch import load_file

import export
import train
from diffusion.sampling import sample
from network.checkpoint import load_checkpoint, load_model, save_checkpoint
from network.model import DiffusionModel
from runtime.seeds import picture_seeds
from runtime.settings import SamplingConfig, TrainConfig


@pytest.fixture(params=[(1, 0.0), (2, -4.0)])
def patched(request, trained, tmp_path):
    """A network on patches of 1 and 2 pixels, the second with other embeddings and schedule.

    Path of its checkpoint, model, and its folder for diffusers.
    """
    torch.manual_seed(0)
    patch, shift = request.param
    checkpoint = load_checkpoint(trained[2])
    config = replace(checkpoint.config.model, patch_size=patch)
    config = replace(config, time_embedding_dim=72) if shift else config
    weights = DiffusionModel(config).state_dict()
    noise = replace(checkpoint.config.noise, log_snr_shift=shift)
    other = trained[1].parent / "other.pth"
    config = replace(checkpoint.config, model=config, noise=noise, init_from=other, align_to=other)
    path = tmp_path / "model_epoch_1.pth"
    save_checkpoint(path, replace(checkpoint, config=config, model=weights, ema=weights))
    out = export.main(["--ckpt_path", str(path), "--out", str(tmp_path / "folder")])
    return path, load_model(load_checkpoint(path), path, torch.device("cpu")), out


def test_diffusers_gives_the_same(patched):
    _, model, folder = patched
    for path in folder.rglob("*"):  # for all who may read the folder
        assert path.stat().st_mode & 0o444 == 0o444
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()
    mlp = load_file(folder / "class_embedding.safetensors")
    x, labels, t = torch.randn(3, 3, 16, 16), torch.eye(24)[:3], torch.tensor([0, 7, 19])
    h = torch.nn.functional.silu(labels @ mlp["0.weight"].T + mlp["0.bias"])
    embedding = h @ mlp["2.weight"].T + mlp["2.bias"]
    patch = model.patch_size
    with torch.no_grad():
        theirs = unet(torch.nn.functional.pixel_unshuffle(x, patch), t, embedding).sample
        theirs = torch.nn.functional.pixel_shuffle(theirs, patch)
        torch.testing.assert_close(theirs, model(x, t, labels), atol=1e-5, rtol=1e-5)


def test_model_card_draws_what_sample_draws(patched, monkeypatch):
    """The code of the card is run as it stands, from our picture's noise."""
    path, model, folder = patched
    card = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    monkeypatch.chdir(folder)
    seeds = picture_seeds(0, 1)
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seeds[0]))
    noise = torch.nn.functional.pixel_unshuffle(noise, model.patch_size)
    code = re.sub(r"x = torch.randn\(.*\)", "x = noise", code)
    names = {"noise": noise}
    exec(code, names)
    config = SamplingConfig(scheduler="ddim", mixed_precision="no")
    schedule = load_checkpoint(path).config.noise
    ours, _ = sample(model, schedule, names["labels"], seeds, config, progress=False)
    torch.testing.assert_close(names["image"], ours, atol=1e-4, rtol=1e-4)


def test_and_back(patched, tmp_path):
    path, model, folder = patched
    back = export.main(
        ["--to", "checkpoint", "--ckpt_path", str(folder), "--out", str(tmp_path / "back.pth")]
    )
    checkpoint = load_checkpoint(back)
    assert checkpoint.objects == load_checkpoint(path).objects
    again = load_model(checkpoint, back, torch.device("cpu"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # It can be sampled from, but not trained further.
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    back.rename(run / "model_epoch_1.pth")
    assert "without the optimiser's state" in error_of(
        train.main, ["--resume", str(run / "model_epoch_1.pth")]
    )


def test_half_is_small_and_draws_the_same(trained, patched, tmp_path):
    path, model, folder = patched
    half = export.main(
        ["--to", "half", "--ckpt_path", str(path), "--out", str(tmp_path / "half.pth"),
         "--run_name", "other"]
    )  # fmt: skip
    assert half.stat().st_size < 0.35 * path.stat().st_size  # that one holds the weights twice
    here = str(trained[1].parent)  # no path of this machine goes out
    assert here in str(load_checkpoint(path).config)
    assert here.encode() not in half.read_bytes()
    assert here not in (folder / "settings.json").read_text()
    checkpoint = load_checkpoint(half)
    assert checkpoint.config.run_name == "other" and checkpoint.config.ema
    assert all(value.dtype == torch.float16 for value in checkpoint.model.values())
    again = load_model(checkpoint, half, torch.device("cpu"))
    config = SamplingConfig(scheduler="ddim", num_inference_steps=5, mixed_precision="no")
    first, second = (
        sample(m, checkpoint.config.noise, torch.eye(24)[:2], [0, 1], config, progress=False)[0]
        for m in (model, again)
    )
    torch.testing.assert_close(first, second, atol=0.02, rtol=0)
    assert next(again.parameters()).dtype == torch.float32

    loaded = load_checkpoint(path)
    loaded.ema["unet.conv_in.bias"][0] = 1e6
    save_checkpoint(tmp_path / "large.pth", loaded)
    argv = ["--to", "half", "--ckpt_path", tmp_path / "large.pth", "--out", tmp_path / "no.pth"]
    assert "unet.conv_in.bias does not fit into float16" in error_of(export.main, argv)


def test_what_cannot_be_exported_is_refused(patched, tmp_path):
    path, _, folder = patched
    argv = ["--ckpt_path", path, "--out", folder]
    assert "is there already" in error_of(export.main, argv)
    assert "is a folder" in error_of(export.main, ["--ckpt_path", folder])
    assert "no folder" in error_of(export.main, ["--ckpt_path", path, "--to", "checkpoint"])

    checkpoint = load_checkpoint(path)
    model = replace(checkpoint.config.model, halve_every_block=True)
    config: TrainConfig = replace(checkpoint.config, model=model)
    save_checkpoint(tmp_path / "halved.pth", replace(checkpoint, config=config))
    argv = ["--ckpt_path", tmp_path / "halved.pth", "--out", tmp_path / "new"]
    assert "--halve_every_block" in error_of(export.main, argv)

    back = ["--to", "checkpoint", "--ckpt_path", folder, "--out", tmp_path / "b.pth"]
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        weights.write_bytes(content)
        assert "safetensors: can't be read" in error_of(export.main, back)
    weights.unlink()
    assert "safetensors: can't be read" in error_of(export.main, back)
    for text in ("[]", "{}", "3", '{"config": {}, "objects": {}, "epoch": 1}'):
        (folder / "settings.json").write_text(text)
        assert "settings.json: has no" in error_of(export.main, back)
    assert not (tmp_path / "b.pth").exists() and not (tmp_path / "new").exists()
    assert not [*tmp_path.glob(".tmp-*")]
