"""Stored soft labels: what is read is what rounded() said, whatever is stored again."""

import pytest
import torch

from infer_fast.data.label_store import LabelStore, store_of, unpack

STORES = [LabelStore(), LabelStore("uint8"), LabelStore("top", 3, 4.0), LabelStore("top", 1, 1.0)]
MIXED = [LabelStore("float16", 0, 2.0, 0.3), LabelStore("uint8", 0, 1.0, 0.6), LabelStore("top", 3, 2.0, 0.3)]


@pytest.mark.parametrize("store", [*STORES, *MIXED], ids=lambda s: f"{s.how}-{s.top}-{s.truth}")
@pytest.mark.parametrize("shape", [(7, 2, 5, 10), (4, 300), (1, 10)])
def test_labels_are_read_as_they_were_rounded(generator, store, shape):
    logits = (8 * torch.randn(shape, generator=generator)).half()
    tensors, how = store.pack(logits)
    rounded = store.rounded(logits)
    assert rounded.dtype == torch.float16 and rounded.shape == logits.shape
    assert torch.equal(unpack(tensors, how), rounded)
    assert torch.equal(store.rounded(rounded), rounded)  # stored once more, they stay
    assert store_of(how, tensors) == store
    assert store.nbytes(logits) == sum(t.nbytes for t in tensors.values())


def test_eight_bits_are_within_half_a_step(generator):
    logits = 8 * torch.randn(50, 10, generator=generator)
    step = (logits.max() - logits.min()) / 255
    error = (LabelStore("uint8").rounded(logits).float() - logits).abs().max()
    assert error <= 0.51 * step + 2**-11 * logits.abs().max()
    assert LabelStore("uint8").nbytes(logits) == 500


def test_top_labels_keep_the_top_and_the_probability_of_the_rest(generator):
    temperature = 4.0
    logits = 8 * torch.randn(50, 100, generator=generator)
    rounded = LabelStore("top", 5, temperature).rounded(logits).float()
    top = logits.topk(5).indices
    step = (logits.max() - logits.min()) / 255
    assert ((rounded - logits).gather(1, top).abs() <= step).all()
    inside = torch.ones_like(logits, dtype=torch.bool).scatter(1, top, False)
    given, kept = ((x / temperature).softmax(dim=1).where(inside, 0).sum(dim=1) for x in (logits, rounded))
    torch.testing.assert_close(kept, given, rtol=0, atol=0.05)
    assert (
        rounded.masked_fill(~inside, -torch.inf).amax(1) == -(-rounded).masked_fill(~inside, -torch.inf).amax(1)
    ).all()
    assert LabelStore("top", 5, temperature).nbytes(logits) == 50 * (5 + 5 + 1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_share_of_the_truth_is_mixed_into_the_probabilities(generator, temperature):
    logits = 3 * torch.randn(6, 5, 10, generator=generator)
    classes = torch.randint(0, 10, (6, 5), generator=generator)
    mixed = LabelStore("float16", 0, temperature, 0.25).of(logits, classes).float()
    own = torch.nn.functional.one_hot(classes, 10)
    expected = 0.25 * own + 0.75 * (logits / temperature).softmax(dim=-1)
    torch.testing.assert_close((mixed / temperature).softmax(dim=-1), expected, rtol=0.01, atol=1e-4)
    assert torch.equal(LabelStore().of(logits, classes), logits.half())
    assert LabelStore("uint8", 0, temperature, 0.25).in_16_bits() == LabelStore("float16", 0, temperature, 0.25)


def test_labels_that_are_sure_of_another_class_stay_finite():
    logits = torch.tensor([[400.0, -400.0, 0.0]])
    mixed = LabelStore("float16", 0, 1.0, 0.5).of(logits, torch.tensor([1])).float()
    torch.testing.assert_close(mixed.softmax(dim=-1), torch.tensor([[0.5, 0.5, 0.0]]), rtol=0, atol=1e-3)


def test_as_many_top_labels_as_classes_are_all_of_them(generator):
    logits = torch.randn(4, 10, generator=generator)
    assert torch.equal(LabelStore("top", 9, 1.0).rounded(logits), LabelStore("uint8").rounded(logits))


@pytest.mark.parametrize("store", STORES, ids=lambda s: s.how)
def test_equal_labels_are_stored_too(store):
    assert torch.equal(store.rounded(torch.full((2, 3, 10), 1.5)), torch.full((2, 3, 10), 1.5).half())
