"""perturb_ against the formula."""

import sys

import pytest
import torch

from infer_fast.errors import InferFastError
from infer_fast.ops import perturb_
from infer_fast.ops.backend import native
from infer_fast.ops.perturb import _perturb

BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("native", "cpu"), marks=pytest.mark.skipif(native() is None, reason="no compiler"), id="native"),
    pytest.param(("triton", "cpu"), marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="gpu"),
]
SHAPES = [[(3,)], [(4, 3, 3, 3), (4,), (1,), ()], [(0,), (5,)], [(0,)], [(9001,), (64, 130), (7,)]]


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_channels_last_weights_are_served_by_every_backend(generator, monkeypatch, where, layout):
    backend, device = where
    if backend != "reference":
        monkeypatch.setattr(sys.modules["infer_fast.ops.perturb"], "reference", None)  # must not be called
    weight = torch.randn(5, 3, 3, 2, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
    before, grad = weight.clone(), torch.randn(5, 3, 3, 2, generator=generator).to(device)
    perturb_([weight], [grad.contiguous(memory_format=layout)], 0.3, backend=backend)
    torch.testing.assert_close(weight, before + 0.3 * grad / grad.norm(), rtol=1e-6, atol=1e-6)
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_moves_along_the_gradient_by_rho_over_the_common_norm(generator, where, shapes, dtype):
    backend, device = where
    if dtype == torch.float64 and backend != "reference":
        pytest.skip("float64 is the reference's")
    before = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    grads = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    params = [p.to(device, copy=True) for p in before]
    perturb_(params, [g.to(device) for g in grads], 0.3, backend=backend)
    norm = sum((g.double() ** 2).sum() for g in grads).sqrt().clamp(min=1e-12)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for param, old, grad in zip(params, before, grads, strict=True):
        expected = old.double() + 0.3 * grad.double() / norm
        torch.testing.assert_close(param.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("where", BACKENDS)
def test_tensors_that_begin_anywhere_in_memory(generator, where):
    backend, device = where
    param, grad = (torch.randn(9001, generator=generator).to(device)[1:] for _ in range(2))
    before = param.clone()
    perturb_([param], [grad], 0.3, backend=backend)
    torch.testing.assert_close(param, before + 0.3 * grad / grad.norm(), rtol=1e-6, atol=1e-6)


def test_mixed_dtypes_and_layouts_take_the_reference(generator):
    params = [torch.randn(4, 6, generator=generator).t(), torch.randn(5, generator=generator, dtype=torch.float64)]
    before = [p.clone() for p in params]
    perturb_(params, [torch.ones_like(p) for p in params], 1.0)
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(param, old + 1 / 29**0.5, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(native() is None, reason="no compiler")
def test_the_registered_operator_passes_opcheck(generator):
    params, grads = ([torch.randn(s, generator=generator) for s in (3, 4)] for _ in range(2))
    torch.library.opcheck(_perturb, (params, grads, 0.5, "native"))


def test_a_zero_gradient_moves_nothing():
    params = [torch.ones(3)]
    perturb_(params, [torch.zeros(3)], 1.0)
    assert torch.equal(params[0], torch.ones(3))


def test_an_empty_list_is_nothing_to_do():
    perturb_([], [], 1.0)


def test_lists_that_do_not_pair_up_are_an_error():
    with pytest.raises(InferFastError, match="pair up"):
        perturb_([torch.ones(3)], [torch.ones(4)], 1.0)
