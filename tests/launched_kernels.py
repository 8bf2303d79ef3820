"""Counts what four matched teachers launch, and what Triton would compile for it, from shapes alone; needs no GPU.

    python -m tests.launched_kernels    # one line of JSON: launches of each layer, forms of each kernel

One lane of 100 images of 32x32, bfloat16, channels_last, forward and backward. A form is what Triton keys its compiled
kernels by: the kernel, its constants, the types of its arguments and what it is told about their values.
Its own program, for Triton must not have been imported with TRITON_INTERPRET set.
"""

from __future__ import annotations

import json
from collections import Counter
from unittest import mock

import torch
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from infer_fast.models import MatchedTeacher, build
from infer_fast.models.frozen import FrozenConv2d, FrozenLinear
from infer_fast.models.surgery import MatchedBatchNorm

TEACHERS = ("resnet18", "mobilenetv2", "efficientnet_b0", "shufflenet_g2")
IMAGES, SIZE = 100, 32
MULTIPROCESSORS = 132  # Hopper's


class Launches:
    """Stands in the place of Triton's launcher: remembers what was asked for."""

    def __init__(self) -> None:
        self.count = 0
        self.forms: set[str] = set()
        self.backend = make_backend(GPUTarget("cuda", 90, 32))

    def run(self, kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        _, specialization, options = bind(*args, **kwargs)
        self.count += 1
        self.forms.add(f"{kernel.__name__} {specialization} {sorted(options.items())}")


def convolve(conv: FrozenConv2d, x: torch.Tensor) -> torch.Tensor:
    """FrozenConv2d without autocast, which knows no tensors without values, and in the layout that it has with them."""
    return F.conv2d(x, conv.weight, conv.bias, *conv.rest).contiguous(memory_format=torch.channels_last)


def launch(name: str) -> int:
    """Runs one teacher forward and backward on tensors without values; how many BatchNorms it has."""
    teacher = MatchedTeacher(build(name, 100, (SIZE, SIZE)).to("meta", torch.bfloat16), backend="triton")
    x = torch.empty(IMAGES, 3, SIZE, SIZE, dtype=torch.bfloat16, device="meta", requires_grad=True)
    logits, penalty = teacher(x.contiguous(memory_format=torch.channels_last))
    (logits.float().sum() + penalty.sum()).backward()
    return sum(isinstance(module, MatchedBatchNorm) for module in teacher.modules())


if __name__ == "__main__":
    launches = Launches()
    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: launches.run(kernel, *args, **kwargs)),
        mock.patch.object(FrozenConv2d, "forward", convolve),
        mock.patch.object(FrozenLinear, "forward", lambda layer, x: F.linear(x, layer.weight, layer.bias)),
        mock.patch("infer_fast.ops.bn_match.choose", lambda *_: "triton"),
        mock.patch("infer_fast.kernels.bn_match.multiprocessors", lambda _: MULTIPROCESSORS),
    ):
        layers = sum(launch(name) for name in TEACHERS)
    forms = Counter(form.split()[0] for form in launches.forms)
    print(json.dumps({"launches_of_a_layer": launches.count / layers, "forms": dict(sorted(forms.items()))}))
