"""CIFAR's binary files."""

import numpy as np
import pytest
import torch

from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError


def records(generator, labels):
    """Images uint8 (N, 3072), and records of one or more label bytes (N, .) before them."""
    pixels = torch.randint(0, 256, (len(labels), 3072), generator=generator, dtype=torch.uint8).numpy()
    return pixels, np.concatenate([np.asarray(labels, np.uint8).reshape(len(labels), -1), pixels], axis=1).tobytes()


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_cifar10(generator, tmp_path, inner):
    folder, stored = tmp_path / inner, []
    folder.mkdir(exist_ok=True)
    for i in range(1, 6):
        pixels, raw = records(generator, [i - 1, 9])
        stored.append(pixels)
        (folder / f"data_batch_{i}.bin").write_bytes(raw)
    (folder / "test_batch.bin").write_bytes(records(generator, [3])[1])
    data = load_dataset("cifar10", tmp_path)
    assert np.array_equal(data.train.images.flatten(1).numpy(), np.concatenate(stored))
    assert data.train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9] and data.test.labels.tolist() == [3]
    names = [f"name{i}" for i in range(10)]
    (folder / "batches.meta.txt").write_text("\n".join([*names, "", ""]))
    assert load_dataset("cifar10", tmp_path).classes == tuple(names)


def test_cifar100_has_fine_labels(generator, tmp_path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    pixels, raw = records(generator, [[1, 80], [2, 7]])
    (folder / "train.bin").write_bytes(raw)
    (folder / "test.bin").write_bytes(raw)
    (folder / "fine_label_names.txt").write_text("\n".join(f"name{i}" for i in range(100)))
    data = load_dataset("cifar100", tmp_path)
    assert data.train.labels.tolist() == [80, 7] and data.classes[80] == "name80"
    assert np.array_equal(data.test.images.flatten(1).numpy(), pixels)


def test_what_is_missing_or_cut_short_is_named(generator, tmp_path):
    (tmp_path / "train.bin").write_bytes(records(generator, [[1, 2]])[1])
    with pytest.raises(InferFastError, match="test.bin does not exist"):
        load_dataset("cifar100", tmp_path)
    (tmp_path / "test.bin").write_bytes(b"x" * 3073)
    with pytest.raises(InferFastError, match="test.bin has 3073 bytes, not whole records of 3074"):
        load_dataset("cifar100", tmp_path)
    (tmp_path / "fine_label_names.txt").write_text("one\n")
    with pytest.raises(InferFastError, match="names 1 classes, expected 100"):
        load_dataset("cifar100", tmp_path)
