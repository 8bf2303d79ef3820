"""The ops against the published way and against what PyTorch needs without any penalty.

    python -m bench.ops --quick
    python -m bench.ops --output bench/results/ops-cpu.json

The floor of bn_match is 5 passes over the tensor (forward reads x and writes y, backward reads x and dy and writes dx);
the share is that floor at the measured copy bandwidth over the time taken. No cache helps: as in a network, one call
goes forward through many layers and then backward, and the figure is a layer's. Their inputs alone hold twice the
last-level cache (the GPU's L2 or the processor's largest cache; 64 MiB at least, 1 GiB at most, printed with the
result), so that backward finds nothing there of what forward has left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from bench import measure, published
from bench.apart import Apart
from infer_fast.models import build
from infer_fast.models.engine import capture
from infer_fast.ops import bn_match, perturb_

SHAPES = [(64, 64, 32, 32), (64, 256, 8, 8), (64, 16, 32, 32), (64, 512, 4, 4)]
GPU_SHAPES = [(256, 64, 32, 32), (256, 64, 56, 56), (256, 512, 14, 14), (256, 2048, 7, 7)]
PASSES = 5


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0])
    bandwidth, rotated = measure.copy_bandwidth(), measure.rotated_bytes()
    limits = {"copy_bandwidth": bandwidth, "rotated_bytes": rotated}
    rounds = 2 if options.quick else 9
    shapes = SHAPES[2:] if options.quick else GPU_SHAPES * torch.cuda.is_available() + SHAPES
    dtypes = [torch.float32, torch.bfloat16]
    rows = []
    with Apart() if measure.device().type == "cpu" else nullcontext() as apart:
        for shape, dtype, channels_last in product(shapes, dtypes, (False, True)):
            rows.append(bn_match_row(shape, channels_last, dtype, bandwidth, rounds, apart))
            measure.write(options.output, rows, **limits)
            measure.free()
        rows.append(perturb_row(bandwidth, rounds, apart))
    measure.write(options.output, rows, **limits)
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, {rotated >> 20} MiB of inputs, {measure.machine()}")
    print(measure.table(rows))


class Layers:
    """A BatchNorm2d and many inputs with what flows back, the same for the same arguments in every process; three ways
    to run BatchNorm + ReLU forward on all and then backward, each giving the first input's gradient."""

    def __init__(self, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype):
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.norm = nn.BatchNorm2d(shape[1]).eval().requires_grad_(False).to(measure.device())
        assert self.norm.running_mean is not None and self.norm.running_var is not None  # kept unless told otherwise
        self.mean = self.norm.running_mean.normal_()
        self.var = self.norm.running_var.uniform_(0.5, 2)
        x = torch.randn(shape, device=measure.device()).to(dtype).contiguous(memory_format=layout)
        upstream = torch.randn_like(x)
        self.one = torch.ones((), device=x.device)
        self.pairs = [(x.clone().requires_grad_(), upstream.clone()) for _ in range(measure.copies(x.nbytes))]

    @property
    def x(self) -> torch.Tensor:
        return self.pairs[0][0]

    def through(self, forward: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]) -> torch.Tensor:
        """forward(x) = (y,) or (y, penalty) of every input, then the gradient of each, in the same order."""
        outputs = [forward(x) for x, _ in self.pairs]
        gradients = []
        for (x, upstream), (y, *penalty) in zip(self.pairs, outputs, strict=True):
            flowing = [upstream, *(self.one.to(p.dtype).view(p.shape) for p in penalty)]
            gradients.append(torch.autograd.grad((y, *penalty), x, flowing)[0])
        return gradients[0]

    def published(self) -> torch.Tensor:
        """With the penalty, the published way."""
        return self.through(lambda x: published.batch_norm_relu(self.norm, x))

    def plain(self) -> torch.Tensor:
        """Without any penalty."""
        return self.through(lambda x: (F.relu(self.norm(x)),))

    def ours(self) -> torch.Tensor:
        """With the penalty, as bn_match."""
        n = self.norm
        return self.through(lambda x: bn_match(x, n.weight, n.bias, self.mean, self.var, n.eps, activation="relu"))

    def away_from_kink(self) -> torch.Tensor:
        """Where rounding can't move ReLU's input over 0 (there, two right answers differ by a whole gradient)."""
        return self.norm(self.x.detach().float()).abs() > 64 * torch.finfo(self.x.dtype).eps


