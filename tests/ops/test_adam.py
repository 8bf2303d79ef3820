"""adam_: every backend against the formula in float64, and the reference against torch's own Adam."""

import pytest
import torch

from infer_fast.errors import InferFastError
from infer_fast.ops.adam import _adam, adam_

BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("triton", "cpu"), marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="gpu"),
]
SHAPES = [(2, 1, 3, 4, 4), (3, 2, 3, 5, 3), (1, 4, 3, 20, 20), (5, 1, 1, 1)]
STEPS = 4


def problem(generator, shape, dtype):
    """optimised, m, v, each step's gradient, lr, counter; values that float32 holds."""
    optimised = torch.randn(shape, generator=generator).to(dtype)
    gradients = torch.randn(STEPS, *shape, generator=generator).to(dtype)
    lr = torch.rand(STEPS, generator=generator).to(dtype)
    return optimised, torch.zeros_like(optimised), torch.zeros_like(optimised), gradients, lr, torch.zeros(1).long()


def steps(parts, device, **options):
    optimised, m, v, gradients, lr, counter = (t.clone().to(device) for t in parts)
    for gradient in gradients:
        adam_(optimised, m, v, gradient, lr, counter, **options)
    return optimised.cpu(), m.cpu(), v.cpu(), counter.cpu()


def bounds_of(channels, dtype, device="cpu"):
    low = -torch.arange(1, channels + 1, dtype=dtype, device=device) / 4
    return low.view(channels, 1, 1), 0.3 - low


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bounded", [False, True])
def test_backends_equal_the_formula_in_float64(generator, where, shape, bounded):
    backend, device = where
    parts = problem(generator, shape, torch.float32)
    exact = [t.double() if t.is_floating_point() else t for t in parts]
    bounds = [bounds_of(shape[-3], *of) if bounded else None for of in ((torch.float32, device), (torch.float64,))]
    ours = steps(parts, device, backend=backend, bounds=bounds[0])
    expected = steps(exact, "cpu", backend="reference", bounds=bounds[1])
    for got, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.to(right.dtype), right, rtol=1e-5, atol=1e-6)
    assert ours[3].item() == STEPS


def test_the_reference_is_adam(generator):
    optimised, m, v, gradients, lr, counter = problem(generator, SHAPES[0], torch.float64)
    parameter = optimised.clone().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.5, 0.9), eps=1e-8)
    for gradient, rate in zip(gradients, lr, strict=True):
        adam.param_groups[0]["lr"], parameter.grad = rate.item(), gradient
        adam.step()
        adam_(optimised, m, v, gradient, lr, counter)
    torch.testing.assert_close(optimised, parameter.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_lane_whose_gradient_is_not_finite_takes_none_and_the_others_do_not_notice(generator, where, value):
    backend, device = where
    parts = problem(generator, (3, 1, 3, 20, 20), torch.float32)
    broken, silent = parts[3].clone(), parts[3].clone()
    broken[1, 2, 0, 2, 19, 19] = value
    silent[1, 2] = 0
    ours, expected = (steps((*parts[:3], given, *parts[4:]), device, backend=backend) for given in (broken, silent))
    for got, right in zip(ours, expected, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("where", BACKENDS)
def test_what_is_not_contiguous_is_served_all_the_same(generator, where):
    backend, device = where
    parts = problem(generator, (2, 2, 3, 4, 4), torch.float32)
    expected = steps(parts, device, backend=backend)
    optimised, m, v, gradients, lr, counter = (t.clone().to(device) for t in parts)
    strided = optimised.transpose(0, 1).contiguous().transpose(0, 1)
    for gradient in gradients:
        adam_(strided, m, v, gradient.transpose(0, 1).contiguous().transpose(0, 1), lr, counter, backend=backend)
    torch.testing.assert_close(strided.cpu(), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.interpreter
def test_the_registered_operator_passes_opcheck(generator):
    optimised, m, v, gradients, lr, counter = problem(generator, SHAPES[0], torch.float32)
    torch.library.opcheck(_adam, (optimised, m, v, gradients[0], lr, counter, None, None))


def test_shapes_that_do_not_fit_are_named(generator):
    optimised, m, v, gradients, lr, counter = problem(generator, SHAPES[0], torch.float32)
    with pytest.raises(InferFastError, match=r"\(2, 1, 3, 4, 3\)"):
        adam_(optimised, m, v, gradients[0][..., :3], lr, counter)
    with pytest.raises(InferFastError, match="2 bounds where there are 3 channels"):
        adam_(optimised, m, v, gradients[0], lr, counter, bounds=(torch.zeros(2), torch.ones(2)))
