"""The native module: wrong arguments end in exceptions, every instruction set gives the same answer."""

import random
from functools import partial
from itertools import product

import pytest
import torch

from infer_fast.errors import InferFastError
from infer_fast.ops import Quantised, bn_match, compose, perturb_
from infer_fast.ops.backend import buffer, native

from ..conftest import SEED

pytestmark = pytest.mark.skipif(native() is None, reason="no compiler")
CALLS = 10_000


@pytest.fixture
def as_before():
    """Puts back what the tests below change for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native().limit_instruction_set(2)
    native().stream_results_from(-1)


# Planes of a few elements, of some, of many; several groups of images, and small planes of several images together;
# blocks of rows; a tail everywhere.
SHAPES = [
    (6, 5, 3, 3),
    (4, 16, 9, 8),
    (4, 70, 1, 3),
    (22, 3, 16, 16),
    (4, 70, 4, 4),
    (38, 9, 4, 4),
    (38, 3, 7, 7),
    (2, 3, 31, 33),
]


def every_way(shape, layout, dtype, generator):
    """For each activation, with and without a residual: a function that gives y, penalty and gradients in float64."""
    c = shape[1]
    vectors = [torch.randn(c, generator=generator) for _ in range(3)] + [torch.rand(c, generator=generator) + 0.1]
    x, given = (torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout) for _ in range(2))

    def answer(activation, with_residual):
        inputs = [
            t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, given)[: 1 + with_residual]
        ]
        residual = inputs[1] if with_residual else None
        options = {"residual": residual, "activation": activation, "lanes": 2, "backend": "native"}
        y, penalty = bn_match(inputs[0], *vectors, 1e-5, **options)
        # Level where y is 0 or 6: there, rounding may put an element on either side of an activation's corner.
        loss = (y.float() * (6 - y.float())).square().sum()
        grads = torch.autograd.grad(loss + penalty.sum(), inputs)
        return [t.detach().double() for t in (y, penalty, *grads)]

    return [partial(answer, a, r) for a in ("none", "relu", "relu6", "silu") for r in (False, True)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_gives_the_same_answer(generator, as_before, layout, shape):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for way in every_way(shape, layout, dtype, generator):
            results = []
            for limit, stream_from in product((0, 1, 2), (-1, 0)):
                native().limit_instruction_set(limit)
                native().stream_results_from(stream_from)
                results.append(way())
            for other in results[1:]:
                for a, b in zip(results[0], other, strict=True):
                    assert (a - b).norm() <= tolerance * a.norm()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [*SHAPES, (34, 40, 16, 16)])
def test_threads_and_writes_past_the_caches_change_no_bit(generator, as_before, layout, shape):
    for dtype in (torch.float32, torch.bfloat16):
        for way in every_way(shape, layout, dtype, generator):
            ended = []
            for stream_from in (-1, 0):
                native().stream_results_from(stream_from)
                results = []
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    results.append(way())
                for other in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
                ended.append(results[0])
            # float32 in channels_last then goes by longer rows: y stays, the statistics are added in another order.
            reordered = dtype == torch.float32 and layout == torch.channels_last
            for position, (a, b) in enumerate(zip(*ended, strict=True)):
                assert (a - b).norm() <= 1e-5 * a.norm() if reordered and position else torch.equal(a, b)


def test_the_mask_has_a_bit_for_each_element_and_ends_at_bytes():
    """An image of small planes, a larger plane, or a channels_last lane begins at a byte of its own."""
    of = native().bn_match_mask_bytes  # lanes, images of a lane, channels, plane, channels_last
    assert [of(2, 3, 5, 9, False), of(2, 3, 5, 35, False), of(2, 3, 5, 9, True)] == [6 * 6, 6 * 5 * 5, 2 * 17]
    assert of(2, 0, 5, 9, True) == 0
    for sizes in ((2, -3, 5, 9), (2**31, 2**31, 2**31, 1)):
        with pytest.raises(ValueError, match="bn_match"):
            of(*sizes, False)


def random_tensor(chooser):
    """A tensor of any shape (sizes of 0 and 1 among them), dtype and layout."""
    shape = [chooser.choice([0, 1, 1, 2, 3, 5, 8]) for _ in range(chooser.choice([1, 2, 3, 4, 4, 4, 4, 5]))]
    dtype = chooser.choice(
        [torch.float32] * 4 + [torch.bfloat16] * 2 + [torch.float64, torch.int64, torch.uint8, torch.bool]
    )
    tensor = (torch.rand(shape) * 3).to(dtype)
    if len(shape) > 1 and chooser.random() < 0.3:
        tensor = tensor.transpose(-1, -2)
    if shape and shape[0] > 1 and chooser.random() < 0.2:
        tensor = tensor[::2]
    if len(shape) == 4 and chooser.random() < 0.3:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def call_bn_match(chooser):
    x = random_tensor(chooser)
    c = x.shape[1] if x.dim() > 1 and chooser.random() < 0.9 else chooser.choice([0, 1, 3])
    vectors = [torch.rand(c).to(chooser.choice([torch.float32] * 3 + [torch.float64])) for _ in range(4)]
    residual = chooser.choice([None, None, torch.rand(x.shape), random_tensor(chooser)])
    lanes = chooser.choice([1, 1, 2, 3, 0, -1])
    activation = chooser.choice(["none", "relu", "relu6", "silu", "tanh"])
    wants = x.is_floating_point() and chooser.random() < 0.7
    y, penalty = bn_match(
        x.requires_grad_(wants), *vectors, 1e-5, residual=residual, activation=activation, lanes=lanes,
        backend=chooser.choice([None, "native"]),
    )  # fmt: skip
    assert y.shape == x.shape and penalty.shape == (lanes,)
    if wants and x.numel():
        (grad,) = torch.autograd.grad(y.float().sum() + penalty.sum(), x)
        assert grad.shape == x.shape


def call_compose(chooser):
    count, k, h, w = (chooser.choice([0, 1, 2, 5]) for _ in range(4))
    base = torch.randint(0, 256, (count, chooser.choice([3, 3, 3, 1]), h, w), dtype=torch.uint8)
    index = torch.randint(-1, 6, (chooser.choice([0, 1, 4]),))
    b = len(index)
    maybe = lambda value: value if chooser.random() < 0.5 else chooser.choice([None, None, random_tensor(chooser)])  # noqa: E731
    parts = Quantised(torch.randint(0, 256, (k, 3, h, w), dtype=torch.uint8), torch.rand(k, 3), torch.rand(k, 3))
    batch = compose(
        base,
        index,
        chooser.choice([None, parts]),
        maybe(torch.randint(-2, 5, (b,))),
        shift=maybe(torch.randint(-9, 9, (b, 2))),
        flip=maybe(torch.rand(b) < 0.5),
        lam=maybe(torch.rand(b)),
        partner=maybe(torch.randint(0, max(1, b), (b,))),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        backend=chooser.choice([None, "native"]),
    )
    assert batch.shape == (b, 3, h, w) and batch.isfinite().all()


def call_perturb(chooser):
    params = [random_tensor(chooser) for _ in range(chooser.choice([0, 1, 3]))]
    grads = [torch.rand(p.shape) for p in params] if chooser.random() < 0.7 else [random_tensor(chooser)]
    perturb_(params, grads, chooser.random(), backend=chooser.choice([None, "native"]))


def call_directly(chooser):
    """The compiled functions themselves, with buffers of any size and numbers of any value."""
    number = lambda: chooser.choice([0, 1, 2, 3, 5, -1, 2**31, 2**62])  # noqa: E731
    tensors = [random_tensor(chooser).float().contiguous() for _ in range(13)]
    buffers = [buffer(chooser.choice([None, t, t])) for t in tensors]
    rest = (1e-5, 1.0, number(), number(), number(), number(), chooser.random() < 0.3, chooser.random() < 0.5)
    which = chooser.randrange(3)
    if which == 0:
        native().bn_match_forward(buffers[:11], *rest, chooser.randrange(-1, 5), chooser.choice([0, 1, 2]))
    elif which == 1:
        native().bn_match_backward(buffers, *rest, chooser.randrange(-1, 5), chooser.choice([0, 1, 2]))
    else:
        native().compose(buffers[:11], False, *(number() for _ in range(5)), (0, 0, 0), (1, 1, 1), 1)


@pytest.mark.slow
def test_random_calls_end_in_exceptions_or_answers():
    chooser = random.Random(SEED)
    torch.manual_seed(SEED)
    answers = 0
    for _ in range(CALLS):
        call = chooser.choice([call_bn_match, call_bn_match, call_compose, call_perturb, call_directly])
        try:
            call(chooser)
            answers += 1
        except (InferFastError, ValueError, TypeError, RuntimeError, IndexError):
            pass
    assert CALLS // 20 < answers < CALLS


def test_no_number_of_threads_takes_more_memory_than_threads_are_worth(generator, as_before, monkeypatch):
    """As OMP_NUM_THREADS can say it: each thread has memory of its own, and a few for each core are enough."""
    for way in every_way((6, 5, 3, 3), torch.contiguous_format, torch.float32, generator)[:2]:
        expected = way()
        with monkeypatch.context() as context:
            context.setattr(torch, "get_num_threads", lambda: 2**31 - 1)
            assert all(torch.equal(a, b) for a, b in zip(expected, way(), strict=True))
