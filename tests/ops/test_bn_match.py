"""bn_match against BatchNorm, autograd and hand-made statistics."""

import pytest
import torch
from torch.nn import functional as F

from infer_fast.errors import InferFastError
from infer_fast.ops import bn_match

SHAPES = [(6, 5, 4, 3), (3, 1, 7, 7), (3, 4, 1, 1), (12, 2, 1, 9)]


def arguments(shape, generator, dtype=torch.float64):
    c = shape[1]
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=dtype)  # noqa: E731
    return draw(*shape), draw(c), draw(c), draw(c), draw(c).abs() + 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_output_is_batch_norm_then_residual_then_activation(generator, shape, activation, with_residual):
    x, weight, bias, mean, var = arguments(shape, generator)
    residual = torch.randn(shape, generator=generator, dtype=x.dtype) if with_residual else None
    y, _ = bn_match(x, weight, bias, mean, var, 1e-5, residual=residual, activation=activation)
    expected = F.batch_norm(x, mean, var, weight, bias, False, 0.0, 1e-5)
    expected = expected if residual is None else expected + residual
    expected = {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}[activation](expected)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lanes", [1, 3])
def test_penalty_is_the_two_norms_of_each_lane(generator, shape, lanes):
    x, weight, bias, mean, var = arguments(shape, generator)
    _, penalty = bn_match(x, weight, bias, mean, var, 1e-5, lanes=lanes, r_var=11.0)
    for lane, own in enumerate(x.chunk(lanes)):
        channels = own.transpose(0, 1).flatten(1)
        expected = 11.0 * (channels.var(1, unbiased=False) - var).norm() + (channels.mean(1) - mean).norm()
        torch.testing.assert_close(penalty[lane], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_reference_passes_gradcheck(generator, activation):
    x, weight, bias, mean, var = arguments((6, 3, 4, 3), generator)
    residual = torch.randn(x.shape, generator=generator, dtype=x.dtype, requires_grad=True)

    def function(x, residual):
        return bn_match(
            x, weight, bias, mean, var, 1e-5, residual=residual, activation=activation, lanes=3, backend="reference"
        )

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), residual))


def test_huge_mean_does_not_cancel(generator):
    """Mean 1e4, variance 1 in float32: the penalty stays that of float64."""
    x = torch.randn(64, 3, 16, 16, generator=generator) + 1e4
    mean, var = torch.full((3,), 1e4), torch.ones(3)
    _, penalty = bn_match(x, None, None, mean, var, 1e-5)
    _, exact = bn_match(x.double(), None, None, mean.double(), var.double(), 1e-5)
    torch.testing.assert_close(penalty.double(), exact, rtol=1e-4, atol=0)


def test_nan_reaches_output_and_penalty_of_its_lane_alone(generator):
    x, weight, bias, mean, var = arguments((4, 3, 2, 2), generator, torch.float32)
    x[0, 1, 0, 0] = float("nan")
    y, penalty = bn_match(x, weight, bias, mean, var, 1e-5, lanes=2)
    assert y[0, 1, 0, 0].isnan() and y[1:].isfinite().all()
    assert penalty[0].isnan() and penalty[1].isfinite()


def test_arguments_that_do_not_fit_are_named(generator):
    x, weight, bias, mean, var = arguments((4, 3, 2, 2), generator, torch.float32)
    with pytest.raises(InferFastError, match="3 equal lanes"):
        bn_match(x, weight, bias, mean, var, 1e-5, lanes=3)
    with pytest.raises(InferFastError, match="3 channels"):
        bn_match(x, weight, bias, mean[:2], var, 1e-5)
    with pytest.raises(InferFastError, match="gelu"):
        bn_match(x, weight, bias, mean, var, 1e-5, activation="gelu")
    with pytest.raises(InferFastError, match="residual"):
        bn_match(x, weight, bias, mean, var, 1e-5, residual=x[:, :2])
    with pytest.raises(InferFastError, match=r"\(lanes\*B, C, H, W\)"):
        bn_match(x[0], weight, bias, mean, var, 1e-5)
