"""The ops against the published way and against what PyTorch needs without any penalty.

    python -m bench.ops --quick
    python -m bench.ops --output bench/results/ops-cpu.json

The floor of bn_match is 5 passes over the tensor (forward reads x and writes y, backward reads x and dy and writes dx);
the share is that floor at the measured copy bandwidth over the time taken.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from bench import measure, published
from infer_fast.models import build
from infer_fast.ops import bn_match, perturb_

SHAPES = [(64, 64, 32, 32), (64, 256, 8, 8), (64, 16, 32, 32), (64, 512, 4, 4)]
GPU_SHAPES = [(256, 64, 32, 32), (256, 64, 56, 56), (256, 512, 14, 14), (256, 2048, 7, 7)]
PASSES = 5


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0])
    bandwidth = measure.copy_bandwidth(1 << 22 if options.quick else 1 << 26)
    rounds = 5 if options.quick else 25
    shapes = SHAPES[2:] if options.quick else SHAPES + GPU_SHAPES * torch.cuda.is_available()
    dtypes = [torch.float32, torch.bfloat16]
    rows = []
    for shape, dtype, channels_last in product(shapes, dtypes, (False, True)):
        rows.append(bn_match_row(shape, channels_last, dtype, bandwidth, rounds))
        measure.write(options.output, rows, copy_bandwidth=bandwidth)
    rows.append(perturb_row(bandwidth, rounds))
    measure.write(options.output, rows, copy_bandwidth=bandwidth)
    print(f"copy bandwidth {bandwidth / 1e9:.1f} GB/s, {measure.machine()}")
    print(measure.table(rows))


def bn_match_row(shape: tuple, channels_last: bool, dtype: torch.dtype, bandwidth: float, rounds: int) -> dict:
    """Forward and backward of BatchNorm + ReLU + penalty: published, plain (no penalty), ours."""
    norm = nn.BatchNorm2d(shape[1]).eval().requires_grad_(False).to(measure.device())
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape, device=measure.device()).to(dtype).contiguous(memory_format=layout).requires_grad_()
    upstream = torch.randn_like(x)
    one = torch.ones((), device=x.device)

    def the_published_way() -> torch.Tensor:
        y, penalty = published.batch_norm_relu(norm, x)
        return torch.autograd.grad((y, penalty), x, (upstream, one.to(penalty.dtype)))[0]

    def plain() -> torch.Tensor:
        return torch.autograd.grad(F.relu(norm(x)), x, upstream)[0]

    def ours() -> torch.Tensor:
        y, penalty = bn_match(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, activation="relu"
        )
        return torch.autograd.grad((y, penalty), x, (upstream, one.view(1)))[0]

    expected, got = the_published_way().double(), ours().double()
    error = ((got - expected)[away_from_kink(norm, x)].norm() / expected.norm()).item()
    if error > (1e-4 if dtype == torch.float32 else 5e-2):
        raise SystemExit(f"bn_match {shape}: gradients differ by {error:.2g}")
    taken = measure.milliseconds_in_turn({"published": the_published_way, "plain": plain, "ours": ours}, rounds)
    floor = 1e3 * PASSES * x.nbytes / bandwidth
    return {
        "op": "bn_match + ReLU",
        "shape": "x".join(map(str, shape)),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": "channels_last" if channels_last else "contiguous",
        "published ms": taken["published"],
        "plain, no penalty ms": taken["plain"],
        "ours ms": taken["ours"],
        "published / ours": taken["published"] / taken["ours"],
        "plain / ours": taken["plain"] / taken["ours"],
        "share of copy bandwidth": floor / taken["ours"],
    }


def away_from_kink(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Where rounding can't move ReLU's input over 0 (there, two right answers differ by a whole gradient)."""
    return norm(x.detach().float()).abs() > 64 * torch.finfo(x.dtype).eps


def perturb_row(bandwidth: float, rounds: int) -> dict:
    """One weight adjustment of all of ResNet-18's parameters: a loop over the parameters, and ours."""
    network = build("resnet18", 100, (32, 32), seed=0).to(measure.device()).requires_grad_(False)
    params = list(network.parameters())
    grads = [torch.randn_like(p) for p in params]
    taken = measure.milliseconds_in_turn(
        {
            "published": lambda: published.perturb(params, grads, 1e-3),
            "ours": lambda: perturb_(params, grads, 1e-3),
        },
        rounds,
    )
    passes = 4 * sum(p.nbytes for p in params)  # the gradient twice, the parameter read and written
    return {
        "op": "perturb_",
        "shape": f"resnet18, {len(params)} tensors",
        "dtype": "float32",
        "layout": "-",
        "published ms": taken["published"],
        "plain, no penalty ms": None,
        "ours ms": taken["ours"],
        "published / ours": taken["published"] / taken["ours"],
        "plain / ours": None,
        "share of copy bandwidth": 1e3 * passes / bandwidth / taken["ours"],
    }


if __name__ == "__main__":
    main()
