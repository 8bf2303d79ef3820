"""Whole synthesis runs: the published way, ours, and the floor of the same networks without any BatchNorm.

    python -m bench.distill --quick
    python -m bench.distill --output bench/results/distill-cpu.json

Times are milliseconds per iteration of all lanes, over whole `solve` calls with set-up (surgery, capture) included on
both sides; the published way solves the lanes one after another. The share is the floating-point operations an
iteration needs (forward and input gradient of the convolutions and matrix products) at the measured rate of a large
matrix product in the same precision, over the time taken. A GPU also runs the larger images and one whole synthesis.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import measure, published
from infer_fast.models import build
from infer_fast.models.engine import capture
from infer_fast.models.execution import Execution, at_precision, processor_has_bfloat16
from infer_fast.models.surgery import freeze_convolutions
from infer_fast.recipes import INFER_TEACHERS, RECIPES, SynthesisSettings
from infer_fast.synthesis import Views, draw_views
from infer_fast.synthesis.plan import make_plan
from infer_fast.synthesis.solver import Solver


@dataclass(frozen=True)
class Case:
    """What is solved: teachers, classes, square images of `size` pixels, lanes; iterations and rounds to time."""

    teachers: tuple[str, ...]
    classes: int
    size: int
    lanes: int
    iterations: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.classes} classes {self.size}x{self.size} x {self.lanes}"


QUICK = [Case(INFER_TEACHERS, 10, 32, 1, 2, 1)]
CPU = [Case(INFER_TEACHERS, 10, 32, 4, 20, 3), Case(INFER_TEACHERS, 100, 32, 1, 20, 2)]
GPU = [
    Case(INFER_TEACHERS, 100, 32, 1, 50, 2),
    Case(("resnet18",), 100, 224, 1, 20, 1),
    Case(INFER_TEACHERS, 100, 32, 9, 20, 1),
    Case(("resnet18",), 200, 64, 1, 20, 1),
    Case(("resnet18",), 1000, 224, 1, 5, 1),
    Case(INFER_TEACHERS, 10, 32, 9, 20, 1),
]
WHOLE_RUN = "cifar100-infer-ipc10"


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    precisions = ("float32", *("tf32",) * on_gpu, *("bfloat16",) * (on_gpu or processor_has_bfloat16()))
    rates = {p: measure.matmul_rate(p, 2048 if options.quick or not on_gpu else 8192) for p in precisions}
    rows: list[dict] = []

    def keep(row: dict) -> None:
        rows.append(row)
        measure.write(options.output, rows, flops_per_second=rates)

    if on_gpu and not options.quick:
        keep(whole_synthesis())
    for case in QUICK if options.quick else GPU if on_gpu else CPU:
        own = []
        for name in case.teachers:
            own.append(teacher_row(name, case, rates))
            keep(own[-1])
        if len(own) > 1:
            keep(total_row(own))
    print(f"matrix products {', '.join(f'{p} {r / 1e12:.2f} TFLOP/s' for p, r in rates.items())}, {measure.machine()}")
    print(measure.table(rows))


def teacher_row(name: str, case: Case, rates: dict[str, float]) -> dict:
    """Milliseconds per iteration of one teacher, each way in turn."""
    device = measure.device()
    teacher = build(name, case.classes, (case.size, case.size), seed=0).eval().to(device)
    base = torch.randn(case.lanes, case.classes, 3, case.size, case.size, device=device)
    settings = SynthesisSettings(iterations=case.iterations, lr=0.01, batch_size=case.classes)
    views = draw_views(0, 0, list(range(case.lanes)), iterations=case.iterations, jitter=settings.jitter).to(device)
    published_fits = agrees(name, teacher, base, settings, views)

    def the_published_way() -> None:
        for lane in range(case.lanes):
            published.solve(teacher, base[lane], settings, views.lane(lane))

    ways: dict[str, Callable[[], object]] = {"published": the_published_way} if published_fits else {}
    for precision in rates:
        ways[precision] = partial(ours, teacher, settings, precision, base, views)
        ways[f"floor {precision}"] = floor(teacher, base.flatten(0, 1), precision, case.iterations)
    taken = measure.milliseconds_in_turn(ways, case.rounds, warm_up=False)  # the check has warmed up
    return row(name, case, {way: t / case.iterations for way, t in taken.items()}, flops(teacher, base), rates)


def ours(
    teacher: nn.Module, settings: SynthesisSettings, precision: str, base: torch.Tensor, views: Views
) -> torch.Tensor:
    """The compensators (L, 3, H, W), from set-up on."""
    return Solver(teacher, settings=settings, execution=Execution(precision)).solve(base, views)


def agrees(name: str, teacher: nn.Module, base: torch.Tensor, settings: SynthesisSettings, views: Views) -> bool:
    """Both ways compute the same compensator: 3 iterations of lane 0 in float32. False: the published one won't fit."""
    views = Views(views.shift[:3, :1])  # the published way has shifts alone here
    settings = replace(settings, iterations=len(views.shift))
    try:
        expected = published.solve(teacher, base[0], settings, views)
    except torch.OutOfMemoryError:
        return False
    got = ours(teacher, settings, "float32", base[:1], views)[0]
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < 0.05:  # Adam turns the sign of a tiny gradient into a whole step: a few pixels may differ
        raise SystemExit(f"{name}: compensators differ by {error:.2g}")
    return True


