"""bn_match_twice: bn_match's values, and the gradients of both users of y, against the float64 reference."""

import itertools

import pytest
import torch

from infer_fast.ops import bn_match, bn_match_statistics, bn_match_twice
from infer_fast.ops.backend import native
from infer_fast.ops.bn_match import pooled
from tests.ops.test_bn_match import (
    ACTIVATIONS,
    DEVICES,
    LAYOUTS,
    TOLERANCE,
    arguments,
    away_from_corners,
    draw,
    relative_error,
)

LANES = 3
EVERYWHERE = [pytest.param(("reference", "cpu"), id="reference"), *DEVICES]


def leaves(x, residual):
    """(what gradients are taken of, x, residual)"""
    x, residual = (None if t is None else t.clone().requires_grad_() for t in (x, residual))
    return [x] if residual is None else [x, residual], x, residual


def gradients(parts, residual, upstream, **options):
    """Of x and the residual; upstream: the gradients of y, of y once more and of the penalty, None where not used."""
    inputs, x, residual = leaves(parts[0], residual)
    outputs = bn_match_twice(x, *parts[1:], 1e-5, residual=residual, **options)
    used = [(output, grad.to(output)) for output, grad in zip(outputs, upstream, strict=True) if grad is not None]
    outputs, grads = zip(*used, strict=True)
    return torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True)


def exact_gradients(parts, residual, upstream, **options):
    """The same by bn_match's reference in float64: one y, whose gradient is the sum."""
    x, *vectors = (t.double() for t in parts)
    inputs, x, residual = leaves(x, None if residual is None else residual.double())
    y, penalty = bn_match(x, *vectors, 1e-5, residual=residual, backend="reference", **options)
    first, second, last = (0 if grad is None else grad.double() for grad in upstream)
    return torch.autograd.grad((y * (first + second)).sum() + (penalty * last).sum(), inputs)


def drawn(generator, shape, dtype, with_residual):
    """The arguments, the residual or None, and gradients of y, y once more and the penalty, 0 near the corners.

    The first two have the same signs: what is left of two that cancel is their rounding, in bfloat16 more than a sum's.
    """
    parts = arguments(shape, generator, dtype)
    residual = draw(generator, *shape).to(dtype) if with_residual else None
    smooth = away_from_corners([t.double() for t in parts], None if residual is None else residual.double())
    grad = draw(generator, *shape) * smooth
    again = grad * (0.5 + torch.rand(shape, generator=generator, dtype=grad.dtype))
    return parts, residual, [grad.to(dtype), again.to(dtype), draw(generator, LANES)]


def placed(tensor, device, layout="contiguous"):
    if tensor is None or tensor.dim() < 4:
        return tensor if tensor is None else tensor.to(device)
    return tensor.to(device).contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (48, 1, 1, 1), (6, 8, 4, 2)])
