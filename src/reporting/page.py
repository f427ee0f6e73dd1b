"""The page: findings put into the template, in a language."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from judging.figures import confusion_chart
from judging.metrics import COUNTS
from judging.sweep import sweep_chart
from reporting.findings import Run, commands, training
from reporting.pictures import grid_uri, picture_uri, svg, tests_chart, training_chart
from reporting.results import Sweep, Test, find_sweeps, find_tests
from runtime.files import read_json

TEMPLATE = Path(__file__).with_name("report.html.jinja")
COMPARED = 8
"""Pictures of every test that stand below each other."""


def environment(language: str) -> Environment:
    """Jinja's, which escapes everything, with the words of a language.

    English is the template's own; zh-TW.json translates it.
    """
    words = {} if language == "en" else read_json(TEMPLATE.with_name(f"{language}.json"))
    env = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.i18n"],
    )  # fmt: skip
    env.install_gettext_callables(
        lambda text: words.get(text, text),
        lambda one, many, n: words.get(many, one if n == 1 else many),
        newstyle=True,
    )
    env.filters["g"] = lambda value: f"{value:g}"
    return env


def page(run: Run, main: str | None, language: str) -> str:
    """The report of a run.

    Args:
        main: folder name of the test whose pictures are shown; None chooses one.

    Raises:
        UserError: the run has no such test.
    """
    tests = find_tests(run.results, run.blob, main)
    sweeps = find_sweeps(run.results, run.blob)
    alike = [test for test in tests if same_conditions(test, tests[0])]
    apart = [test for test in tests if test not in alike]
    return environment(language).get_template(TEMPLATE.name).render(
        language=language,
        run=run,
        config=run.config,
        training=training(run),
        curves=training_chart(run.log),
        alike=alike,
        test=tests[0] if tests else None,
        splits=list(tests[0].figures) if tests else [],
        shown=pictures(tests[0]) if tests else None,
        compared=compare(alike) if len(alike) > 1 else None,
        apart=apart,
        sweeps=[(sweep, chart(sweep)) for sweep in sweeps],
        commands=commands(run),
        counts=COUNTS,
    )  # fmt: skip


def same_conditions(a: Test, b: Test) -> bool:
    """Whether two tests drew the same scenes."""
    return [*a.figures] == [*b.figures] and a.asked == b.asked


def pictures(test: Test) -> dict[str, Any]:
    """Of the test that is shown; None for those that are missing."""
    return {
        "scenes": {split: scenes(test, split) for split in test.figures},
        "confusion": svg(confusion_chart(torch.tensor(test.confusion), test.objects, "")),
        "denoising": grid_uri(test.folder / "denoising.png"),
        "nearest": grid_uri(test.folder / "nearest.png"),
    }


def scenes(test: Test, split: str) -> list[dict[str, Any]]:
    """The pictures of a test's first draw: image, asked, seen, and whether it is as asked for.

    Of older tests it is not known what was seen.
    """
    exact = test.records[split][0]["exact"]
    seen = test.seen[split] if test.seen else [None] * len(exact)
    return [
        {
            "image": picture_uri(test.folder / "images" / split / f"{i}.png"),
            "asked": test.asked[split][i],
            "seen": seen[i],
            "right": bool(right),
        }
        for i, right in enumerate(exact)
    ]


def compare(tests: list[Test]) -> dict[str, Any]:
    """All tests: a chart of their figures, and the same conditions drawn by each."""
    names = [test.folder.name.rpartition("-")[0] for test in tests]
    if len(set(names)) < len(names):  # the same but for network or judge: only the hash tells
        names = [test.folder.name for test in tests]
    first = next(iter(tests[0].figures))
    return {
        "names": names,
        "chart": tests_chart(dict(zip(names, tests, strict=True))),
        "scenes": [scenes(test, first)[:COMPARED] for test in tests],
    }


def chart(sweep: Sweep) -> str:
    """A sweep's chart, flat enough to share a page with its table."""
    figure = sweep_chart(asdict(sweep), "")
    figure.set_size_inches(8, 0.8 + 1.9 * len(sweep.best))
    return svg(figure)
