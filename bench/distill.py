"""Whole synthesis runs: the published way, ours, and the floor of the same networks without any BatchNorm.

    python -m bench.distill --quick
    python -m bench.distill --output bench/results/distill-cpu.json

Times are milliseconds per iteration of all lanes at the steady pace; the published way solves the lanes one after
another, in PyTorch's default precision, as its users do. Set-up (copies, surgery, the first iterations, capture) has
columns of its own: seconds for all lanes. Each way is freed before the next one is made. The share is the
floating-point operations an iteration needs (forward and input gradient of the convolutions and matrix products) at the
measured rate of a large matrix product in the same precision, over the time taken. A GPU also runs the larger images
and one whole synthesis, set-up included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import measure, published
from infer_fast.models import build
from infer_fast.models.engine import capture
from infer_fast.models.execution import Execution, at_precision, processor_has_bfloat16
from infer_fast.models.frozen import freeze
from infer_fast.recipes import INFER_TEACHERS, RECIPES
from infer_fast.settings import SynthesisSettings
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
        for whole in whole_synthesis():
            keep(whole)
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
    ways: dict[str, Callable[[], Callable[[], object]]] = {}
    if agrees(name, teacher, base, settings, views):
        ways["published"] = partial(the_published_way, teacher, base, settings, views)
    measure.free()
    for precision in rates:
        ways[precision] = partial(ours, teacher, settings, precision, base, views)
        ways[f"floor {precision}"] = partial(floor, teacher, base.flatten(0, 1), precision, case.iterations)
    taken = measure.made_in_turn(ways, case.rounds)
    return row(name, case, taken, flops(teacher, base), rates)


def the_published_way(
    teacher: nn.Module, base: torch.Tensor, settings: SynthesisSettings, views: Views
) -> Callable[[], None]:
    """Lane after lane, all iterations of each; every lane is set up, and one iteration has warmed up."""
    tasks = [published.Task(teacher, lane, settings, views.lane(place)) for place, lane in enumerate(base)]
    tasks[0].step()

    def run() -> None:
        for task in tasks:
            task.restart()
            for _ in range(settings.iterations):
                task.step()

    return run


def ours(
    teacher: nn.Module, settings: SynthesisSettings, precision: str, base: torch.Tensor, views: Views
) -> Callable[[], None]:
    """All iterations of all lanes side by side, on a loop that is prepared and has run once."""
    targets = torch.arange(base.shape[1], device=base.device)
    loop = Solver(teacher, settings=settings, execution=Execution(precision)).prepare(base, views, targets)
    loop.step()

    def run() -> None:
        loop.restart()
        for _ in range(settings.iterations):
            loop.step()

    return run


def agrees(name: str, teacher: nn.Module, base: torch.Tensor, settings: SynthesisSettings, views: Views) -> bool:
    """Both ways compute the same compensator: 3 iterations of lane 0, both in float32 without TF32.

    False: the published one won't fit. Raises SystemExit where they differ.
    """
    views = Views(views.shift[:3, :1])  # the published way has shifts alone here
    settings = replace(settings, iterations=len(views.shift))
    with at_precision(base.device, "float32"):  # PyTorch's default is TF32 for convolutions
        try:
            expected = published.solve(teacher, base[0], settings, views)
        except torch.OutOfMemoryError:
            return False
        measure.free()
        got = Solver(teacher, settings=settings, execution=Execution("float32")).solve(base[:1], views)[0]
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
    step()

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


def row(name: str, case: Case, taken: dict[str, measure.Taken], operations: int, rates: dict[str, float]) -> dict:
    """The figures of one teacher; those of a way that did not fit are None."""
    ms: dict[str, float | None] = {way: t.run / case.iterations for way, t in taken.items()}
    own = {p: t for p in rates if (t := ms.get(p)) is not None}
    if not own:
        return {"case": case.name, "teacher": name, "GFLOP": operations / 1e9, "note": "did not fit"}
    best = min(own, key=lambda p: own[p])
    least = min((t for way, t in ms.items() if way.startswith("floor") and t is not None), default=None)
    theirs = ms.get("published")
    ways = ["published", *(way for p in rates for way in (p, f"floor {p}"))]
    return {
        "case": case.name,
        "teacher": name,
        "GFLOP": operations / 1e9,
        **{f"{way} ms": ms.get(way) for way in ways},
        **{f"{way} set-up s": taken[way].set_up / 1e3 if way in taken else None for way in ("published", *rates)},
        **{f"published / {p}": ratio(theirs, own.get(p)) for p in rates},
        "best": best,
        "published / best": ratio(theirs, own[best]),
        "published / floor": ratio(theirs, least),
        "share of matrix rate": operations / rates[best] / (own[best] / 1e3),
        "seconds per image, 2000 iterations": 2 * own[best] / (case.lanes * case.classes),
    }


def ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def total_of(values: Sequence[float | None]) -> float | None:
    """The sum, None if one of them is."""
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


def total_row(rows: list[dict]) -> dict:
    """The M = 4 cycle: times and operations add up, the best precision is chosen per teacher.

    None wherever one of the teachers has no figure, such as the published way where that did not fit.
    """

    def total(key: str) -> float | None:
        return total_of([r.get(key) for r in rows])

    columns = [key for key in rows[0] if key.endswith((" ms", " set-up s"))]
    precisions = [key.removeprefix("published / ") for key in rows[0] if key.startswith("published / ")]
    theirs = total("published ms")
    floors = [[v for k, v in r.items() if k.startswith("floor") and v is not None] for r in rows]
    best = total_of([r[f"{r['best']} ms"] if "best" in r else None for r in rows])
    least = total_of([min(each, default=None) for each in floors])
    at_rate = sum(r["share of matrix rate"] * r[f"{r['best']} ms"] for r in rows if "best" in r)
    return {
        "case": rows[0]["case"],
        "teacher": "all four",
        "GFLOP": total("GFLOP"),
        **{key: total(key) for key in columns},
        **{f"published / {p}": ratio(theirs, total(f"{p} ms")) for p in precisions if f"{p} ms" in rows[0]},
        "best": "each one's",
        "published / best": ratio(theirs, best),
        "published / floor": ratio(theirs, least),
        "share of matrix rate": ratio(at_rate, best),
        "seconds per image, 2000 iterations": None,
    }


def whole_synthesis() -> Iterator[dict]:
    """All tasks of the CIFAR-100 ipc 10 recipe, a teacher a row, then all: ours whole, and what the published way takes
    for its set-ups and iterations at the pace of 20 of them."""
    device, recipe = measure.device(), RECIPES[WHOLE_RUN]
    plan = make_plan(recipe, 100, (32, 32))
    settings, few = recipe.synthesis, replace(recipe.synthesis, iterations=20)
    rows: list[dict] = []
    for name in plan.teachers:
        teacher = build(name, 100, (32, 32), seed=0).eval().to(device)
        base = torch.randn(plan.k, 100, 3, 32, 32, device=device)
        views = draw_views(0, 0, list(range(plan.k)), iterations=settings.iterations, jitter=settings.jitter).to(device)
        taken = measure.made_in_turn(
            {
                "published": partial(the_published_way, teacher, base[:1], few, views.lane(0)),
                "ours": partial(ours, teacher, settings, "auto", base, views),
            },
            1,
        )
        theirs, own = taken["published"], taken["ours"]
        pace = theirs.run / few.iterations
        rows.append(
            {
                "case": f"{WHOLE_RUN}, whole",
                "teacher": name,
                "GFLOP": flops(teacher, base) * settings.iterations / 1e9,
                "published ms": plan.k * (theirs.set_up + pace * settings.iterations),
                "ours ms": own.set_up + own.run,
                "ours set-up s": own.set_up / 1e3,
            }
        )
        rows[-1]["published / best"] = rows[-1]["published ms"] / rows[-1]["ours ms"]
        yield rows[-1]
    sums = {key: sum(r[key] for r in rows) for key in ("GFLOP", "published ms", "ours ms", "ours set-up s")}
    yield {
        "case": f"{WHOLE_RUN}, whole",
        "teacher": "all four",
        **sums,
        "published / best": sums["published ms"] / sums["ours ms"],
        "note": f"ours {plan.k} lanes of {settings.iterations} iterations; published from {few.iterations} iterations",
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
    return freeze(network)


if __name__ == "__main__":
    main()
