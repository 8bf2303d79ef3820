"""Everything there is to know of one GPU, inside 9 minutes: a minute of correctness, the headline, then the rest.

    pip install --no-deps --no-build-isolation --editable . && python -m bench.gpu --output DIR      # on a GPU
    python -m bench.gpu --quick --output DIR          # a rehearsal on the CPU: the same steps, small

It needs torch, torchvision, triton, numpy, Pillow, safetensors, rich and pytest, to install pybind11, setuptools and a
C++17 compiler, and no network; neither tyro nor DALI. Each step is a program of its own, which may take all the time
that is not promised to a later one, and writes its JSON row by row and its output to a .log file beside that: a step
cut short keeps both, and leaves no process behind. The tables come last. Exit code 1 if a step failed, 2 if nothing
could begin.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import measure

ROOT = Path(__file__).parents[1]
SECONDS = 520.0  # with the install before it, less than 10 minutes
LEAST = 5.0  # seconds in which a step can do anything


@dataclass(frozen=True)
class Step:
    """A program (pytest if it is no benchmark), and the seconds that the steps before leave it at least."""

    module: str
    promised: float


STEPS = {
    "subset": Step("pytest", 75),
    "distill": Step("bench.distill", 195),
    "ops": Step("bench.ops", 45),
    "profile": Step("bench.profile", 40),
    "memory": Step("bench.memory", 70),
    "train": Step("bench.train", 45),
    "pipeline": Step("bench.pipeline", 45),
    "tests": Step("pytest", LEAST),
}

# Each op in both layouts and precisions, and what makes graphs of them: few variants of kernels, so little to compile.
SUBSET = (
    "tests/ops/test_bn_match.py::test_huge_means_do_not_cancel_and_tiny_variances_count[contiguous-gpu]",
    "tests/ops/test_bn_match.py::test_huge_means_do_not_cancel_and_tiny_variances_count[channels_last-gpu]",
    "tests/ops/test_bn_match.py::test_backends_equal_the_float64_reference[3-dtype1-channels_last-shape7-gpu]",
    "tests/ops/test_bn_match_twice.py::test_chunks_of_a_batch_are_matched_as_the_whole[relu-True-gpu]",
    "tests/ops/test_compose.py::test_equals_plain_loops[size0-dtype0-1e-05-gpu]",
    "tests/ops/test_view.py::test_the_gradient_of_what_is_added_is_autograds[dtype1-70-True-gpu]",
    "tests/ops/test_perturb.py::test_channels_last_weights_are_served_by_every_backend[layout1-gpu]",
    "tests/models/test_engine.py::test_engines_agree_on_a_gpu[graph-None-compensator]",
    "tests/models/test_engine.py::test_nothing_waits_for_the_device_between_logs[graph]",
    "tests/models/test_train.py::test_a_captured_step_trains_as_an_eager_one[adamw-False-fused]",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--quick", action="store_true", help="small sizes, on any device")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="which steps")
    options = parser.parse_args()
    measure.stop_if_incomplete()
    if not torch.cuda.is_available() and not options.quick:
        print("There is no GPU here: --quick rehearses the steps on the CPU.", file=sys.stderr)
        return 2
    device = re.sub(r"[^a-z0-9]+", "-", measure.device_name().lower()).strip("-")
    options.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + SECONDS
    failed, written = [], []
    for place, name in enumerate(options.steps):
        path = options.output.absolute() / f"{name}-{device}.json"
        path.unlink(missing_ok=True)
        promised = sum(STEPS[later].promised for later in options.steps[place + 1 :])
        outcome = run(name, path, options.quick, deadline - time.monotonic() - promised)
        if outcome is not None:
            failed.append(f"{name}: {outcome}")
        if path.is_file():
            written.append(path)
    for path in written:
        report(path)
    print("\n".join(failed) if failed else "every step ended well")
    return 1 if failed else 0


def run(name: str, path: Path, quick: bool, seconds: float) -> str | None:
    """Runs one step in at most so many seconds; what went wrong in a few words, or None."""
    if seconds < LEAST:
        return "no time was left"
    log, began = path.with_suffix(".log"), time.monotonic()
    code = within(command(name, path, quick), seconds, log)
    lines = log.read_text(errors="replace").strip().splitlines()
    ended = "cut short" if code is None else f"exit code {code}"
    print(f"{name}: {ended} in {time.monotonic() - began:.0f} s: {lines[-1] if lines else ''}", flush=True)
    if STEPS[name].module == "pytest":
        measure.write(path, [verdicts(lines)])
    if code == 0:
        return None
    what = f"cut short after {seconds:.0f} s, what it wrote is kept" if code is None else ended
    return "\n".join([f"{what} ({log})", *lines[-40:]])


def verdicts(lines: list[str]) -> dict:
    """How many tests came out how, from what pytest -v has printed so far, and which did not pass."""
    found = [m for line in lines if (m := re.match(r"(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", line))]
    counts = Counter(m[2].lower() for m in found)
    broken = [m[1] for m in found if m[2] in ("FAILED", "ERROR")]
    return {
        **{verdict: counts[verdict] for verdict in ("passed", "failed", "error", "skipped")},
        "last line": lines[-1] if lines else "no output",
        "broken": broken or None,
    }


def command(name: str, path: Path, quick: bool) -> list[str]:
    """What a step runs, in the root of the checkout."""
    module = STEPS[name].module
    if module != "pytest":
        return [sys.executable, "-m", module, *["--quick"] * quick, "--output", str(path)]
    asked = SUBSET if name == "subset" else tuple(gpu_test_files())
    return [
        *[sys.executable, "-m", "pytest", "-v", "-rfE", "-m", "gpu", "--no-header"],
        *["-p", "no:cacheprovider", "-p", "bench.without_tyro", *asked],
    ]


def gpu_test_files() -> list[str]:
    """The files with tests for a GPU: what the others import need not be installed."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in found if "mark.gpu" in file.read_text()]


def within(words: list[str], seconds: float, log: Path) -> int | None:
    """The exit code of a program, None if it took too long; its output is in `log`, as far as it came.

    Whatever it has started ends with it.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def report(path: Path) -> None:
    """Prints one step's table."""
    print(f"\n## {path.stem}\n")
    print(measure.table(json.loads(path.read_text())["rows"]))


if __name__ == "__main__":
    sys.exit(main())
