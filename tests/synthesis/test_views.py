"""Views: drawn per task, applied on the device, differentiable."""

import pytest
import torch

from infer_fast.synthesis.views import circular_shift, draw_views


def test_draws_depend_on_seed_teacher_and_index_alone():
    together = draw_views(3, 1, [4, 5, 6], iterations=9, jitter=4).shift
    alone = draw_views(3, 1, [5], iterations=9, jitter=4).shift
    assert torch.equal(together[:, 1:2], alone)
    for other in (draw_views(4, 1, [5], iterations=9, jitter=4), draw_views(3, 2, [5], iterations=9, jitter=4)):
        assert not torch.equal(other.shift, alone)


def test_shifts_are_uniform_from_0_to_jitter_inclusive():
    shift = draw_views(0, 0, [0], iterations=5000, jitter=4).shift
    counts = torch.bincount(shift.flatten(), minlength=5)
    assert len(counts) == 5 and (counts.float() / 10_000 - 0.2).abs().max() < 0.03


@pytest.mark.parametrize("shape", [(3, 2, 3, 5, 7), (1, 3, 1, 1), (2, 3, 4, 4)])
def test_equals_torch_roll_and_its_gradient(generator, shape):
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    shift = torch.randint(-9, 9, (shape[0], 2), generator=generator)
    rolled = circular_shift(x, shift)
    expected = torch.stack([torch.roll(x[i], tuple(shift[i].tolist()), (-2, -1)) for i in range(shape[0])])
    assert torch.equal(rolled, expected)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    (ours,) = torch.autograd.grad((rolled * weights).sum(), x)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), x)
    assert torch.equal(ours, theirs)
