"""A profile of synthesis iterations: kernels, launches, gaps, and where the time goes.

    python -m bench.profile --quick
    python -m bench.profile --output bench/results/profile-cpu.json

For each engine of the device: wall-clock milliseconds of an iteration without the profiler, then under torch's profiler
the kernels an iteration runs, the calls that launch them, the time the device computes, the rest (gaps), and the
kernels (on a CPU: operators) that take most of it.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import measure
from infer_fast.models import build
from infer_fast.models.execution import Execution
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis import draw_views
from infer_fast.synthesis.solver import Loop, Solver

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch")
TOP = 8


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    classes, iterations = (10, 2) if options.quick else (100, 20 if on_gpu else 3)
    rows = []
    for engine in ("eager", "graph", "graph-compile") if on_gpu else ("eager",):
        for name in ("resnet18",) if options.quick else ("resnet18", "mobilenetv2"):
            rows.append(profile_row(name, engine, classes, iterations))
            measure.write(options.output, rows, classes=classes)
            measure.free()
    print(f"{classes} classes of 32x32, one lane, {measure.machine()}")
    print(measure.table(rows))


def profile_row(name: str, engine: str, classes: int, iterations: int) -> dict:
    """One teacher's iteration under one engine."""
    loop = prepared(name, engine, classes)
    wall = measure.milliseconds_in_turn({"step": loop.step}, iterations)["step"]
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(iterations):
            loop.step()
        measure.synchronise()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spent: Counter[str] = Counter()
    kernels = launches = 0
    for event in profiled.key_averages():
        launches += event.count if event.key in LAUNCHES else 0
        if event.device_type == kind:
            kernels += event.count
            spent[event.key] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    busy = sum(spent.values()) / 1e3 / iterations
    top = ", ".join(f"{key[:40]} {t / 1e3 / iterations:.3g} ms" for key, t in spent.most_common(TOP))
    return {
        "teacher": name,
        "engine": engine,
        "iteration ms": wall,
        "device busy ms": busy,
        "gaps ms": wall - busy,
        "kernels" if on_gpu else "operators": kernels / iterations,
        "launches": launches / iterations if on_gpu else None,
        "most time": top,
    }


def prepared(name: str, engine: str, classes: int) -> Loop:
    """One INFER task, captured or compiled, ready to step."""
    device = measure.device()
    teacher = build(name, classes, (32, 32), seed=0).eval().to(device)
    base = torch.randn(1, classes, 3, 32, 32, device=device)
    settings = SynthesisSettings(iterations=1000, lr=0.01, batch_size=classes)
    views = draw_views(0, 0, [0], iterations=settings.iterations, jitter=settings.jitter).to(device)
    solver = Solver(teacher, settings=settings, execution=Execution(engine=engine))
    return solver.prepare(base, views, torch.arange(classes, device=device))


if __name__ == "__main__":
    main()
