"""max_pool: every backend against torch's own max_pool2d on the CPU, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from infer_fast.errors import InferFastError
from infer_fast.ops.max_pool import _backward, _empty_outputs, _forward, max_pool

BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("triton", "cpu"), marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="gpu"),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
CASES = [  # shape, kernel, stride, padding, ceil_mode
    ((2, 8, 12, 10), (3, 3), (2, 2), (1, 1), False),  # the ResNets'
    ((2, 8, 12, 10), (2, 2), (2, 2), (0, 0), False),  # VGG's: each pixel in one window
    ((1, 16, 9, 7), (3, 3), (2, 2), (0, 0), True),  # GoogLeNet's, with windows beyond the edge
    ((2, 5, 7, 9), (3, 2), (1, 3), (1, 0), True),  # windows that miss pixels, others that share them
    ((3, 4, 6, 5), (3, 3), (1, 1), (1, 1), False),
    ((1, 12, 5, 6), (5, 4), (1, 2), (2, 2), True),
    ((2, 3, 4, 4), (4, 4), (4, 4), (0, 0), False),  # one window
    ((2, 3, 1, 1), (1, 1), (1, 1), (0, 0), False),  # one pixel
    ((1, 1, 6, 5), (15, 15), (2, 1), (7, 7), False),
    ((1, 67, 5, 5), (2, 2), (3, 3), (1, 1), True),
    ((1, 8, 20, 14), (3, 3), (2, 2), (1, 1), False),  # more than one program an image
]


def both_ways(x, upstream, options, pool, device="cpu"):
    """(y, the gradient of x), on the CPU, of pool."""
    own = x.to(device).requires_grad_()
    y = pool(own, *options)
    return y.detach().cpu(), torch.autograd.grad(y, own, upstream(y))[0].cpu()


def torchs(x, kernel, stride, padding, ceil_mode):
    return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)


def ours(backend):
    return lambda x, *options: max_pool(x, *options[:3], ceil_mode=options[3], backend=backend)


@pytest.mark.parametrize("where", BACKENDS)
@layouts
@pytest.mark.parametrize("case", CASES, ids=[str(position) for position in range(len(CASES))])
def test_values_and_gradients_are_torchs_to_the_bit(generator, where, layout, case):
    backend, device = where
    shape, *options = case
    x = torch.randn(shape, generator=generator)
    x = torch.where(x < 0.5, x, x.ceil()).contiguous(memory_format=layout)  # with equal maxima
    grad = torch.randn(torchs(x, *options).shape, generator=generator)
    expected = both_ways(x, lambda y: grad, options, torchs)
    got = both_ways(x, lambda y: grad.to(y.device), options, ours(backend), device)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert got[0].stride() == expected[0].stride() and got[1].stride() == expected[1].stride()


@pytest.mark.parametrize("where", BACKENDS)
@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32(generator, where, layout, dtype):
    backend, device = where
    x = torch.randn(1, 8, 6, 7, generator=generator).to(dtype).contiguous(memory_format=layout)
    options = (3, 3), (1, 1), (1, 1), False
    grad = torch.randn(1, 8, 6, 7, generator=generator).to(dtype)
    y, exact = both_ways(x.float(), lambda y: grad.float(), options, torchs)
    got = both_ways(x, lambda y: grad.to(y.device), options, ours(backend), device)
    assert torch.equal(got[0], y.to(dtype)) and got[0].dtype == got[1].dtype == dtype
    if backend == "triton":  # torch's own may round between summands, the interpreter cuts where a GPU rounds
        torch.testing.assert_close(got[1].float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("where", BACKENDS)
@layouts
def test_nan_wins_and_where_all_is_minus_infinity_the_first_pixel_is_chosen(generator, where, layout):
    backend, device = where
    x = torch.randn(2, 8, 8, 7, generator=generator)
    draw = torch.rand(x.shape, generator=generator)
    x[draw < 0.3], x[draw < 0.15], x[draw < 0.03] = -torch.inf, torch.nan, torch.inf
    x[0, 0], x[1, 0, 2:5, 2:5] = -torch.inf, torch.nan  # whole windows
    x, options = x.contiguous(memory_format=layout), ((3, 3), (2, 2), (1, 1), True)
    grad = torch.randn(torchs(x, *options).shape, generator=generator)
    expected = both_ways(x, lambda y: grad, options, torchs)
    got = both_ways(x, lambda y: grad.to(y.device), options, ours(backend), device)
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("where", BACKENDS)
def test_what_is_not_dense_is_served_all_the_same(generator, where):
    backend, device = where
    x, options = torch.randn(6, 8, 9, 4, generator=generator)[::2].transpose(2, 3), ((2, 3), (1, 2), (1, 0), False)
    strided = torch.randn(3, 8, 5, 9, generator=generator)[..., ::2][..., :4]
    expected = both_ways(x, lambda y: strided, options, torchs)
    got = both_ways(x, lambda y: strided.to(y.device), options, ours(backend), device)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.interpreter
@layouts
def test_a_byte_is_kept_for_each_output(generator, layout):
    x = torch.randn(2, 8, 8, 8, generator=generator).contiguous(memory_format=layout).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        y = max_pool(x, (3, 3), (2, 2), (1, 1), backend="triton")
    assert kept == [y.numel()]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "kernel", "padding"),
    [((1, 2, 20, 18), (16, 3), (0, 0)), ((2, 6, 5), (2, 2), (0, 0)), ((0, 2, 6, 5), (2, 2), (0, 0))],
    ids=["large window", "one image", "no image"],
)
def test_what_the_kernels_do_not_take_is_torchs(generator, shape, kernel, padding):
    x = torch.randn(shape, generator=generator)
    got = max_pool(x, kernel, (2, 2), padding, backend="triton")
    assert torch.equal(got, F.max_pool2d(x, kernel, 2, padding))


@pytest.mark.interpreter
@pytest.mark.parametrize(("kernel", "padding"), [((2, 2), (2, 0)), ((9, 2), (0, 0))], ids=["padding", "window"])
def test_a_window_that_does_not_fit_is_refused_as_torch_does(kernel, padding):
    with pytest.raises(RuntimeError):
        max_pool(torch.zeros(1, 2, 6, 6), kernel, (1, 1), padding, backend="triton")


def test_a_backend_that_can_not_serve_says_so():
    with pytest.raises(InferFastError, match="float64"):
        max_pool(torch.zeros(1, 2, 6, 6).double(), (2, 2), (2, 2), (0, 0), backend="triton")


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=[str(position) for position in range(len(CASES))])
def test_the_fake_has_torchs_shapes_and_layouts(layout, case):
    shape, *options = case
    x = torch.empty(shape, device="meta").contiguous(memory_format=layout)
    y, position = _empty_outputs(x, *options)
    expected = torchs(x, *options)
    assert (y.shape, position.shape, position.dtype) == (expected.shape, expected.shape, torch.uint8)
    assert y.stride() == expected.stride()


@pytest.mark.interpreter
def test_the_registered_operators_pass_opcheck(generator):
    x = torch.randn(2, 8, 7, 6, generator=generator).contiguous(memory_format=torch.channels_last).requires_grad_()
    window = [3, 3], [2, 2], [1, 1]
    torch.library.opcheck(_forward, (x, *window, False))
    y, position = _forward(x.detach(), *window, False)
    torch.library.opcheck(_backward, (torch.randn_like(y), position, *window, 7, 6, True))
