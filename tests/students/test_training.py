"""What a finished student is found by."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from infer_fast.data.images import Split, image_dataset
from infer_fast.data.pixels import Pixels
from infer_fast.data.sets import resident_split
from infer_fast.errors import InferFastWarning
from infer_fast.settings import StudentSettings
from infer_fast.students.candidates import Candidate, Evaluation, Store
from infer_fast.students.results import Measured, ResultStore
from infer_fast.students.training import student_key
from tests.students.other_values import other_value


def test_everything_that_a_student_depends_on_changes_its_key(tiny_dataset, generator, monkeypatch):
    dataset, pixels = tiny_dataset, Pixels((0.1, 0.2, 0.3), (0.2, 0.2, 0.2))
    source = resident_split(dataset.train, 4, dataset.pixels)
    candidate = Candidate("distilled", "soft labels", 1, 1, 30, lambda _: source, teachers=("a" * 64,))
    settings = StudentSettings(batch_size=8)
    evaluation = Evaluation(range(48), dataset, [], settings, 3)  # of the set, its length counts

    def key(candidate=candidate, source=source, evaluation=evaluation, network="convnet", seed=0):
        return student_key(candidate, source, evaluation, network, seed)

    images = dataset.test.images.clone()
    images[-1, 0, 0, 0] ^= 1
    other = image_dataset("tiny", dataset.train, Split(images, dataset.test.labels), dataset.classes)
    moved = source.base_index.roll(1)
    keys = {
        "network": key(network="convnet-silu"),
        "seed": key(seed=1),
        "updates": key(replace(candidate, updates=31)),
        "labels": key(replace(candidate, labels="hard labels")),
        "teachers": key(replace(candidate, teachers=("b" * 64,))),
        "stored labels": key(replace(candidate, replayed=Path("fkd/1"))),
        "other stored labels": key(replace(candidate, replayed=Path("fkd/2"))),
        "a pixel": key(source=replace(source, base=source.base.bitwise_xor(torch.tensor(1, dtype=torch.uint8)))),
        "an index": key(source=replace(source, base_index=moved)),
        "targets": key(source=replace(source, targets=source.targets.flip(0))),
        "soft targets": key(source=replace(source, targets=torch.eye(4)[source.targets])),
        "normalisation of the training images": key(source=replace(source, pixels=pixels)),
        "normalisation of the test images": key(
            evaluation=replace(evaluation, dataset=replace(dataset, pixels=pixels))
        ),
        "a test image": key(evaluation=replace(evaluation, dataset=other)),
        "updates per epoch": key(evaluation=replace(evaluation, distilled=range(480))),
    }
    for field in fields(settings):
        if field.name not in ("networks", "labels", "epochs"):
            value = other_value(field, getattr(settings, field.name)) if field.name != "loader" else "torch"
            changed = replace(settings, **{field.name: value})  # auto is the loader fused, and the same student
            keys[field.name] = key(evaluation=replace(evaluation, settings=changed))
    monkeypatch.setenv("INFER_FAST_BACKEND", "reference")
    keys["backend"] = key()
    monkeypatch.delenv("INFER_FAST_BACKEND")
    assert len({*keys.values(), key()}) == len(keys) + 1
    assert key() == key(replace(candidate, image_bytes=2, label_bytes=2))  # which the table alone tells of


def test_a_damaged_student_is_trained_again_and_another_runs_is_seen(tmp_path):
    one, two = (ResultStore(Store(tmp_path)) for _ in range(2))
    measured = Measured(3, 50.0, 60.0, 70.0)
    one.put("a", measured)
    two.put("b", measured)
    assert one.get("b") == two.get("a") == measured and one.get("c") is None
    assert ResultStore(Store(tmp_path, resume=False)).get("a") is None
    Store(tmp_path).path("a").write_text('{"instances": 3')
    with pytest.warns(InferFastWarning, match=r"a.json is damaged .* The student is trained again"):
        assert ResultStore(Store(tmp_path)).get("a") is None
    ResultStore(Store(tmp_path / "none", keep=False)).put("a", measured)
    assert not (tmp_path / "none").exists()
