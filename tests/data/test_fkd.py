"""Labels of every crop: what is stored is what is replayed."""

import pytest
import torch

from infer_fast.data.augment import Augmentation, Sampling
from infer_fast.data.fkd import epoch_bytes, epoch_path, read_epoch, replay, write_epoch
from infer_fast.data.resident import Composer, batches
from infer_fast.data.sets import resident_distilled
from infer_fast.errors import InferFastError
from infer_fast.files import write_tensors

from .test_distilled import make

HOW = [
    Augmentation(),
    Augmentation(2, True),
    Augmentation(2, True, "mixup"),
    Augmentation(0, False, "cutmix", 1.0),
    Augmentation(0, True, "cutmix", 1.0, resized=True),
]


@pytest.mark.parametrize("augmentation", HOW)
def test_stored_epochs_are_replayed_batch_for_batch(generator, tmp_path, augmentation):
    resident = resident_distilled(make(generator), soft=True)
    per_epoch, logits = -(-len(resident) // 8), []
    expected = []
    for epoch in range(2):
        draws = list(batches(resident, Sampling(8, per_epoch, augmentation, generator)))
        logits = [torch.randn(len(draw.positions), 5, generator=generator).half() for draw in draws]
        write_epoch(epoch_path(tmp_path, epoch), draws, logits)
        expected += [(Composer(resident)(*draw)[0], own.float()) for draw, own in zip(draws, logits, strict=True)]
    for backend in (None, "reference"):
        stream, make_batch = replay(tmp_path, resident, 2 * per_epoch - 1, backend)
        replayed = [make_batch(*batch) for batch in stream]
        assert len(replayed) == 2 * per_epoch - 1
        for (images, labels), (expected_images, expected_labels) in zip(replayed, expected, strict=False):
            torch.testing.assert_close(images, expected_images, atol=1e-5, rtol=1e-5)
            assert torch.equal(labels, expected_labels)
    stored = {p: p.stat().st_size for p in tmp_path.iterdir()}
    weight = epoch_bytes(len(resident), 8, 5, augmentation)
    assert all(weight < size < weight + 1000 for size in stored.values())  # the rest is the file's header


def test_missing_and_damaged_epochs_are_errors(tmp_path):
    with pytest.raises(InferFastError, match=r"epoch-0003.safetensors does not exist"):
        list(read_epoch(epoch_path(tmp_path, 3), torch.device("cpu")))
    epoch_path(tmp_path, 3).write_bytes(b"cut")
    with pytest.raises(InferFastError, match=r"epoch-0003.safetensors is damaged"):
        list(read_epoch(epoch_path(tmp_path, 3), torch.device("cpu")))
    write_tensors(epoch_path(tmp_path, 3), {"logits": torch.zeros(2, 3)})
    with pytest.raises(InferFastError, match="holds no labels of an epoch"):
        list(read_epoch(epoch_path(tmp_path, 3), torch.device("cpu")))
