"""scale_shift: every backend against the formula in float64."""

import pytest
import torch
from torch.nn import functional as F

from infer_fast.errors import InferFastError
from infer_fast.ops.scale_shift import _scale_shift, scale_shift

BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("triton", "cpu"), marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="gpu"),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
SHAPES = [(2, 8, 4, 4), (1, 16, 9, 7), (3, 5, 3, 3), (2, 12, 1, 1), (1, 1, 40, 41), (1, 64, 12, 12)]


def inputs(generator, shape, dtype=torch.float32, layout=torch.contiguous_format):
    """x, scale, shift, residual."""
    x, residual = (3 * torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    scale, shift = torch.randn(2, shape[1], generator=generator)
    return x.contiguous(memory_format=layout), scale, shift, residual.contiguous(memory_format=layout)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("activation", "added", "dtype"),
    [
        ("none", False, torch.float32),
        ("relu", True, torch.float32),
        ("silu", False, torch.bfloat16),
        ("relu6", True, torch.float16),
    ],
)
def test_backends_equal_the_formula_in_float64(generator, where, layout, shape, activation, added, dtype):
    backend, device = where
    x, scale, shift, residual = inputs(generator, shape, dtype, layout)
    z = x.double() * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    expected = ACTIVATIONS[activation](z + residual.double() if added else z)
    given = residual.to(device) if added else None
    got = scale_shift(
        x.to(device), scale.to(device), shift.to(device), residual=given, activation=activation, backend=backend
    )
    assert got.dtype == dtype and got.stride() == x.stride()
    rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(got.cpu().double(), expected, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("where", BACKENDS)
def test_what_is_not_dense_is_served_all_the_same(generator, where):
    backend, device = where
    x, scale, shift, residual = inputs(generator, (4, 8, 6, 4))
    expected = scale_shift(x[::2].transpose(2, 3), scale, shift, residual=residual[::2].transpose(2, 3))
    x, scale, shift, residual = (t.to(device) for t in (x, scale, shift, residual))
    got = scale_shift(
        x[::2].transpose(2, 3), scale, shift, residual=residual[::2].transpose(2, 3), backend=backend
    ).cpu()
    torch.testing.assert_close(got, expected)


@pytest.mark.interpreter
def test_a_gradient_is_the_references(generator):
    x, scale, shift, _ = inputs(generator, SHAPES[0])
    (gradient,) = torch.autograd.grad(scale_shift(x.requires_grad_(), scale, shift, backend="triton").sum(), x)
    torch.testing.assert_close(gradient, scale.view(-1, 1, 1).expand_as(x))


@pytest.mark.interpreter
def test_the_registered_operator_passes_opcheck(generator):
    x, scale, shift, residual = inputs(generator, SHAPES[0], layout=torch.channels_last)
    torch.library.opcheck(_scale_shift, (x, scale, shift, residual, "relu"))


def test_shapes_that_do_not_fit_are_named(generator):
    x, scale, shift, residual = inputs(generator, (2, 8, 4, 4))
    with pytest.raises(InferFastError, match=r"\(7,\)"):
        scale_shift(x, scale[:7], shift)
    with pytest.raises(InferFastError, match=r"residual is \(2, 8, 4, 3\)"):
        scale_shift(x, scale, shift, residual=residual[..., :3])
