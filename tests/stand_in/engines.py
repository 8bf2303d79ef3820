"""solve() as a captured graph of Triton launches gives what eager PyTorch gives on the CPU."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from infer_fast.errors import InferFastWarning
from infer_fast.models import build
from infer_fast.models.execution import Execution
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis.solver import Solver
from tests.stand_in.emulation import emulated, value

SETTINGS = SynthesisSettings(iterations=5, lr=0.1, jitter=2, mean=(0.5,) * 3, std=(0.25,) * 3)
PLAIN = Execution("float32", "eager", "reference")
CLASSES, LANES = 4, 2


def trained(name: str, size: int) -> nn.Module:
    """A network whose BatchNorms have statistics of their own."""
    network = build(name, CLASSES, (size, size), seed=0).eval().requires_grad_(False)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return network


# Relative to the norm: Adam's first steps are as long where the gradient is all rounding.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}


def compare(
    network: nn.Module,
    size: int,
    settings: SynthesisSettings = SETTINGS,
    *,
    lanes: int | None = None,
    chunk: int | None = None,
    precision: str = "float32",
) -> Counter[str]:
    """LANES tasks of CLASSES images, by the engine and backend that auto chooses, and by neither; what was launched."""
    base = torch.randn(LANES, CLASSES, 3, size, size)
    want = Solver(copy.deepcopy(network), settings=settings, execution=replace(PLAIN, precision=precision)).solve(base)
    with emulated() as record:
        solver = Solver(
            copy.deepcopy(network).cuda(), settings=settings, execution=Execution(precision), lanes=lanes, chunk=chunk
        )
        got = value(solver.solve(base.cuda()))
        assert solver.execution.engine == "graph"
    assert record.captured_launches["_forward"] > 0 and record.captured_launches["_backward"] > 0
    difference = float((got - want).norm() / want.norm())
    assert difference <= TOLERANCE[precision], f"differs by {difference:.2g} of its norm"
    return record.captured_launches


def check_compensators_of_two_lanes_in_one_batch():
    compare(trained("convnet", 16), 16)


def check_one_lane_after_the_other_in_the_same_graph():
    compare(trained("convnet-residual", 16), 16, lanes=1)


def check_chunks():
    compare(trained("convnet-silu", 16), 16, chunk=3)


def check_smaller_compensators():
    compare(trained("convnet", 16), 16, replace(SETTINGS, compensator_size=6))


def check_images_with_tv_and_l2():
    compare(trained("convnet", 16), 16, replace(SETTINGS, optimise="images", tv_l2=1e-3, l2_scale=1e-3))


def check_weight_adjustment():
    compare(trained("convnet-separable", 16), 16, replace(SETTINGS, optimise="images", steps=3, rho=0.5, r_var=11.0))


def check_crops_of_64_pixels():
    compare(trained("convnet", 64), 64, replace(SETTINGS, iterations=4))


def check_bfloat16():
    compare(trained("convnet", 16), 16, precision="bfloat16")


class Reading(nn.Module):
    """A network whose way depends on a value, as no graph's can."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x if x.abs().max() > 0 else x + 1)


def check_a_teacher_that_cannot_be_captured_is_solved_eagerly():
    base, network = torch.randn(LANES, CLASSES, 3, 16, 16), Reading(trained("convnet", 16))
    want = Solver(network, settings=SETTINGS, execution=PLAIN).solve(base)
    with pytest.raises(AssertionError, match="read by the host inside a capture"), emulated():
        solver = Solver(copy.deepcopy(network).cuda(), settings=SETTINGS, execution=Execution("float32"))
        with pytest.warns(InferFastWarning, match="No CUDA graph of this teacher .* going on eager"):
            got = value(solver.solve(base.cuda()))
    assert solver.execution.engine == "eager"
    assert float((got - want).norm() / want.norm()) <= 1e-3


def check_resnet18():
    compare(trained("resnet18", 32), 32, replace(SETTINGS, iterations=2))


def check_resnet18_with_its_large_stem():
    launched = compare(trained("resnet18", 72), 72, replace(SETTINGS, iterations=2))
    assert launched["_pool"] == launched["_unpool"] > 0


def check_mobilenetv2():
    compare(trained("mobilenetv2", 32), 32, replace(SETTINGS, iterations=2))


def check_efficientnet_b0():
    compare(trained("efficientnet_b0", 32), 32, replace(SETTINGS, iterations=2))


def check_shufflenet_g2():
    compare(trained("shufflenet_g2", 32), 32, replace(SETTINGS, iterations=2))
