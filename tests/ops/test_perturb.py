"""perturb_ against the formula."""

import pytest
import torch

from infer_fast.errors import InferFastError
from infer_fast.ops import perturb_


@pytest.mark.parametrize("shapes", [[(3,)], [(4, 3, 3, 3), (4,), (1,), ()], [(0,), (5,)]])
def test_moves_along_the_gradient_by_rho_over_the_common_norm(generator, shapes):
    params = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    grads = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    before = [p.clone() for p in params]
    perturb_(params, grads, 0.3)
    norm = sum((g**2).sum() for g in grads).sqrt()
    for param, old, grad in zip(params, before, grads, strict=True):
        torch.testing.assert_close(param, old + 0.3 * grad / norm, rtol=1e-12, atol=1e-12)


def test_a_zero_gradient_moves_nothing():
    params = [torch.ones(3)]
    perturb_(params, [torch.zeros(3)], 1.0)
    assert torch.equal(params[0], torch.ones(3))


def test_an_empty_list_is_nothing_to_do():
    perturb_([], [], 1.0)


def test_lists_that_do_not_pair_up_are_an_error():
    with pytest.raises(InferFastError, match="pair up"):
        perturb_([torch.ones(3)], [torch.ones(4)], 1.0)
