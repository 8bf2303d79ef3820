"""Timing in turn, the hardware's limits, and results as a table and as JSON."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn import functional as F

from infer_fast.extras import installed
from infer_fast.models.execution import at_precision
from infer_fast.ops.backend import EXTENSION, HAS_TRITON, native

KERNELS = "infer_fast.kernels"
INSTALL = "pip install --no-deps --no-build-isolation --editable ."


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds_in_turn(
    functions: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[str, float]:
    """Median wall-clock milliseconds of each function, called A B C A B C ... after one warm-up round."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(0 if warm_up else 1, rounds + 1):
        for name, function in functions.items():
            synchronise()
            began = time.perf_counter()
            function()
            synchronise()
            if turn > 0:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in taken.items()}


@dataclass(frozen=True)
class Taken:
    """Median milliseconds of making what is timed, warm-up included, and then of one run of it."""

    set_up: float
    run: float


def made_in_turn(ways: Mapping[str, Callable[[], Callable[[], object]]], rounds: int) -> dict[str, Taken]:
    """Each way is made, run once, and freed before the next one is made: A B C A B C ... on an otherwise empty device.

    A way, called, makes its function ready to run at its steady pace. One that does not fit in memory is left out.
    """
    taken: dict[str, list[Taken]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, make in ways.items():
            with suppress(torch.OutOfMemoryError):
                taken[name].append(_made(make))
            free()
    return {
        name: Taken(statistics.median(t.set_up for t in each), statistics.median(t.run for t in each))
        for name, each in taken.items()
        if len(each) == rounds
    }


def _made(make: Callable[[], Callable[[], object]]) -> Taken:
    synchronise()
    began = time.perf_counter()
    function = make()
    synchronise()
    ready = time.perf_counter()
    function()
    synchronise()
    return Taken(1e3 * (ready - began), 1e3 * (time.perf_counter() - ready))


def free() -> None:
    """Gives back the memory of what nothing refers to any more: graphs, networks, what the allocator keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def milliseconds(function: Callable[[], object], times: int) -> list[float]:
    """Milliseconds of each of `times` calls, after one that wakes threads and fills caches.

    On a GPU they are taken on its own clock, between the call's first and last kernel: a wait for the host counts, the
    wait for a synchronisation does not.
    """
    function()
    if torch.cuda.is_available():
        return _milliseconds_on_gpu(function, times)
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(1e3 * (time.perf_counter() - began))
    return taken


def _milliseconds_on_gpu(function: Callable[[], object], times: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    synchronise()
    for began, ended in events:
        began.record()
        function()
        ended.record()
    synchronise()
    return [began.elapsed_time(ended) for began, ended in events]


def in_turns(ways: Mapping[str, Callable[[int], list[float]]], rounds: int, each: int) -> dict[str, float]:
    """Median milliseconds of each way, timed A A A B B B A A A ...: `rounds` turns of `each` calls.

    A way takes the number of calls and gives the milliseconds of each: measure.milliseconds here, or those of a process
    of its own (bench.apart). Before a turn, the threads of the one before are given the time to fall asleep.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            time.sleep(0.02)
            taken[name] += way(each)
    return {name: statistics.median(values) for name, values in taken.items()}


LEAST_ROTATED, MOST_ROTATED = 64 << 20, 1 << 30


def rotated_bytes() -> int:
    """Twice the last-level cache, 64 MiB to 1 GiB: what a benchmark of memory reads before it comes back to a byte."""
    return min(MOST_ROTATED, max(LEAST_ROTATED, 2 * last_level_cache()))


def last_level_cache() -> int:
    """Bytes of the GPU's L2, or of the processor's largest cache; 0 where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=0)


def copies(nbytes: int) -> int:
    """How many tensors of so many bytes are rotated: as many as rotated_bytes holds, and two at least."""
    return max(2, -(-rotated_bytes() // max(1, nbytes)))


def copy_bandwidth(elements: int = 1 << 26) -> float:
    """Bytes per second, read and written bytes counted, of the better of two float32 passes over the device's memory.

    They are a copy, and an update in place: on a CPU a copy also reads what it overwrites, which a kernel can avoid.
    The best of several is taken: this is the limit that shares are of.
    """
    source = torch.randn(elements, device=device())
    target = torch.empty_like(source)
    took = min(min(milliseconds(way, 7)) for way in (lambda: target.copy_(source), lambda: source.mul_(1)))
    return 2 * source.nbytes / (took / 1e3)


def matmul_rate(precision: str, size: int) -> float:
    """Floating-point operations per second of a size x size matrix product, in float32, tf32 or bfloat16.

    The better of torch.mm and a 1x1 convolution of as much: on a CPU two libraries make them, and either may be slow.
    """
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    image = a.t().reshape(1, size, size, 1).contiguous(memory_format=torch.channels_last)

    def multiply() -> None:
        with at_precision(device(), precision):
            torch.mm(a, b)

    def convolve() -> None:
        with at_precision(device(), precision):
            F.conv2d(image, b[:, :, None, None])

    took = min(statistics.median(milliseconds(way, 7)) for way in (multiply, convolve))
    return 2 * size**3 / (took / 1e3)


def machine() -> dict[str, str | int]:
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "triton": version("triton") if HAS_TRITON else "none",
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return platform.processor()


def table(rows: list[dict]) -> str:
    """The rows as Markdown; the columns are the keys of any row, in the order they come up."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)


def missing_backend() -> str | None:
    """What can't be found of our own code and what to do about it, in one sentence; None where nothing is missing.

    After a plain install it lies in site-packages, hidden by the checkout's own folder infer_fast/.
    """
    missing = [name for name in (KERNELS, EXTENSION) if not installed(name)]
    if not missing:
        return None
    return (
        f"{' and '.join(missing)} can't be found from this folder, and nothing else is worth measuring: "
        f"run `{INSTALL}` here, where a C++17 compiler is, and then this command again."
    )


def stop_if_incomplete() -> None:
    """Ends the program with exit code 2 and missing_backend's sentence, if there is one.

    On a GPU the native backend serves nothing that is timed: without it alone, the sentence is said, and work goes on.
    """
    sentence = missing_backend()
    if sentence is None:
        return
    print(f"bench: {sentence}", file=sys.stderr)
    if not (torch.cuda.is_available() and installed(KERNELS)):
        raise SystemExit(2)


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes: under a minute on 2 CPU cores")
    parser.add_argument("--output", type=Path, help="JSON file (default: none)")
    options = parser.parse_args()
    stop_if_incomplete()
    backend = native()
    if backend is not None:
        backend.keep_freed_memory()  # as our command lines do; both ways gain by it
    return options


def write(path: Path | None, rows: list[dict], **more: object) -> None:
    """Writes the rows with the machine's description, if a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **more, "rows": rows}, indent=2) + "\n")
