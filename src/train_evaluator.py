"""Train the judge: a ResNet18 like the course's, on the pictures of train.json.

    python src/train_evaluator.py

Writes evaluator.pth beside the data, in the course's format (key "model"), with the threshold
from which an object counts as detected, and its figures on held-out sequences: half of these set
the threshold, the other half give the figures. It is trained on pictures that were disturbed, so
that it judges objects, not pixels.

Stopped (Ctrl-C, a scheduler's signal) or killed, it goes on by the same command, from
evaluator.unfinished.pth beside that file, written every ten minutes and when stopped.
"""

from dataclasses import replace
from pathlib import Path

from iclevr.dataset import IclevrDataset, find_data
from judging.evaluator import IMAGE_SIZE, Evaluation, Evaluator, git_blob_hash, load_evaluator
from judging.intervals import Interval
from network.checkpoint import save_tensors
from runtime.device import pick_device, warn_of_launcher
from runtime.files import make_folder
from runtime.settings import DataConfig, UserError, parse_args, run
from training.classifier import (
    EvaluatorConfig,
    calibrate_and_test,
    fit,
    judge_pasted,
    shares,
    split_by_sequence,
)
from training.pasting import CutOuts


def judge_name(config: EvaluatorConfig, data_dir: Path) -> str:
    """What outputs call the judge: --name, else by what it was trained on."""
    if config.name:
        return config.name
    rendered = (data_dir / "render.json").exists()
    name = "stand-in" if rendered else f"trained on {data_dir.name}"
    return f"{name}, seed {config.seed}" if config.seed else name


def main(argv: list[str] | None = None) -> dict:
    """Train the judge; returns what its file says of it."""
    config = parse_args(EvaluatorConfig, argv)
    paths = find_data(config.data)
    out = config.out or paths.data_dir / "evaluator.pth"
    if out.is_dir():
        raise UserError(f"{out}: is a folder; name a file with --out")
    if out.exists() and not config.overwrite:
        raise UserError(f"{out}: is there already; --overwrite replaces it, --out names another")
    device = pick_device(config.device)
    warn_of_launcher(config.mixed_precision)
    dataset = IclevrDataset(
        paths.data_dir, paths.image_dir, "train", IMAGE_SIZE, paths.cache_dir, paths.follow_links
    )
    train, held_out = split_by_sequence(dataset.names, config.held_out)
    if not train:
        raise UserError(
            f"--held_out {config.held_out:g}: leaves no sequence of "
            f"{paths.data_dir / 'train.json'} to train on"
        )
    if config.init_from:
        load_evaluator(config.init_from, dataset.objects)  # what fails should fail before that
    cut_outs = CutOuts(dataset, held_out) if config.paste else None
    make_folder(out.parent, "--out")

    unfinished = out.with_name(f"{out.stem}.unfinished.pth")
    alike = replace(config, name=None, out=None, overwrite=False, data=DataConfig())
    model = fit(alike, dataset, train, device, unfinished)
    # Half precision halves the file; the figures below are those of the rounded weights.
    weights = {
        key: value.cpu().half() if value.ndim > 1 else value.cpu()
        for key, value in model.state_dict().items()
    }
    if not all(weight.isfinite().all() for weight in weights.values()):
        unfinished.unlink(missing_ok=True)
        raise UserError(f"--lr {config.lr:g}: the training has diverged; use a lower one")
    model.load_state_dict(weights)
    judge = Evaluator(model, judge_name(config, paths.data_dir), out, dataset.objects)
    judge, found = calibrate_and_test(judge, dataset, held_out)
    counts = judge_pasted(judge, dataset, held_out, cut_outs, config.seed) if cut_outs else {}
    settings = ("epochs", "batch_size", "lr", "weight_decay", "paste", "held_out", "seed")
    info = {
        "train_pictures": len(train),
        **report(judge, found, counts),
        "settings": {key: getattr(config, key) for key in settings},
        "init_from": git_blob_hash(config.init_from) if config.init_from else None,
    }
    content = {"model": weights, "name": judge.name, "objects": dataset.objects}
    save_tensors(out, content | {"threshold": judge.threshold, "info": info})
    unfinished.unlink(missing_ok=True)
    return info


def report(judge: Evaluator, found: Evaluation, counts: dict[str, Interval]) -> dict:
    """Print what the judge finds in held-out pictures; returns it as its file has it.

    Args:
        counts: of `judge_pasted`.
    """
    accuracy, exact = shares(found, found.total >= 0)
    print(
        f"{judge.path}: judge {judge.name}, threshold {judge.threshold:.3f}\n"
        f"on {len(found.total)} held-out pictures: accuracy {accuracy}, exact sets {exact}"
    )
    by_number = {n: shares(found, found.total == n) for n in found.total.unique().tolist() if n}
    for n, (a, e) in by_number.items():
        print(f"  with {n} object{'s' * (n > 1)}: accuracy {a}, exact sets {e}")
    for name, exact_sets in counts.items():
        print(f"  {name.replace('_', ' ')}: {exact_sets}")
    return {
        **{name: vars(exact_sets) for name, exact_sets in counts.items()},
        "held_out_pictures": len(found.total),
        "held_out_accuracy": vars(accuracy),
        "held_out_exact_sets": vars(exact),
        "held_out_by_number": {
            n: {"accuracy": vars(a), "exact_sets": vars(e)} for n, (a, e) in by_number.items()
        },
    }


if __name__ == "__main__":
    run(main)
