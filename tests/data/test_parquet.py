"""Hugging Face parquet in the layouts that people have: splits, configurations, labels and names."""

import io
import json
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from infer_fast.data import parquet
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def write(tmp_path, generator):
    """write(place, labels, ...) writes a file, and gives its images."""

    def written(place, labels, kind=None, names=None, size=6, flat=False):
        images = torch.randint(0, 256, (len(labels), size, size, 3), generator=generator, dtype=torch.uint8)
        images = images * (not flat)
        table = pa.table({
            "image": [{"bytes": png(image.numpy()), "path": None} for image in images],
            "label": pa.array(labels, kind),
        })  # fmt: skip
        if names is not None:
            features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, tmp_path / place)
        return images.permute(0, 3, 1, 2)

    return written


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("train", "test"), [
    ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
    ("data/train-00000-of-00002-0a1b2c.parquet", "data/validation-00000-of-00001-0a1b2c.parquet"),
    ("default/train/0000.parquet", "default/test/0000.parquet"),
    ("train/0000.parquet", "valid/0000.parquet"),
    ("train/train-0.parquet", "test/test-0.parquet"),
    ("train.parquet", "val_0.parquet"),
    ("a/train0.parquet", "b/test0.parquet"),
])  # fmt: skip
def test_splits_are_found_by_the_name_of_the_file_or_its_folder(write, tmp_path, train, test):
    images, judged = write(train, [1, 0, 1]), write(test, [0, 1])
    write("train_extra-00000-of-00001.parquet", [0, 1])
    write(".cache/train-0.parquet", [0, 1])
    data = load_dataset("mine", tmp_path)
    assert torch.equal(data.train.images, images) and torch.equal(data.test.images, judged)
    assert data.train.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("unlabelled", [[-1, -1, -1], [None, None, None]])
def test_a_test_split_with_labels_is_preferred(write, tmp_path, unlabelled):
    write("train-0.parquet", [0, 1, 2])
    write("test-0.parquet", unlabelled, pa.int64())
    with pytest.raises(InferFastError, match="no row of test has a label"):
        load_dataset("mine", tmp_path)
    judged = write("validation-0.parquet", [0, 2])
    data = load_dataset("mine", tmp_path)
    assert torch.equal(data.test.images, judged) and data.test.labels.tolist() == [0, 2]


def test_configurations_are_not_merged(write, tmp_path):
    for name in ("cropped", "full"):
        images = write(f"{name}/train-0.parquet", [0, 1])
        write(f"{name}/test-0.parquet", [0, 1])
    with pytest.raises(InferFastError, match=r"several configurations \(cropped, full\): give the folder of one"):
        load_dataset("mine", tmp_path)
    assert torch.equal(load_dataset("mine", tmp_path / "full").train.images, images)


@pytest.mark.parametrize(("labels", "kind", "said"), [
    ([0.0, 1.7], None, r"holds double \(such as 0.0\)"),
    ([1.0, 0.0], pa.float32(), "holds float"),
    (["cat", "dog"], None, r"holds string \(such as cat\)"),
    ([[0], [1]], None, "holds list<"),
    ([0, None, 1], None, "has no label in row 1"),
    ([0, -1], None, "label -1"),
    ([None, None], pa.int64(), "no row of train has a label"),
])  # fmt: skip
def test_labels_that_are_no_whole_numbers_are_refused_by_name(write, tmp_path, labels, kind, said):
    write("train-0.parquet", labels, kind)
    write("test-0.parquet", [0, 1])
    with pytest.raises(InferFastError, match=said) as refused:
        load_dataset("mine", tmp_path)
    assert re.search("train-0.parquet: column label|the training split|no row of train", str(refused.value))


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int32(), pa.uint64(), pa.bool_()])
def test_whole_numbers_of_any_kind_are_labels(write, tmp_path, kind):
    write("train-0.parquet", pa.array([0, 1, 1]).cast(kind))
    write("test-0.parquet", [1, 0])
    assert load_dataset("mine", tmp_path).train.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(("names", "said"), [
    (["cat", "cat"], "two classes of column label are named 'cat'"),
    (["cat", ""], "expected a list of texts"),
    (["cat", 7], "expected a list of texts"),
    (["cat", "\ud800"], "expected a list of texts"),
    ("cat", "expected a list of texts"),
    (["cat"], "label 1 in the training split is out of range"),
])  # fmt: skip
def test_class_names_are_checked(write, tmp_path, names, said):
    write("train-0.parquet", [0, 1], names=names)
    write("test-0.parquet", [0, 0])
    with pytest.raises(InferFastError, match=said):
        load_dataset("mine", tmp_path)


def test_splits_that_name_other_classes_are_refused(write, tmp_path):
    write("train-0.parquet", [0, 1], names=["cat", "dog"])
    write("test-0.parquet", [0, 1], names=["dog", "cat"])
    with pytest.raises(InferFastError, match=r"train-0.parquet and .*test-0.parquet name other classes"):
        load_dataset("mine", tmp_path)
    write("test-0.parquet", [0, 1])
    assert load_dataset("mine", tmp_path).classes == ("cat", "dog")


def test_more_than_the_memory_holds_is_refused_before_it_is_read(write, tmp_path, monkeypatch):
    write("train-0.parquet", [0, 1] * 20, size=36, flat=True)
    write("test-0.parquet", [0, 1])
    monkeypatch.setattr(parquet, "memory", lambda: 40 * 500)
    read = []
    monkeypatch.setattr(
        parquet, "decode_all", lambda items, *size, own=parquet.decode_all: read.append(len(items)) or own(items, *size)
    )
    with pytest.raises(InferFastError, match="40 images of 3888 bytes don't fit the memory of 20000 bytes"):
        load_dataset("mine", tmp_path)
    assert read == [1]


def test_a_row_group_larger_than_the_memory_is_refused(write, tmp_path, monkeypatch):
    write("train-0.parquet", [0, 1])
    write("test-0.parquet", [0, 1])
    monkeypatch.setattr(parquet, "memory", lambda: 100)
    with pytest.raises(
        InferFastError, match=r"train-0.parquet has a row group of \d+ bytes, more than the 100 of memory"
    ):
        load_dataset("mine", tmp_path)


def test_an_image_above_pillows_limit_is_named_with_its_row(write, tmp_path, monkeypatch):
    write("train-0.parquet", [0, 1])
    write("test-0.parquet", [0, 1])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with (
        warnings.catch_warnings(),
        pytest.raises(InferFastError, match="train-0.parquet row 0 is larger than an image may be"),
    ):
        warnings.simplefilter("error")
        load_dataset("mine", tmp_path)


def test_a_damaged_page_is_named(write, tmp_path):
    write("train-0.parquet", list(range(50)))
    write("test-0.parquet", [0, 1])
    path = tmp_path / "train-0.parquet"
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[4:2000] ^= 0x5A
    path.write_bytes(data.tobytes())
    with pytest.raises(InferFastError, match="train-0.parquet"):
        load_dataset("mine", tmp_path)
