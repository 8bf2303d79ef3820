"""Peak memory of one synthesis iteration, the published way and ours, each in a fresh process.

    python -m bench.memory --quick
    python -m bench.memory --output bench/results/memory-cpu.json

It is what one iteration of one task, set-up included, needs beyond the teacher and its images: on the CPU the growth of
the process's resident memory to its highest point, on a GPU the allocator's. The same was done once before, and freed:
what libraries allocate for these shapes and keep is there already.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from bench import measure, published
from infer_fast.models import build
from infer_fast.models.execution import Execution
from infer_fast.recipes import INFER_TEACHERS
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis import draw_views
from infer_fast.synthesis.solver import Solver

WAYS = ("published", "float32", "bfloat16")


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0])
    classes = 10 if options.quick else 100
    rows = []
    for name in INFER_TEACHERS:
        peaks = {way: in_a_fresh_process(name, classes, way) / 2**20 for way in WAYS}
        rows.append(
            {
                "teacher": name,
                **{f"{way} MiB": peak for way, peak in peaks.items()},
                "float32 / published": peaks["float32"] / peaks["published"],
                "bfloat16 / published": peaks["bfloat16"] / peaks["published"],
            }
        )
        measure.write(options.output, rows, classes=classes)
    print(f"{classes} classes, 32x32, one iteration, {measure.machine()}")
    print(measure.table(rows))


def in_a_fresh_process(name: str, classes: int, way: str, chunk: int | None = None) -> int:
    """Bytes, as one_iteration prints them."""
    program = f"from bench.memory import one_iteration; one_iteration({name!r}, {classes}, {way!r}, {chunk})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def one_iteration(name: str, classes: int, way: str, chunk: int | None = None) -> None:
    """Prints by how many bytes one iteration raised the memory in use, at its highest."""
    device = measure.device()
    teacher = build(name, classes, (32, 32), seed=0).eval().to(device)
    base = torch.randn(1, classes, 3, 32, 32, device=device)
    settings = SynthesisSettings(iterations=1, lr=0.01, batch_size=classes)
    views = draw_views(0, 0, [0], iterations=1, jitter=settings.jitter).to(device)

    def once() -> None:
        if way == "published":
            published.solve(teacher, base[0], settings, views)
        else:
            Solver(teacher, settings=settings, execution=Execution(way), chunk=chunk).solve(base, views)

    once()
    before = _bytes_in_use()
    once()
    print(_highest_bytes() - before)


def _bytes_in_use() -> int:
    """Bytes in use now, with nothing kept that was freed; the highest point is counted from here."""
    measure.free()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest point is what it is now
    return _status("VmRSS")


def _highest_bytes() -> int:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field} line")


if __name__ == "__main__":
    main()
