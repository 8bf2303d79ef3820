"""bn_match: every backend against the float64 reference, and the reference against BatchNorm and autograd."""

import math

import pytest
import torch
from torch.nn import functional as F

from infer_fast.errors import InferFastError
from infer_fast.ops import bn_match, bn_match_statistics
from infer_fast.ops.backend import native
from infer_fast.ops.bn_match import pooled
from infer_fast.ops.bn_match_operator import _backward, _forward

SHAPES = [
    (6, 5, 4, 3),
    (3, 1, 7, 7),
    (3, 4, 1, 1),
    (12, 2, 1, 9),
    (3, 16, 13, 11),
    (3, 67, 9, 5),
    (6, 70, 3, 3),
    (3, 3, 70, 65),
    (3, 1, 1, 1),
    (33, 3, 16, 16),
    (6, 35, 4, 4),
    (6, 40, 3, 3),
]
ACTIVATIONS = ["none", "relu", "relu6", "silu"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DEVICES = [
    pytest.param(("native", "cpu"), marks=pytest.mark.skipif(native() is None, reason="no compiler"), id="native"),
    pytest.param(("triton", "cpu"), marks=[pytest.mark.interpreter, pytest.mark.slow], id="interpreter"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="gpu"),
]
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 1e-2)}


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def arguments(shape, generator, dtype=torch.float64):
    """x, weight, bias, running_mean, running_var; x already rounded to dtype, so that backends see the same values."""
    c = shape[1]
    x = (3 * draw(generator, *shape) + 1).to(dtype)
    vectors = [draw(generator, c), draw(generator, c), draw(generator, c), draw(generator, c).abs() + 0.1]
    return x, *[v.float().to(torch.promote_types(dtype, torch.float32)) for v in vectors]


def value_and_gradients(parts, residual, upstream, **options):
    """y, penalty, grad_x, grad_residual of one backend; upstream: gradients of y and penalty."""
    x = parts[0].clone(memory_format=torch.preserve_format).requires_grad_()
    inputs = [x]
    if residual is not None:
        residual = residual.clone(memory_format=torch.preserve_format).requires_grad_()
        inputs.append(residual)
    y, penalty = bn_match(x, *parts[1:], 1e-5, residual=residual, **options)
    loss = (y * upstream[0].to(y.dtype)).sum() + (penalty * upstream[1].to(penalty.dtype)).sum()
    return y, penalty, *torch.autograd.grad(loss, inputs)


def away_from_corners(parts, residual):
    """0 where rounding can move the activation's input over a corner (two right answers differ by a whole gradient)."""
    z, _ = bn_match(*parts, 1e-5, residual=residual)
    return (z.abs() > 1e-5) & ((z - 6).abs() > 1e-5)


