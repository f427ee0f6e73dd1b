"""Score pictures on disk: how a judge sees pictures that it was not made from.

    python benchmarks/reality_gap.py --pictures DIR --conditions DIR [--evaluator FILE ...]

DIR of the pictures holds test/0.png ... and new_test/0.png ..., as src/test.py writes them to
images/; DIR of the conditions objects.json, test.json and new_test.json. Prints a table, and
writes benchmarks/reality_gap.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import common  # noqa: F401, puts src/ on the path

from iclevr.dataset import SHIPPED_EVALUATOR, SPLITS, normalize, read_conditions, read_objects
from iclevr.image_cache import read_image
from judging.evaluator import IMAGE_SIZE, evaluate, load_evaluator
from judging.metrics import record, summarise, table
from runtime.files import write_json
from runtime.settings import run, to_dict


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--conditions", type=Path, required=True)
    parser.add_argument("--evaluator", type=Path, nargs="+", default=[SHIPPED_EVALUATOR])
    config = parser.parse_args(argv)
    objects = read_objects(config.conditions)
    report = {}
    for path in config.evaluator:
        judge = load_evaluator(path, objects)
        figures = {}
        for split in SPLITS:
            _, labels = read_conditions(config.conditions, split, objects)
            folder = config.pictures / split
            images = [read_image(folder / f"{i}.png", IMAGE_SIZE) for i in range(len(labels))]
            images = normalize(torch.stack([torch.tensor(image) for image in images]))
            figures[split] = summarise([record(evaluate(judge, images, labels))])
        print(f"judge: {judge.name}, threshold {judge.threshold:.3f}, {path}\n{table(figures)}\n")
        report[str(path)] = to_dict(figures)
    write_json(Path(__file__).with_suffix(".json"), report)


if __name__ == "__main__":
    run(main)