def floor(teacher: nn.Module, images: torch.Tensor, precision: str, iterations: int) -> Callable[[], None]:
    """`iterations` passes, forward and input gradient, with no BatchNorm at all; one CUDA graph where there is CUDA."""
    bare = without_batch_norm(teacher)
    images = images.contiguous(memory_format=torch.channels_last)

    def once() -> None:
        x = images.detach().requires_grad_()
        with at_precision(images.device, precision):
            out = bare(x)
        torch.autograd.grad(out.float().square().mean(), x)

    step = capture(once, lambda: None) if images.is_cuda else once

    def run() -> None:
        for _ in range(iterations):
            step()

    return run


def flops(teacher: nn.Module, base: torch.Tensor) -> int:
    """Floating-point operations of one iteration: forward and input gradient, BatchNorm and the loss not counted."""
    bare = without_batch_norm(teacher)
    images = base[0, :2].clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        bare(images).sum().backward()
    return counter.get_total_flops() * base.shape[0] * base.shape[1] // 2


def row(name: str, case: Case, taken: dict[str, float], operations: int, rates: dict[str, float]) -> dict:
    best = min(rates, key=lambda p: taken[p])
    least = min(taken[f"floor {p}"] for p in rates)
    theirs = taken.get("published")
    return {
        "case": case.name,
        "teacher": name,
        "GFLOP": operations / 1e9,
        **{f"{way} ms": t for way, t in taken.items()},
        **{f"published / {p}": theirs and theirs / taken[p] for p in rates},
        "best": best,
        "published / best": theirs and theirs / taken[best],
        "published / floor": theirs and theirs / least,
        "share of matrix rate": operations / rates[best] / (taken[best] / 1e3),
        "seconds per image, 2000 iterations": 2 * taken[best] / (case.lanes * case.classes),
    }


def total_row(rows: list[dict]) -> dict:
    """The M = 4 cycle: times and operations add up, the best precision is chosen per teacher."""
    total = {key: sum(r[key] for r in rows) for key in rows[0] if key.endswith(" ms") or key == "GFLOP"}
    best = sum(r["published ms"] / r["published / best"] for r in rows)
    least = sum(r["published ms"] / r["published / floor"] for r in rows)
    at_rate = sum(r["share of matrix rate"] * r["published ms"] / r["published / best"] for r in rows)
    precisions = [key.removeprefix("published / ") for key in rows[0] if key.startswith("published / ")]
    return {
        "case": rows[0]["case"],
        "teacher": "all four",
        **total,
        **{f"published / {p}": total["published ms"] / total[f"{p} ms"] for p in precisions if f"{p} ms" in total},
        "best": "each one's",
        "published / best": total["published ms"] / best,
        "published / floor": total["published ms"] / least,
        "share of matrix rate": at_rate / best,
        "seconds per image, 2000 iterations": None,
    }


def whole_synthesis() -> dict:
    """All tasks of the CIFAR-100 ipc 10 recipe: ours whole, the published way for 20 iterations of each."""
    device, recipe = measure.device(), RECIPES[WHOLE_RUN]
    plan = make_plan(recipe, 100, (32, 32))
    settings, few = recipe.synthesis, SynthesisSettings(iterations=20, batch_size=100)
    own = theirs = operations = 0.0
    for name in plan.teachers:
        teacher = build(name, 100, (32, 32), seed=0).eval().to(device)
        base = torch.randn(plan.k, 100, 3, 32, 32, device=device)
        still = Views(torch.zeros(few.iterations, 1, 2, dtype=torch.int64))
        solver = Solver(teacher, settings=settings)
        taken = measure.milliseconds_in_turn(
            {
                "ours": partial(solver.solve, base),
                "published": partial(published.solve, teacher, base[0], few, still),
            },
            1,
            warm_up=False,
        )
        own += taken["ours"]
        theirs += taken["published"] * plan.k * settings.iterations / few.iterations
        operations += flops(teacher, base) * settings.iterations
    return {
        "case": WHOLE_RUN,
        "teacher": "all four",
        "GFLOP": operations / 1e9,
        "published ms": theirs,
        "ours ms": own,
        "published / best": theirs / own,
        "note": "whole run; published extrapolated from 20 iterations of each teacher",
    }


def without_batch_norm(teacher: nn.Module) -> nn.Module:
    """The same network with every BatchNorm2d an identity, frozen and channels_last: what no matching could beat."""
    network = copy.deepcopy(teacher).requires_grad_(False).to(memory_format=torch.channels_last)

    def strip(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            else:
                strip(child)

    strip(network)
    return freeze_convolutions(network)


if __name__ == "__main__":
    main()
