"""How much one iteration launches: ResNet-18, 100 images of 32x32, one lane, captured as auto has it."""

from __future__ import annotations

import torch

from infer_fast.models import build
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis.solver import Solver
from infer_fast.synthesis.views import draw_views
from tests.stand_in.record import idle, runtime

IMAGES, SIZE = 100, (32, 32)
# What it was seen to take, with torch 2.14. A change that lowers a number lowers it here; none may rise.
MOST = {
    "kernels, copies and fills of torch": 8,
    "calls of cuDNN and cuBLAS": 42,  # 20 convolutions and a linear layer, each way
    "launches of _forward": 20,  # one for each BatchNorm, and so are the next two
    "launches of _finish": 20,
    "launches of _backward": 20,
    "launches of _view": 1,
    "launches of _sum_back": 1,  # the view's gradient
    "launches of _look": 1,  # adam_'s two
    "launches of _update": 1,
    "launches of _lose": 1,  # lane_loss's two
    "launches of _slope": 1,
    "launches of Triton": 66,
    "variants of _forward": 6,  # compiled before the capture
    "variants of _finish": 1,
    "variants of _backward": 8,
    "variants of _view": 1,
    "variants of _sum_back": 1,
    "variants of _look": 1,
    "variants of _update": 1,
    "variants of _lose": 1,
    "variants of _slope": 1,
    "variants of Triton": 21,
    "tuned problems": 0,
}


def counted() -> dict[str, int]:
    """What the captured iteration takes, under MOST's names."""
    settings = SynthesisSettings(iterations=4)
    views = draw_views(0, 0, [0], iterations=settings.iterations, jitter=settings.jitter, size=SIZE)
    with idle() as record:
        device = torch.device("cuda")
        solver = Solver(build("resnet18", IMAGES, SIZE, seed=0).eval().to(device), settings=settings)
        base = torch.zeros(1, IMAGES, 3, *SIZE, device=device)
        loop = solver.prepare(base, views.to(device), torch.arange(IMAGES, device=device))
        assert loop.engine == "graph"
    kernels = {kernel for kernel, *_ in record.variants}
    return {
        "kernels, copies and fills of torch": runtime().stand_in_captured_nodes(),
        "calls of cuDNN and cuBLAS": record.captured_library.total(),
        **{f"launches of {kernel}": record.captured_launches[kernel] for kernel in kernels},
        "launches of Triton": record.captured_launches.total(),
        **{f"variants of {kernel}": sum(kernel == name for name, *_ in record.variants) for kernel in kernels},
        "variants of Triton": len(record.variants),
        "tuned problems": len(record.tuned),
    }


def check_an_iteration_takes_no_more_launches_and_variants_than_it_did():
    found = counted()
    more = {name: count for name, count in found.items() if count > MOST.get(name, 0)}
    assert not more, f"more than { ({name: MOST.get(name, 0) for name in more}) }: {more}"
    assert found["launches of Triton"] > 0 and found["kernels, copies and fills of torch"] > 0
