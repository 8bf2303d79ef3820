"""view: the kernels against the views that PyTorch's operators make, and their gradients against autograd."""

import pytest
import torch

from infer_fast.data.crops import draw_crops
from infer_fast.errors import InferFastError
from infer_fast.ops.view import _view, _view_backward, serves, view
from infer_fast.synthesis.views import Views, apply_view, seen

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreter, id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
LANES, ITERATIONS = 2, 3
SIZES = [(8, 8), (5, 7), (12, 10)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(generator, size, cropped):
    """Draws of all iterations, shifts in both directions and beyond the image among them."""
    shift = torch.randint(-20, 21, (ITERATIONS, LANES, 2), generator=generator)
    if not cropped:
        return Views(shift)
    crops = torch.stack([draw_crops(LANES, size, generator) for _ in range(ITERATIONS)])
    return Views(shift, crops, torch.rand(ITERATIONS, LANES, generator=generator) < 0.5)


def parts(generator, size, images=3):
    return (
        torch.randn(LANES, images, 3, *size, generator=generator),
        torch.randn(LANES, 1, 3, *size, generator=generator),
    )


def tolerance(dtype):
    return (
        {"rtol": 0, "atol": 3e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-8}
    )  # the interpreter cuts off


def ours(base, added, views, counter, device, dtype=torch.float32):
    views, at = views.to(torch.device(device)), torch.tensor([counter], device=device)
    added = None if added is None else added.to(device)
    return view(base.to(device), added, views.shift, views.crop, views.flip, at, dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cropped", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_those_of_the_reference(generator, device, cropped, size, dtype):
    base, added = parts(generator, size)
    views, counter = drawn(generator, size, cropped), int(torch.randint(0, ITERATIONS, (1,), generator=generator))
    found = ours(base, added, views, counter, device, dtype)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    exact = apply_view((base + added).double(), views.at(torch.tensor([counter]))).flatten(0, 1)
    torch.testing.assert_close(found.cpu().double(), exact, **tolerance(dtype))
    if not cropped and dtype == torch.float32:
        assert torch.equal(found.cpu(), apply_view(base + added, views.at(torch.tensor([counter]))).flatten(0, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cropped", [False, True])
@pytest.mark.parametrize("images", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_what_is_added_is_autograds(generator, device, cropped, images, dtype):
    size = (8, 6)
    base, added = parts(generator, size, images)
    views, grad = drawn(generator, size, cropped), torch.randn(LANES * images, 3, *size, generator=generator)
    leaf, exact = (t.requires_grad_() for t in (added.to(device), added.double()))
    (found,) = torch.autograd.grad(ours(base, leaf, views, 1, device, dtype), leaf, grad.to(device, dtype))
    whole = apply_view(base.double() + exact, views.at(torch.tensor([1]))).flatten(0, 1)
    (expected,) = torch.autograd.grad(whole, exact, grad.to(dtype).double())
    assert found.dtype == torch.float32 and found.shape == added.shape
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_of_optimised_images_is_their_own(generator, device, size):
    base, _ = parts(generator, size)
    views, grad = drawn(generator, size, cropped=False), torch.randn(LANES * 3, 3, *size, generator=generator)
    leaf = base.to(device).requires_grad_()
    (found,) = torch.autograd.grad(ours(leaf, None, views, 2, device), leaf, grad.to(device))
    exact = base.clone().requires_grad_()
    whole = apply_view(exact, views.at(torch.tensor([2]))).flatten(0, 1)
    assert torch.equal(found.cpu(), torch.autograd.grad(whole, exact, grad)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_a_chunk_of_the_images_is_seen_as_in_the_whole(generator, device):
    base, added = parts(generator, (8, 8), images=5)
    views = drawn(generator, (8, 8), cropped=True)
    whole = ours(base, added, views, 0, device).unflatten(0, (LANES, 5))
    part = ours(base.to(device)[:, 1:4], added, views, 0, device).unflatten(0, (LANES, 3))
    assert torch.equal(part, whole[:, 1:4])


@pytest.mark.interpreter
def test_the_solver_s_views_come_of_the_kernel_where_it_serves(generator, monkeypatch):
    base, added = parts(generator, (8, 8))
    at = drawn(generator, (8, 8), cropped=True).at(torch.tensor([1]))
    by_kernel = seen(base, added, at, torch.bfloat16, backend="triton")
    assert by_kernel.dtype == torch.bfloat16 and by_kernel.shape == base.shape
    assert "shift" not in vars(at)  # no draw was indexed
    plain = seen(base, added, at, torch.bfloat16)
    assert plain.dtype == torch.float32
    torch.testing.assert_close(by_kernel.float(), plain, rtol=2**-7, atol=2**-7)


@pytest.mark.interpreter
def test_what_can_be_served():
    base, crop = torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 1, 4)
    assert not serves(base, None, None, None) and serves(base, None, None, "triton")
    assert serves(base, base[:, :1], crop, "triton") and not serves(base, None, crop, "triton")
    assert not serves(base, base[:, :1], None, "reference")


def test_the_operators_fakes_have_the_kernels_shapes():
    with torch.device("meta"):
        base, added, shift = torch.empty(2, 5, 3, 8, 6), torch.empty(2, 1, 3, 8, 6), torch.empty(3, 2, 2).long()
        crop, flip, counter = torch.empty(3, 2, 4).long(), torch.empty(3, 2).bool(), torch.empty(1).long()
    out = _view(base, added, shift, crop, flip, counter, torch.bfloat16)
    assert out.shape == (10, 3, 8, 6) and out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    back = _view_backward(out, shift, crop, flip, counter, 2)
    assert back.shape == (2, 3, 8, 6) and back.dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"added": torch.zeros(2, 2, 3, 4, 4)}, "view takes base"),
        ({"base": torch.zeros(2, 3, 1, 4, 4)}, "view takes base"),
        ({"shift": torch.zeros(1, 3, 2).long()}, "draws of 2 lanes"),
        ({"flip": torch.zeros(1, 2).bool()}, "flips with crops"),
    ],
)
def test_shapes_that_do_not_fit_are_errors(changed, match):
    given = {
        "base": torch.zeros(2, 3, 3, 4, 4), "added": torch.zeros(2, 1, 3, 4, 4), "shift": torch.zeros(1, 2, 2).long(),
        "crop": None, "flip": None, "counter": torch.zeros(1).long(),
    }  # fmt: skip
    with pytest.raises(InferFastError, match=match):
        view(*(given | changed).values())
