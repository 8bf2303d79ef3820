"""The ops against the published way and against what PyTorch needs without any penalty.

    python -m bench.ops --quick
    python -m bench.ops --output bench/results/ops-cpu.json

The floor of bn_match is 5 passes over the tensor (forward reads x and writes y, backward reads x and dy and writes dx);
the share is that floor at the measured copy bandwidth over the time taken.
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
    bandwidth = measure.copy_bandwidth(1 << 22 if options.quick else 1 << 26)
    rounds = 3 if options.quick else 9
    shapes = SHAPES[2:] if options.quick else SHAPES + GPU_SHAPES * torch.cuda.is_available()
    dtypes = [torch.float32, torch.bfloat16]
    rows = []
    with Apart() if measure.device().type == "cpu" else nullcontext() as apart:
        for shape, dtype, channels_last in product(shapes, dtypes, (False, True)):
            rows.append(bn_match_row(shape, channels_last, dtype, bandwidth, rounds, apart))
            measure.write(options.output, rows, copy_bandwidth=bandwidth)
        rows.append(perturb_row(bandwidth, rounds, apart))
    measure.write(options.output, rows, copy_bandwidth=bandwidth)
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, {measure.machine()}")
    print(measure.table(rows))


class Layer:
    """A BatchNorm2d, its input and what flows back, the same for the same arguments in every process; three ways to
    run BatchNorm + ReLU forward and backward, each giving the gradient of the input."""

    def __init__(self, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype):
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.norm = nn.BatchNorm2d(shape[1]).eval().requires_grad_(False).to(measure.device())
        assert self.norm.running_mean is not None and self.norm.running_var is not None  # kept unless told otherwise
        self.mean = self.norm.running_mean.normal_()
        self.var = self.norm.running_var.uniform_(0.5, 2)
        x = torch.randn(shape, device=measure.device())
        self.x = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
        self.upstream = torch.randn_like(self.x)
        self.one = torch.ones((), device=x.device)

    def published(self) -> torch.Tensor:
        """With the penalty, the published way."""
        y, penalty = published.batch_norm_relu(self.norm, self.x)
        return torch.autograd.grad((y, penalty), self.x, (self.upstream, self.one.to(penalty.dtype)))[0]

    def plain(self) -> torch.Tensor:
        """Without any penalty."""
        return torch.autograd.grad(F.relu(self.norm(self.x)), self.x, self.upstream)[0]

    def ours(self) -> torch.Tensor:
        """With the penalty, as bn_match."""
        n = self.norm
        y, penalty = bn_match(self.x, n.weight, n.bias, self.mean, self.var, n.eps, activation="relu")
        return torch.autograd.grad((y, penalty), self.x, (self.upstream, self.one.view(1)))[0]

    def away_from_kink(self) -> torch.Tensor:
        """Where rounding can't move ReLU's input over 0 (there, two right answers differ by a whole gradient)."""
        return self.norm(self.x.detach().float()).abs() > 64 * torch.finfo(self.x.dtype).eps


def published_layer(shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return Layer(shape, channels_last, dtype).published


def bn_match_row(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, bandwidth: float, rounds: int, apart: Apart | None
) -> dict:
    """Forward and backward of BatchNorm + ReLU + penalty: published, plain (no penalty), ours.

    apart: the published way runs there; a second time here too, with the memory kept as our programs keep it.
    """
    layer = Layer(shape, channels_last, dtype)
    expected, got = layer.published().double(), layer.ours().double()
    error = ((got - expected)[layer.away_from_kink()].norm() / expected.norm()).item()
    if error > (1e-4 if dtype == torch.float32 else 5e-2):
        raise SystemExit(f"bn_match {shape}: gradients differ by {error:.2g}")
    ways: dict[str, Callable[[], object]] = {"here": layer.published, "plain": layer.plain, "ours": layer.ours}
    if layer.x.is_cuda:  # solve replays a graph there: plain and ours are timed so, and ours also as eager code
        ways |= {"eager": layer.ours, "plain": capture(layer.plain, nothing), "ours": capture(layer.ours, nothing)}
    taken = in_turns(ways, rounds, apart, published_layer, shape, channels_last, dtype)
    floor = 1e3 * PASSES * layer.x.nbytes / bandwidth
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
    return measure.in_turns(timed, rounds, each=5)


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
    """One weight adjustment of all of ResNet-18's parameters: a loop over the parameters, and ours."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        network = build("resnet18", 100, (32, 32), seed=0).to(measure.device()).requires_grad_(False)
        self.params = list(network.parameters())
        self.grads = [torch.randn_like(p) for p in self.params]

    def published(self) -> None:
        published.perturb(self.params, self.grads, 1e-3)

    def ours(self) -> None:
        perturb_(self.params, self.grads, 1e-3)


def published_adjustment() -> Callable[[], None]:
    return Adjustment().published


def perturb_row(bandwidth: float, rounds: int, apart: Apart | None) -> dict:
    """One weight adjustment; the published way as in bn_match_row."""
    adjustment = Adjustment()
    ways = {"here": adjustment.published, "ours": adjustment.ours}
    taken = in_turns(ways, rounds, apart, published_adjustment)
    passes = 4 * sum(p.nbytes for p in adjustment.params)  # the gradient twice, the parameter read and written
    return {
        "op": "perturb_",
        "shape": f"resnet18, {len(adjustment.params)} tensors",
        "dtype": "float32",
        "layout": "-",
        **published_columns(taken),
        "ours ms": taken["ours"],
        **ratios(taken),
        "share of copy bandwidth": 1e3 * passes / bandwidth / taken["ours"],
    }


if __name__ == "__main__":
    main()