def relative_error(ours, exact, least=0.0):
    """Norm of the difference over norm; least: what an element's share of the norm counts as, at least."""
    exact = exact.double()
    floor = max(1e-30, least * exact.numel() ** 0.5)
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=floor)).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_output_is_batch_norm_then_residual_then_activation(generator, shape, activation, with_residual):
    x, weight, bias, mean, var = arguments(shape, generator)
    residual = draw(generator, *shape) if with_residual else None
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
    residual = draw(generator, *x.shape).requires_grad_()

    def function(x, residual):
        return bn_match(
            x, weight, bias, mean, var, 1e-5, residual=residual, activation=activation, lanes=3, backend="reference"
        )

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), residual))


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lanes", [1, 3])
def test_backends_equal_the_float64_reference(generator, where, shape, layout, dtype, lanes):
    backend, device = where
    slow = (backend, device) == ("triton", "cpu")
    if slow and (math.prod(shape) > 8000 or (lanes == 1 and shape != SHAPES[0])):
        pytest.skip("too slow in the interpreter")
    if slow and shape[1] == 70 and (layout, dtype) == ("contiguous", torch.bfloat16):
        pytest.skip("too slow in the interpreter: a program for each channel and lane")
    parts = arguments(shape, generator, dtype)
    exact_parts = [p.double() for p in parts]
    parts = [p.to(device) for p in parts]
    parts[0] = parts[0].contiguous(memory_format=LAYOUTS[layout])
    upstream = draw(generator, *shape).to(dtype), draw(generator, lanes)
    for activation in ACTIVATIONS:
        for with_residual in (False, True):
            if slow and with_residual != (ACTIVATIONS.index(activation) % 2 == 0):
                continue  # the interpreter takes half of the combinations
            residual = draw(generator, *shape).to(dtype) if with_residual else None
            options = {"activation": activation, "lanes": lanes, "r_var": 11.0}
            on_device = None if residual is None else residual.to(device).contiguous(memory_format=LAYOUTS[layout])
            exact_residual = None if residual is None else residual.double()
            given = upstream[0] * away_from_corners(exact_parts, exact_residual), upstream[1]
            ours = value_and_gradients(parts, on_device, [u.to(device) for u in given], backend=backend, **options)
            exact = value_and_gradients(exact_parts, exact_residual, given, backend="reference", **options)
            assert ours[0].dtype == dtype and ours[0].stride() == parts[0].stride()
            forward, gradient = TOLERANCE[dtype]
            # y adds terms around 1: where all of a few elements cancel, their rounding is all there is to compare.
            for got, expected, tolerance, least in zip(
                ours, exact, (forward, 1e-5, gradient, gradient), (0.1, 0.0, 0.0, 0.0), strict=False
            ):
                assert relative_error(got.cpu(), expected, least) <= tolerance, (activation, with_residual)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_huge_means_do_not_cancel_and_tiny_variances_count(generator, where, layout):
    """Mean 1e4 with variance 1, and mean 1 with variance 1e-8, in float32: as in float64."""
    backend, device = where
    for level, spread in ((1e4, 1.0), (1.0, 1e-4)):
        x = (level + spread * draw(generator, 32, 3, 8, 8)).float().contiguous(memory_format=LAYOUTS[layout])
        mean, var = torch.full((3,), level), torch.full((3,), spread**2 * 1.5)
        parts = [x, torch.ones(3), torch.zeros(3), mean, var]
        upstream = torch.zeros_like(x), torch.ones(1)
        _, penalty, gradient = value_and_gradients(
            [p.to(device) for p in parts], None, [u.to(device) for u in upstream], backend=backend
        )
        _, exact, exact_gradient = value_and_gradients([p.double() for p in parts], None, upstream)
        assert relative_error(penalty.cpu(), exact) < 1e-4
        assert relative_error(gradient.cpu(), exact_gradient) < 1e-3


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, inside the interpreter
def test_nan_and_inf_propagate_as_the_references_do(generator, where, layout, activation, with_residual):
    backend, device = where
    parts = list(arguments((4, 5, 3, 3), generator, torch.float32))
    x = parts[0]
    x[0, 0, 0, 0], x[0, 1, 1, 1], x[1, 2, 2, 2] = float("nan"), float("inf"), -float("inf")
    x[1, 3, 0, 0] = 1e38
    parts = [p.to(device) for p in (x.contiguous(memory_format=LAYOUTS[layout]), *parts[1:])]
    residual = torch.zeros_like(parts[0]) if with_residual else None
    upstream = torch.ones_like(parts[0]), torch.ones(2, device=device)
    options = {"activation": activation, "lanes": 2}
    ours = value_and_gradients(parts, residual, upstream, backend=backend, **options)
    exact = value_and_gradients(parts, residual, upstream, backend="reference", **options)
    assert ours[1][0].isnan() and ours[1][1].isfinite() and exact[1][0].isnan()
    for position in (0, 3):  # y and the residual's gradient, element by element
        if position < len(ours):
            assert torch.equal(ours[position].isnan(), exact[position].isnan())
            assert torch.equal(ours[position].isinf(), exact[position].isinf())
    assert ours[2][2:].isfinite().all() and exact[2][2:].isfinite().all()  # lane 1 is not disturbed
    assert ours[2][:2].isnan().any() and exact[2][:2].isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("with_whole", [False, True])
def test_registered_operators_pass_opcheck(generator, where, activation, with_whole):
    backend, device = where
    x, *vectors = (t.to(device) for t in arguments((4, 3, 5, 5), generator, torch.float32))
    whole = [torch.rand(2, 3, device=device) for _ in range(2)] if with_whole else [None, None]
    for residual in (None, torch.randn_like(x, requires_grad=True)):
        inputs = (x.clone().requires_grad_(), residual, *vectors, *whole, 1e-5, activation, 2, 3.0, backend)
        torch.library.opcheck(_forward, inputs)
        y, penalty, *statistics = _forward(*inputs)
        kept = residual.detach() if residual is not None and activation == "silu" else None
        ones, penalty_ones = torch.ones_like(y.detach()), torch.ones_like(penalty.detach())
        for grads in ((ones, None, penalty_ones), (ones, ones.clone(), penalty_ones)):
            given = (*grads, x, kept, *vectors, *statistics, 1e-5, activation, 2, 3.0, backend, residual is not None)
            torch.library.opcheck(_backward, given)


