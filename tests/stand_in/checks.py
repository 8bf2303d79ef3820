"""Runs the checks of a module in this package, under the stand-in.

python -m tests.stand_in.checks engines 0    # with the random seed 0

A check prints one line of JSON: its name, its seconds, and what failed or null.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
import traceback
from pathlib import Path

import torch


def names_of(module: str) -> list[str]:
    """The checks of a module, without importing it."""
    return re.findall(r"^def (check_\w+)\(", (Path(__file__).parent / f"{module}.py").read_text(), re.MULTILINE)


def main(module: str, seed: int) -> None:
    checks = importlib.import_module(f"tests.stand_in.{module}")
    for name in names_of(module):
        torch.manual_seed(seed)
        began, failed = time.perf_counter(), None
        try:
            getattr(checks, name)()
        except Exception:
            failed = traceback.format_exc()
        print(json.dumps([name, round(time.perf_counter() - began, 1), failed]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