def test_both_gradients_are_added(generator, where, layout, dtype, shape):
    backend, device = where
    for activation, with_residual in itertools.product(ACTIVATIONS, (False, True)):
        given = drawn(generator, shape, dtype, with_residual)
        options = {"activation": activation, "lanes": LANES, "r_var": 11.0}
        parts, upstream = ([placed(t, device, layout) for t in tensors] for tensors in (given[0], given[2]))
        ours = gradients(parts, placed(given[1], device, layout), upstream, backend=backend, **options)
        for got, exact in zip(ours, exact_gradients(*given, **options), strict=True):
            assert relative_error(got.cpu(), exact) <= TOLERANCE[dtype][1], (activation, with_residual)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("unused", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_gradient_that_does_not_come_adds_nothing(generator, where, unused, with_residual):
    backend, device = where
    parts, residual, upstream = drawn(generator, (6, 5, 4, 3), torch.float32, with_residual)
    upstream = [None if position in unused else grad for position, grad in enumerate(upstream)]
    options = {"activation": "relu", "lanes": LANES}
    on_device = [placed(t, device) for t in parts], placed(residual, device), [placed(t, device) for t in upstream]
    ours = gradients(*on_device, backend=backend, **options)
    for got, exact in zip(ours, exact_gradients(parts, residual, upstream, **options), strict=True):
        torch.testing.assert_close(got.cpu(), exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_another_layout_are_added_where_they_belong(generator, where, layout):
    backend, device = where
    parts, _, upstream = drawn(generator, (6, 5, 4, 3), torch.float32, False)
    for layouts in itertools.product(LAYOUTS, repeat=2):
        grads = [placed(grad, device, each) for grad, each in zip(upstream, (*layouts, "contiguous"), strict=True)]
        (ours,) = gradients([placed(t, device, layout) for t in parts], None, grads, lanes=LANES, backend=backend)
        (exact,) = exact_gradients(parts, None, upstream, lanes=LANES)
        assert relative_error(ours.cpu(), exact) <= 1e-4


@pytest.mark.parametrize("where", EVERYWHERE)
def test_values_are_bn_matchs_and_the_second_y_takes_no_memory(generator, where):
    backend, device = where
    parts = [placed(t, device) for t in arguments((6, 5, 4, 3), generator, torch.float32)]
    parts[0].requires_grad_()
    options = {"activation": "relu", "lanes": LANES, "backend": backend}
    y, y2, penalty = bn_match_twice(*parts, 1e-5, **options)
    expected, expected_penalty = bn_match(*parts, 1e-5, **options)
    assert torch.equal(y, expected) and torch.equal(y2, expected) and torch.equal(penalty, expected_penalty)
    assert y2.data_ptr() == y.data_ptr() and y2.stride() == y.stride()


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("activation", "with_residual"), [("relu", True), ("silu", False)])
def test_chunks_of_a_batch_are_matched_as_the_whole(generator, where, activation, with_residual):
    """Lanes of 4 images, passed as 3 and 1."""
    backend, device = where
    sizes, shape = (3, 1), (4 * LANES, 6, 5, 3)
    parts, residual, upstream = drawn(generator, shape, torch.float32, with_residual)
    options = {"activation": activation, "lanes": LANES}
    exact = exact_gradients(parts, residual, upstream, r_var=3.0, **options)

    def chunks(tensor):
        if tensor is None:
            return [None] * len(sizes)
        return [part.flatten(0, 1).to(device) for part in tensor.view(LANES, 4, *shape[1:]).split(sizes, dim=1)]

    vectors, options = [v.to(device) for v in parts[1:]], options | {"backend": backend}
    pieces = list(zip(*(chunks(t) for t in (parts[0], residual, *upstream[:2])), strict=True))
    statistics = [bn_match_statistics(x, *vectors, 1e-5, residual=r, **options)[1] for x, r, *_ in pieces]
    found = [
        gradients((x, *vectors), r, (*grads, upstream[2].to(device) * size / 4), r_var=3.0,
                  whole=pooled(statistics, sizes), **options)
        for (x, r, *grads), size in zip(pieces, sizes, strict=True)
    ]  # fmt: skip
    for ours, expected in zip(zip(*found, strict=True), exact, strict=True):
        together = torch.cat([t.cpu().view(LANES, -1, *shape[1:]) for t in ours], dim=1).flatten(0, 1)
        assert relative_error(together, expected) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(native() is None, reason="no compiler")
@pytest.mark.parametrize("with_residual", [False, True])
def test_compiled_as_in_eager_mode(generator, with_residual):
    parts, residual, upstream = drawn(generator, (6, 5, 4, 3), torch.float32, with_residual)
    options = {"activation": "relu", "lanes": LANES, "backend": "native"}

    def loss(x, residual):
        outputs = bn_match_twice(x, *parts[1:], 1e-5, residual=residual, **options)
        return sum((output * grad.float()).sum() for output, grad in zip(outputs, upstream, strict=True))

    inputs, *given = leaves(parts[0], residual)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours, expected = (torch.autograd.grad(function(*given), inputs) for function in (compiled, loss))
    assert all(torch.equal(got, wanted) for got, wanted in zip(ours, expected, strict=True))