@pytest.mark.slow
@pytest.mark.skipif(native() is None, reason="no compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_knows_the_size_of_the_mask(generator, layout, dynamic):
    """Traced without values, for one batch size and then another: y and gradients as in eager mode."""
    function = torch.compile(value_and_gradients, backend="aot_eager", dynamic=dynamic)
    for shape in ((6, 5, 3, 3), (4, 5, 3, 3), (4, 5, 7, 9)):
        parts = arguments(shape, generator, torch.float32)
        x, residual = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (parts[0], draw(generator, *shape).float()))
        upstream = torch.ones(shape), torch.ones(2)
        options = {"activation": "relu", "lanes": 2, "backend": "native"}
        ours = function((x, *parts[1:]), residual, upstream, **options)
        exact = value_and_gradients((x, *parts[1:]), residual, upstream, **options)
        for got, expected in zip(ours, exact, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.skipif(native() is None, reason="no compiler")
def test_only_x_and_one_bit_per_element_are_kept(generator):
    x, *vectors = arguments((4, 8, 16, 16), generator, torch.float32)
    for residual, mask in ((None, 0), (torch.randn(x.shape), x.numel() // 8)):
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            bn_match(x.clone().requires_grad_(), *vectors, 1e-5, residual=residual, activation="relu", backend="native")
        assert sum(kept.values()) <= x.nbytes + mask + 6 * 8 * 4 + 8


@pytest.mark.parametrize("where", [pytest.param(("reference", "cpu"), id="reference"), *DEVICES])
@pytest.mark.parametrize(
    ("layout", "activation", "with_residual"), [("contiguous", "relu", True), ("channels_last", "silu", False)]
)
def test_chunks_of_a_batch_are_matched_as_the_whole(generator, where, layout, activation, with_residual):
    """2 lanes of 7 images, passed as 3, 3 and 1: penalty and gradients of the whole in float64."""
    backend, device = where
    lanes, sizes = 2, (3, 3, 1)
    x, *vectors = arguments((14, 6, 5, 3), generator, torch.float32)
    residual = draw(generator, 14, 6, 5, 3).float() if with_residual else None
    upstream = draw(generator, 14, 6, 5, 3), torch.tensor([0.7, 1.3], dtype=torch.float64)
    options = {"activation": activation, "lanes": lanes}
    exact_residual = None if residual is None else residual.double()
    exact = value_and_gradients(
        (x.double(), *[v.double() for v in vectors]),
        exact_residual,
        upstream,
        backend="reference",
        r_var=3.0,
        **options,
    )

    def chunks(t):
        parts = t.view(lanes, 7, 6, 5, 3).split(sizes, dim=1)
        return [p.flatten(0, 1).to(device).contiguous(memory_format=LAYOUTS[layout]) for p in parts]

    vectors = [v.to(device) for v in vectors]
    residuals = [None] * 3 if residual is None else chunks(residual)
    options |= {"backend": backend}
    statistics = [
        bn_match_statistics(c, *vectors, 1e-5, residual=r, **options)[1]
        for c, r in zip(chunks(x), residuals, strict=True)
    ]
    whole = pooled(statistics, sizes)
    gradients = []
    for c, r, g, size in zip(chunks(x), residuals, chunks(upstream[0].float()), sizes, strict=True):
        scaled = g, upstream[1].to(device) * size / 7
        _, penalty, *both = value_and_gradients((c, *vectors), r, scaled, r_var=3.0, whole=whole, **options)
        assert relative_error(penalty.cpu(), exact[1]) < 1e-5
        gradients.append([t.cpu().view(lanes, size, 6, 5, 3) for t in both])
    for ours, expected in zip(zip(*gradients, strict=True), exact[2:], strict=True):
        assert relative_error(torch.cat(ours, dim=1).flatten(0, 1), expected) < 1e-4


def test_trained_weights_get_their_gradient(generator):
    """Only the reference has it; the default backend steps aside."""
    x, weight, bias, mean, var = arguments((4, 3, 5, 5), generator, torch.float32)
    weight.requires_grad_()
    y, _ = bn_match(x, weight, bias, mean, var, 1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    expected = ((x - mean.view(3, 1, 1)) * torch.rsqrt(var + 1e-5).view(3, 1, 1)).sum((0, 2, 3))
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


def test_an_empty_batch_gives_an_empty_output(generator):
    _, *vectors = arguments((4, 3, 5, 5), generator, torch.float32)
    y, penalty = bn_match(torch.empty(0, 3, 5, 5), *vectors, 1e-5)
    assert y.shape == (0, 3, 5, 5) and penalty.shape == (1,)


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


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("used", ["y", "penalty"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "operator"])
def test_an_output_that_nothing_depends_on_adds_nothing(generator, where, used, with_residual, compiled):
    backend, device = where
    parts = [t.to(device) for t in arguments((6, 5, 4, 3), generator, torch.float32)]
    residual = draw(generator, 6, 5, 4, 3).float().to(device) if with_residual else None

    def gradients(backend):
        inputs = [t.clone().requires_grad_() for t in (parts[0], residual) if t is not None]
        x, given = inputs[0], inputs[1] if with_residual else None
        if compiled and backend != "reference":
            y, penalty, *_ = _forward(x, given, *parts[1:], None, None, 1e-5, "relu", 3, 1.0, backend)
        else:
            y, penalty = bn_match(x, *parts[1:], 1e-5, residual=given, activation="relu", lanes=3, backend=backend)
        output = y if used == "y" else penalty
        return torch.autograd.grad(output.square().sum(), inputs, allow_unused=True, materialize_grads=True)

    for got, expected in zip(gradients(backend), gradients("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
