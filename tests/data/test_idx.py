"""idx files: MNIST's and EMNIST's names, and sizes that are checked before anything is decompressed."""

import gzip
import struct

import numpy as np
import pytest
import torch

from infer_fast.data import idx
from infer_fast.data.idx import read_idx
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError


def encoded(array, shape=None):
    shape = array.shape if shape is None else shape
    return struct.pack(">HBB", 0, 8, len(shape)) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()


def write(folder, generator, names="{part}-{what}-{axes}-ubyte", parts=("train", "t10k"), first=0, count=26):
    """Four files with labels first, first+1, ...; the training images are returned."""
    images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8).numpy()
    labels = np.arange(first, first + count).astype(np.uint8)
    for part in parts:
        for what, axes, array in (("images", "idx3", images), ("labels", "idx1", labels)):
            path = folder / names.format(part=part, what=what, axes=axes)
            raw = encoded(array)
            path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return images


@pytest.mark.parametrize(
    "names", ["{part}-{what}-{axes}-ubyte", "{part}-{what}.{axes}-ubyte", "{part}-{what}-{axes}-ubyte.gz"]
)
@pytest.mark.parametrize("test", ["t10k", "test"])
def test_the_names_that_people_have(generator, tmp_path, names, test):
    (tmp_path / "train-images-idx3-ubyte.zip").mkdir()
    images = write(tmp_path, generator, names, ("train", test), count=10)
    data = load_dataset("mine", tmp_path)
    assert np.array_equal(data.train.images[:, 0, 2:-2, 2:-2].numpy(), images)
    assert data.test.labels.tolist() == list(range(10)) and data.classes[9] == "9"


@pytest.mark.parametrize(("kind", "first", "count", "named"), [
    ("letters", 1, 26, {0: "a", 25: "z"}),
    ("balanced", 0, 47, {0: "0", 10: "A", 46: "t"}),
    ("digits", 0, 10, {9: "9"}),
    ("byclass", 0, 62, {61: "z"}),
])  # fmt: skip
def test_emnists_names(generator, tmp_path, kind, first, count, named):
    names = f"emnist-{kind}-" + "{part}-{what}-{axes}-ubyte"
    images = write(tmp_path, generator, names, ("train", "test"), first, count)
    train, _, classes = read_idx(tmp_path)
    assert train.labels.tolist() == list(range(count)) and len(classes) == count
    assert {label: classes[label] for label in named} == named
    assert np.array_equal(train.images[:, 0].numpy(), images)


def test_of_several_sets_one_is_named(generator, tmp_path):
    for kind in ("letters", "digits"):
        write(tmp_path, generator, f"emnist-{kind}-" + "{part}-{what}-{axes}-ubyte.gz", ("train", "test"), 1, 9)
    with pytest.raises(InferFastError, match=r"several sets \(emnist-digits, emnist-letters\): name one of them"):
        load_dataset("emnist", tmp_path)
    assert len(load_dataset("emnist_digits", tmp_path).classes) == 10


def test_a_missing_file_is_named(generator, tmp_path):
    write(tmp_path, generator)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InferFastError, match="has no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz"):
        load_dataset("mine", tmp_path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(("shape", "there", "why"), [
    ((2**31, 2**31, 4), 10, "more than the file can hold"),
    ((20, 28, 28), 20 * 28 * 28 - 1, "its header says 15680 bytes"),
    ((20, 28, 28), 20 * 28 * 28 + 5, "its header says 15680 bytes, it has more"),
])  # fmt: skip
def test_a_header_is_held_against_what_is_there(generator, tmp_path, suffix, shape, there, why):
    write(tmp_path, generator, "{part}-{what}-{axes}-ubyte" + suffix)
    raw = encoded(torch.randint(0, 256, (there,), generator=generator, dtype=torch.uint8).numpy(), shape)
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix else raw)
    with pytest.raises(InferFastError, match=f"train-images-idx3-ubyte{suffix} is not a whole idx file .*{why}"):
        load_dataset("mine", tmp_path)


def test_what_does_not_fit_the_memory_is_refused_before_it_is_decompressed(generator, tmp_path, monkeypatch):
    write(tmp_path, generator, "{part}-{what}-{axes}-ubyte.gz")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(encoded(np.zeros((100, 28, 28), np.uint8))))
    monkeypatch.setattr(idx, "memory", lambda: 50_000)
    with pytest.raises(InferFastError, match="its header says 78400 bytes, more than the 50000 of memory"):
        load_dataset("mine", tmp_path)
