"""Whole synthesis iterations: the published way, ours, and the floor of the same networks without any BatchNorm.

    python -m bench.distill --quick
    python -m bench.distill --output bench/results/distill-cpu.json

One INFER task per teacher at 100 classes of 32x32 images; times are per iteration, over whole solve calls with set-up
included on both sides.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from bench import measure, published
from infer_fast.models import build
from infer_fast.models.surgery import freeze_convolutions
from infer_fast.recipes import INFER_TEACHERS, SynthesisSettings
from infer_fast.synthesis import draw_views, solve

SIZE = (32, 32)


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0])
    classes, iterations, rounds = (10, 3, 1) if options.quick else (100, 3, 3)
    rows = [teacher_row(name, classes, iterations, rounds) for name in INFER_TEACHERS]
    rows.append(total_row(rows))
    measure.write(options.output, rows, classes=classes, iterations=iterations, rounds=rounds)
    print(f"{classes} classes, {SIZE[0]}x{SIZE[1]}, {measure.machine()}")
    print(measure.table(rows))


def teacher_row(name: str, classes: int, iterations: int, rounds: int) -> dict:
    """Milliseconds per iteration of one teacher, each way in turn."""
    device = measure.device()
    teacher = build(name, classes, SIZE, seed=0).eval().to(device)
    base = torch.randn(1, classes, 3, *SIZE, device=device)
    settings = SynthesisSettings(iterations=iterations, lr=0.01, batch_size=classes)
    views = draw_views(0, 0, [0], iterations=iterations, jitter=settings.jitter).to(device)
    bare = without_batch_norm(teacher)

    def the_published_way() -> torch.Tensor:
        return published.solve(teacher, base[0], settings, views.shift[:, 0])

    def ours(precision: str) -> torch.Tensor:
        return solve(teacher, base, settings=settings, views=views, precision=precision)[0]

    def floor(precision: str) -> None:
        for _ in range(iterations):
            images = base[0].clone().contiguous(memory_format=torch.channels_last).requires_grad_()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
                out = bare(images)
            torch.autograd.grad(out.float().square().mean(), images)

    expected, got = the_published_way(), ours("float32")
    error = ((got - expected).norm() / expected.norm()).item()
    if not error < 0.05:  # Adam turns the sign of a tiny gradient into a whole step: a few pixels may differ
        raise SystemExit(f"{name}: compensators differ by {error:.2g}")
    taken = measure.milliseconds_in_turn(
        {
            "published": the_published_way,
            "float32": lambda: ours("float32"),
            "bfloat16": lambda: ours("bfloat16"),
            "floor float32": lambda: floor("float32"),
            "floor bfloat16": lambda: floor("bfloat16"),
        },
        rounds,
    )
    taken = {way: value / iterations for way, value in taken.items()}
    return row(name, taken)


def row(name: str, taken: dict[str, float]) -> dict:
    best = min(taken["float32"], taken["bfloat16"])
    floor = min(taken["floor float32"], taken["floor bfloat16"])
    return {
        "teacher": name,
        "published ms": taken["published"],
        "float32 ms": taken["float32"],
        "bfloat16 ms": taken["bfloat16"],
        "no BatchNorm float32 ms": taken["floor float32"],
        "no BatchNorm bfloat16 ms": taken["floor bfloat16"],
        "published / float32": taken["published"] / taken["float32"],
        "published / best": taken["published"] / best,
        "published / floor": taken["published"] / floor,
    }


def total_row(rows: list[dict]) -> dict:
    """The M = 4 cycle: times add up, the best precision is chosen per teacher."""
    total = {key: sum(r[key] for r in rows) for key in rows[0] if key.endswith(" ms")}
    best = sum(min(r["float32 ms"], r["bfloat16 ms"]) for r in rows)
    floor = sum(min(r["no BatchNorm float32 ms"], r["no BatchNorm bfloat16 ms"]) for r in rows)
    return {
        "teacher": "all four",
        **total,
        "published / float32": total["published ms"] / total["float32 ms"],
        "published / best": total["published ms"] / best,
        "published / floor": total["published ms"] / floor,
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
