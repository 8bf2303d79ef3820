"""enlarge: against torch's bilinear interpolation, and its gradient against autograd's of that."""

import pytest
import torch
from torch.nn import functional as F

from infer_fast.ops import enlarged, enlarging


@pytest.mark.parametrize(("side", "size"), [(3, (8, 8)), (4, (5, 9)), (1, (4, 6)), (7, (7, 7))])
def test_enlarged_images_are_torchs_bilinear_ones(generator, side, size):
    x = torch.randn(2, 3, side, side, generator=generator, requires_grad=True)
    ours = enlarged(x, enlarging(side, size))
    theirs = F.interpolate(x, size, mode="bilinear")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    grad = torch.randn(2, 3, *size, generator=generator)
    (own,), (expected,) = (torch.autograd.grad(y, x, grad) for y in (ours, theirs))
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_images_of_the_size_stay_as_they_are(generator):
    x = torch.randn(2, 5, 5, generator=generator)
    assert torch.equal(enlarged(x, enlarging(5, (5, 5))), x)
