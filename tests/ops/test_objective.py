"""lane_loss: every backend against the formula in float64, and against torch's own cross-entropy."""

import pytest
import torch
from torch.nn import functional as F

from infer_fast.errors import InferFastError
from infer_fast.ops.objective import _lose, _slope, lane_loss

BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("triton", "cpu"), marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="gpu"),
]
R_BN = 0.3


def problem(generator, lanes, images, classes, dtype=torch.float32):
    """logits, targets, penalty, upstream."""
    logits = 5 * torch.randn(lanes * images, classes, generator=generator)
    targets = torch.randint(classes, (images,), generator=generator)
    return logits.to(dtype), targets, *torch.rand(2, lanes, generator=generator)


def solved(parts, device, backend):
    """loss, both gradients, and the counters afterwards."""
    logits, targets, penalty, upstream = (t.clone().to(device) for t in parts)
    arrived = torch.zeros(len(penalty), dtype=torch.int32, device=device)
    logits.requires_grad_(), penalty.requires_grad_()
    loss = lane_loss(logits, targets, penalty, R_BN, arrived, backend=backend)
    gradients = torch.autograd.grad(loss, (logits, penalty), upstream)
    return [t.detach().cpu() for t in (loss, *gradients, arrived)]


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 10), (3, 130, 7), (1, 3, 2500), (1, 2, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_equal_the_formula_in_float64(generator, where, size, dtype):
    parts = problem(generator, *size, dtype)
    logits, penalty = (parts[i].double().requires_grad_() for i in (0, 2))
    rows = F.cross_entropy(logits, parts[1].repeat(size[0]), reduction="none")
    expected = rows.view(size[0], -1).mean(dim=1) + R_BN * penalty
    right = expected, *torch.autograd.grad(expected, (logits, penalty), parts[3].double())
    *got, arrived = solved(parts, where[1], where[0])
    rounding = torch.finfo(dtype).eps
    for ours, exact, rtol in zip(got, right, (1e-5, max(1e-4, rounding), 1e-6), strict=True):
        torch.testing.assert_close(ours.double(), exact.detach(), rtol=rtol, atol=1e-6)
    assert got[1].dtype == dtype and not arrived.any()


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_breaks_its_own_lane_alone(generator, where, value):
    parts = problem(generator, 3, 4, 6)
    whole = solved(parts, where[1], where[0])[0]
    parts[0][5, 2] = value
    broken = solved(parts, where[1], where[0])[0]
    assert not broken[1].isfinite() and torch.equal(broken[::2], whole[::2])


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("classes", [4, 1500])
def test_classes_ruled_out_by_minus_infinity_count_nothing(generator, where, classes):
    parts = problem(generator, 1, 2, classes)
    parts[0][:, :-2] = -float("inf")  # with many classes, a whole block of them
    parts[1].fill_(classes - 1)
    expected = F.cross_entropy(parts[0].double(), parts[1]) + R_BN * parts[2].double()
    torch.testing.assert_close(solved(parts, where[1], where[0])[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_shapes_that_do_not_fit_are_named(generator):
    logits, targets, penalty, _ = problem(generator, 2, 3, 4)
    with pytest.raises(InferFastError, match=r"\(5, 4\)"):
        lane_loss(logits[:5], targets, penalty, R_BN, torch.zeros(2, dtype=torch.int32))


@pytest.mark.interpreter
def test_a_class_that_is_not_there_makes_the_loss_nan(generator):
    logits, arrived = torch.randn(4, 3, generator=generator), torch.zeros(2, dtype=torch.int32)
    for wrong in (3, -1):
        loss = lane_loss(logits, torch.tensor([0, wrong]), torch.zeros(2), 1.0, arrived, backend="triton")
        assert loss.isnan().all()


def test_the_operators_fakes_have_the_kernels_shapes():
    with torch.device("meta"):
        logits, targets = torch.empty(6, 10, dtype=torch.bfloat16), torch.empty(3).long()
        penalty, arrived = torch.empty(2), torch.empty(2).int()
    loss, sums = _lose(logits, targets, penalty, arrived, 1.0)
    assert (loss.shape, sums.shape, loss.dtype, sums.dtype) == ((2,), (6,), torch.float32, torch.float32)
    slope, of_penalty = _slope(loss, logits, targets, sums, 1.0)
    assert (slope.shape, slope.dtype, of_penalty.shape) == ((6, 10), torch.bfloat16, (2,))
