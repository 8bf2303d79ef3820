"""Views: drawn per task, applied on the device, differentiable."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import hflip, resized_crop

from infer_fast.data.crops import draw_crops
from infer_fast.synthesis.views import View, Views, apply_view, circular_shift, draw_views, view_of_sum


def only(shift, crop=None, flip=None) -> View:
    """The view of the only iteration there is."""
    return Views(shift, crop, flip).each(lambda t: t[None]).at(torch.zeros(1, dtype=torch.int64))


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


@pytest.mark.parametrize("size", [(64, 64), (72, 65)])
def test_crops_equal_torchvisions(generator, size):
    x = torch.rand(6, 2, 3, *size, generator=generator)
    crop = torch.cat([draw_crops(5, size, generator), torch.tensor([[0, 0, *size]])])
    flip = torch.tensor([True, False] * 3)
    shift = torch.randint(0, 9, (6, 2), generator=generator)
    views = apply_view(x, only(shift, crop, flip))
    for lane in range(6):
        cropped = resized_crop(x[lane], *crop[lane].tolist(), size, InterpolationMode.BILINEAR, antialias=True)
        expected = torch.roll(hflip(cropped) if flip[lane] else cropped, tuple(shift[lane].tolist()), (-2, -1))
        assert (views[lane] - expected).abs().max() < 1e-3


def test_a_crops_gradient_is_its_transpose(generator):
    x = torch.rand(1, 1, 3, 64, 64, generator=generator, dtype=torch.float64, requires_grad=True)
    view = only(torch.tensor([[3, 1]]), draw_crops(1, (64, 64), generator), torch.tensor([True]))
    y, g = (torch.rand(x.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    (gradient,) = torch.autograd.grad((apply_view(x, view) * g).sum(), x)
    torch.testing.assert_close((gradient * y).sum(), (apply_view(y, view) * g).sum())


def test_only_large_images_are_cropped():
    assert draw_views(0, 0, [0], iterations=2, jitter=4, size=(32, 32)).crop is None
    drawn = draw_views(0, 0, [0, 1], iterations=2, jitter=4, size=(64, 64))
    assert drawn.crop.shape == (2, 2, 4) and drawn.flip.shape == (2, 2)
    assert torch.equal(drawn.shift, draw_views(0, 0, [0, 1], iterations=2, jitter=4).shift)


@pytest.mark.parametrize("cropped", [False, True])
def test_the_view_of_a_sum_has_the_summed_gradient_of_what_is_added(generator, cropped):
    base = torch.rand(2, 5, 3, 64, 66, generator=generator, dtype=torch.float64)
    added = torch.rand(2, 1, 3, 64, 66, generator=generator, dtype=torch.float64, requires_grad=True)
    shift = torch.randint(0, 9, (2, 2), generator=generator)
    view = only(shift, draw_crops(2, (64, 66), generator), torch.tensor([True, False])) if cropped else only(shift)
    weights = torch.rand(base.shape, generator=generator, dtype=torch.float64)
    seen, expected = view_of_sum(base, added, view), apply_view(base + added, view)
    assert torch.equal(seen, expected)
    (ours,), (theirs,) = (torch.autograd.grad((each * weights).sum(), added) for each in (seen, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
