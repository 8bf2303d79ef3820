"""compose: every backend against plain loops over images."""

import pytest
import torch

from infer_fast.errors import InferFastError
from infer_fast.ops import Quantised, compose
from infer_fast.ops.backend import native

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("native", "cpu"), marks=pytest.mark.skipif(native() is None, reason="no compiler"), id="native"),
    pytest.param(("triton", "cpu"), marks=[pytest.mark.interpreter, pytest.mark.slow], id="interpreter"),
    pytest.param(("triton", "cuda"), marks=pytest.mark.gpu, id="gpu"),
]


def stored(generator, count=7, k=5, height=6, width=9):
    base = torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    values = torch.randint(0, 256, (k, 3, height, width), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(k, 3, generator=generator) / 255).half()
    offset = (torch.rand(k, 3, generator=generator) - 0.7).half()
    return base, Quantised(values, scale, offset)


def composed(where, base, base_index, compensators=None, index=None, **options):
    """compose on one backend's device, its result on the CPU."""
    backend, device = where
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    compensators = None if compensators is None else Quantised(*(t.to(device) for t in compensators))
    index = None if index is None else index.to(device)
    arguments = (base.to(device), base_index.to(device), compensators, index)
    return compose(*arguments, **moved, mean=MEAN, std=STD, backend=backend).cpu()


def by_hand(base, b, compensators, k, shift, flip):
    """One augmented image in float64 pixels, pixel by pixel."""
    pixels = base[b].double() / 255
    if k >= 0:
        dense = compensators.values[k].double() * compensators.scale[k].double().view(3, 1, 1)
        pixels = (pixels + dense + compensators.offset[k].double().view(3, 1, 1)).clamp(0, 1)
    out = torch.zeros_like(pixels)
    height, width = pixels.shape[1:]
    for y in range(height):
        for x in range(width):
            sy, sx = y + shift[0], x + shift[1]
            if 0 <= sy < height and 0 <= sx < width:
                out[:, y, x] = pixels[:, sy, sx]
    return out.flip(2) if flip else out


@pytest.mark.parametrize("where", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("size", [(6, 9), (1, 1), (5, 4)])
def test_equals_plain_loops(generator, where, dtype, tolerance, size):
    base, compensators = stored(generator, height=size[0], width=size[1])
    count = 40
    draw = lambda low, high, *s: torch.randint(low, high, s, generator=generator)  # noqa: E731
    base_index, index = draw(0, 7, count), draw(-1, 5, count)
    shift, flip = draw(-10, 11, count, 2), draw(0, 2, count).bool()
    lam, partner = torch.rand(count, generator=generator), torch.randperm(count, generator=generator)
    batch = composed(
        where, base, base_index, compensators, index,
        shift=shift, flip=flip, lam=lam, partner=partner, dtype=dtype,
    )  # fmt: skip
    alone = torch.stack(
        [
            by_hand(base, base_index[i], compensators, int(index[i]), shift[i].tolist(), bool(flip[i]))
            for i in range(count)
        ]
    )
    weight = lam.double().view(-1, 1, 1, 1)
    expected = weight * alone + (1 - weight) * alone[partner]
    expected = (expected - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
    assert batch.dtype == dtype
    assert (batch.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("where", BACKENDS)
def test_bare_images_and_an_empty_batch(generator, where):
    base, _ = stored(generator)
    batch = composed(where, base, torch.tensor([3, 3, 0]))
    restored = batch * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close(restored, base[[3, 3, 0]].float() / 255, atol=1e-6, rtol=1e-5)
    assert composed(where, base, torch.empty(0, dtype=torch.int64)).shape == (0, 3, 6, 9)


@pytest.mark.parametrize("where", BACKENDS)
def test_huge_shifts_give_black(generator, where):
    base, _ = stored(generator)
    shift = torch.tensor([[2**62, 0], [0, -(2**62)]])
    batch = composed(where, base, torch.tensor([0, 1]), shift=shift)
    black = (-torch.tensor(MEAN) / torch.tensor(STD)).view(1, 3, 1, 1)
    torch.testing.assert_close(batch, black.expand_as(batch))


def test_indices_out_of_range_are_errors(generator):
    base, compensators = stored(generator)
    zero = torch.tensor([0])
    with pytest.raises(InferFastError, match="base_index"):
        compose(base, torch.tensor([7]), mean=MEAN, std=STD)
    with pytest.raises(InferFastError, match="compensator_index"):
        compose(base, zero, compensators, torch.tensor([5]), mean=MEAN, std=STD)
    with pytest.raises(InferFastError, match="partner"):
        compose(base, zero, lam=torch.ones(1), partner=torch.tensor([1]), mean=MEAN, std=STD)
    with pytest.raises(InferFastError, match="uint8"):
        compose(base.float(), zero, mean=MEAN, std=STD)
    with pytest.raises(InferFastError, match="together"):
        compose(base, zero, lam=torch.ones(1), mean=MEAN, std=STD)


@pytest.mark.skipif(native() is None, reason="no compiler")
def test_native_module_checks_for_itself():
    with pytest.raises(ValueError, match="null"):
        native().compose([(0, 0)] * 11, False, 1, 1, 0, 4, 4, MEAN, STD, 1)
    with pytest.raises(ValueError, match="threads"):
        native().compose([(0, 0)] * 11, False, 0, 0, 0, 0, 0, MEAN, STD, 0)
