"""Labels, JSON files and settings, whatever they are given: a right answer, or one clear line."""

import json
from dataclasses import asdict
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from conftest import OBJECTS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from iclevr.labels import (
    decode_labels,
    encode_labels,
    parse_prompt,
    read_conditions,
    read_objects,
    read_train,
)
from runtime.files import read_json
from runtime.settings import (
    SamplingConfig,
    SchedulerConfig,
    TrainConfig,
    UserError,
    from_dict,
    to_dict,
)

FEW = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # the same examples every time: what fails, fails again
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NAMES = st.sampled_from(sorted(OBJECTS))
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | NAMES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | NAMES, inner, max_size=4)
    ),
    max_leaves=8,
)


def right_or_refused(call, *arguments):
    """The call's result, or None for a UserError of one line; anything else fails the test."""
    try:
        return call(*arguments)
    except UserError as error:
        assert len(str(error)) > 5 and "\n" not in str(error)
        return None


@FEW
@given(st.lists(NAMES, min_size=1, unique=True))
def test_labels_come_back(names):
    label = encode_labels(names, OBJECTS)
    assert sorted(decode_labels(label, OBJECTS)) == sorted(names)
    assert label.sum() == len(names) and set(label.tolist()) <= {0.0, 1.0}
    assert parse_prompt(" , ".join(names), OBJECTS) == names


@FEW
@given(ANYTHING)
def test_labels_of_anything(value):
    label = right_or_refused(encode_labels, value, OBJECTS)
    if label is not None:
        assert sorted(decode_labels(label, OBJECTS)) == sorted(value)


@FEW
@given(st.text())
def test_any_prompt(prompt):
    names = right_or_refused(parse_prompt, prompt, OBJECTS)
    assert names is None or set(names) <= OBJECTS.keys()


@FEW
@given(ANYTHING)
def test_any_json(tmp_path: Path, value):
    for name in ("objects", "train", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    objects = right_or_refused(read_objects, tmp_path)
    assert objects is None or sorted(objects.values()) == list(range(len(objects)))
    if (
        conditions := right_or_refused(read_conditions, tmp_path / "test.json", OBJECTS)
    ) is not None:
        assert len(conditions[0]) == len(conditions[1]) == len(value)
    if (train := right_or_refused(read_train, tmp_path, OBJECTS)) is not None:
        for name in train[0]:
            assert (tmp_path / name).parent == tmp_path and "/" not in name


@FEW
@given(st.binary(max_size=60))
def test_any_file_as_json(tmp_path: Path, content):
    (tmp_path / "x.json").write_bytes(content)
    right_or_refused(read_json, tmp_path / "x.json")


@FEW
@given(st.text(alphabet="./\\:ab\n\0", min_size=1))
def test_names_of_pictures_stay_in_the_folder(tmp_path: Path, name):
    (tmp_path / "train.json").write_text(json.dumps({name: ["red cube"]}), encoding="utf-8")
    if right_or_refused(read_train, tmp_path, OBJECTS) is not None:
        for kind in (PurePosixPath, PureWindowsPath):
            assert kind("folder", name).parent == kind("folder") and kind(name).name == name


FIELDS = [(cls, key) for cls in (SamplingConfig, SchedulerConfig, TrainConfig)
          for key in to_dict(cls())]  # fmt: skip


@FEW
@example((SchedulerConfig, "shift_factor"), float("nan"))
@example((SchedulerConfig, "shift_factor"), float("inf"))
@example((SchedulerConfig, "shift_factor"), -3.5e38)  # infinite in float32
@example((TrainConfig, "lr"), 3.4028235677973366e38)
@given(st.sampled_from(FIELDS), ANYTHING)
def test_settings_with_anything_in_them(field, value):
    """What is accepted is of the field's type, and survives being written and read."""
    cls, key = field
    values = to_dict(cls()) | {key: value}
    config = right_or_refused(from_dict, cls, values, "x.json")
    if config is not None:
        assert from_dict(cls, json.loads(json.dumps(to_dict(config))), "x") == config
        for value in asdict(config).values():
            assert not isinstance(value, float) or torch.tensor(value).isfinite()
