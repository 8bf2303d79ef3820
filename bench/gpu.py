"""Everything there is to know of one GPU, inside 9 minutes: correctness first, then every benchmark.

    python -m bench.gpu --output bench/results        # on a GPU
    python -m bench.gpu --quick --output DIR          # a rehearsal on the CPU: the same steps, small

Each step is a program of its own with a time limit, and writes its JSON as it goes: a run cut short keeps what it
measured. The table comes last. Exit code 1 if a step failed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import measure

MINUTES = 9.0
STEPS = {  # name: (module, most seconds)
    "tests": ("pytest", 200),
    "ops": ("bench.ops", 80),
    "profile": ("bench.profile", 80),
    "memory": ("bench.memory", 80),
    "train": ("bench.train", 90),
    "pipeline": ("bench.pipeline", 90),
    "distill": ("bench.distill", 400),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--quick", action="store_true", help="small sizes, on any device")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="which steps")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.quick:
        print("There is no GPU here: --quick rehearses the steps on the CPU.", file=sys.stderr)
        return 2
    device = re.sub(r"[^a-z0-9]+", "-", measure.device_name().lower()).strip("-")
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * MINUTES
    failed, written = [], []
    for name in options.steps:
        path = options.output / f"{name}-{device}.json"
        path.unlink(missing_ok=True)
        module, most = STEPS[name]
        left = deadline - time.monotonic()
        outcome = run(name, module, path, options.quick, min(most, left)) if left > 5 else "no time was left"
        if outcome is not None:
            failed.append(f"{name}: {outcome}")
        if path.is_file():
            written.append(path)
    for path in written:
        report(path)
    print("\n".join(failed) if failed else "every step ended well")
    return 1 if failed else 0


def run(name: str, module: str, path: Path, quick: bool, seconds: float) -> str | None:
    """Runs one step; what went wrong in a few words, or None."""
    flags = ["--quick"] * quick + ["--output", str(path)]
    if module == "pytest":
        flags = ["-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider", "tests"]
    began = time.monotonic()
    command = [sys.executable, "-m", module, *flags]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"cut short after {seconds:.0f} s (what it wrote is kept)"
    took = time.monotonic() - began
    lines = (done.stdout + done.stderr).strip().splitlines()
    print(f"{name}: exit code {done.returncode} in {took:.0f} s: {lines[-1] if lines else ''}", flush=True)
    if module == "pytest":
        broken = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        rows = [{"result": lines[-1] if lines else "no output", **({"broken": broken} if broken else {})}]
        measure.write(path, rows)
    if done.returncode:
        return "\n".join([f"exit code {done.returncode}", *lines[-40:]])
    return None


def report(path: Path) -> None:
    """Prints one step's table."""
    print(f"\n## {path.stem}\n")
    print(measure.table(json.loads(path.read_text())["rows"]))


if __name__ == "__main__":
    sys.exit(main())