def published_layers(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return Layers(shape, channels_last, dtype).published


def bn_match_row(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, bandwidth: float, rounds: int, apart: Apart | None
) -> dict:
    """Forward and backward of BatchNorm + ReLU + penalty: published, plain (no penalty), ours.

    apart: the published way runs there; a second time here too, with the memory kept as our programs keep it.
    """
    layers = Layers(shape, channels_last, dtype)
    expected, got = layers.published().double(), layers.ours().double()
    error = ((got - expected)[layers.away_from_kink()].norm() / expected.norm()).item()
    if error > (1e-4 if dtype == torch.float32 else 5e-2):
        raise SystemExit(f"bn_match {shape}: gradients differ by {error:.2g}")
    ways: dict[str, Callable[[], object]] = {"here": layers.published, "plain": layers.plain, "ours": layers.ours}
    if layers.x.is_cuda:  # solve replays a graph there: plain and ours are timed so, and ours also as eager code
        ways |= {"eager": layers.ours, "plain": capture(layers.plain, nothing), "ours": capture(layers.ours, nothing)}
    taken = in_turns(ways, rounds, apart, published_layers, shape, channels_last, dtype)
    taken = {way: t / len(layers.pairs) for way, t in taken.items()}
    floor = 1e3 * PASSES * layers.x.nbytes / bandwidth
    return {
        "op": "bn_match + ReLU",
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": "channels_last" if channels_last else "contiguous",
        **published_columns(taken),
        "plain, no penalty ms": taken["plain"],
        "ours ms": taken["ours"],
        **({"ours, eager ms": taken["eager"]} if "eager" in taken else {}),
        **ratios(taken),
        "plain / ours": taken["plain"] / taken["ours"],
        "share of copy bandwidth": floor / taken["ours"],
    }


def nothing() -> None:
    """What a graph's warm-up changes here, and has to be put back."""


def in_turns(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    apart: Apart | None,
    build: Callable[..., Callable[[], object]],
    *arguments: object,
) -> dict[str, float]:
    """Median milliseconds of each of `ways`, and of the published way that build(*arguments) makes in `apart`."""
    timed: dict[str, Callable[[int], list[float]]] = {
        name: partial(measure.milliseconds, way) for name, way in ways.items()
    }
    if apart is not None:
        apart.make(build, *arguments)
        timed = {"apart": apart.milliseconds, **timed}
    return measure.in_turns(timed, rounds, each=2)


def published_columns(taken: dict[str, float]) -> dict[str, float]:
    """published: as its users run it. On a CPU that is a process with the C library's way with freed memory; the second
    column is the same code in our process, which keeps it."""
    if "apart" not in taken:
        return {"published ms": taken["here"]}
    return {"published ms": taken["apart"], "published, memory kept ms": taken["here"]}


def ratios(taken: dict[str, float]) -> dict[str, float]:
    columns = published_columns(taken)
    return {f"{name.removesuffix(' ms')} / ours": value / taken["ours"] for name, value in columns.items()}


class Adjustment:
    """Weight adjustments of all of ResNet-18's parameters, one network after another: a loop over the parameters, and
    ours."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        network = build("resnet18", 100, (32, 32), seed=0).to(measure.device()).requires_grad_(False)
        params = list(network.parameters())
        self.nbytes = sum(p.nbytes for p in params)
        self.networks = [
            ([p.clone() for p in params], [torch.randn_like(p) for p in params])
            for _ in range(measure.copies(2 * self.nbytes))
        ]

    def published(self) -> None:
        for params, grads in self.networks:
            published.perturb(params, grads, 1e-3)

    def ours(self) -> None:
        for params, grads in self.networks:
            perturb_(params, grads, 1e-3)


def published_adjustment() -> Callable[[], None]:
    return Adjustment().published


def perturb_row(bandwidth: float, rounds: int, apart: Apart | None) -> dict:
    """One weight adjustment; the published way as in bn_match_row.

    The floor is 4 passes over the parameters (the gradient read twice, the parameter read and written), 3 where a cache
    could hold the gradients until they are read again.
    """
    adjustment = Adjustment()
    ways = {"here": adjustment.published, "ours": adjustment.ours}
    taken = in_turns(ways, rounds, apart, published_adjustment)
    taken = {way: t / len(adjustment.networks) for way, t in taken.items()}
    passes = 4 if adjustment.nbytes > measure.last_level_cache() else 3
    return {
        "op": "perturb_",
        "shape": f"resnet18, {len(adjustment.networks[0][0])} tensors",
        "dtype": "float32",
        "layout": "-",
        **published_columns(taken),
        "ours ms": taken["ours"],
        **ratios(taken),
        "share of copy bandwidth": 1e3 * passes * adjustment.nbytes / bandwidth / taken["ours"],
    }


if __name__ == "__main__":
    main()
