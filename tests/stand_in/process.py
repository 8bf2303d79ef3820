"""Compiles the stand-in with the machine's C compiler and runs this repository's modules in processes under it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNTIME = "STAND_IN_RUNTIME"  # names the compiled runtime to the process that runs under it
CUDA = 13  # the runtime whose functions the stubs are


def why_not() -> str | None:
    """Why there can be no stand-in here, None if there can."""
    if compiler() is None:
        return "no C compiler"
    if not sys.platform.startswith("linux"):
        return "the stubs are preloaded as Linux does it"
    if (torch.version.cuda or "").split(".")[0] != str(CUDA):
        return f"this torch was not built for CUDA {CUDA}"
    header = headers() / "cuda_runtime_api.h"
    if not header.is_file():
        return "Triton, which brings CUDA's headers, is not installed"
    if not re.search(rf"define CUDART_VERSION +{CUDA}\d\d\d\b", header.read_text()):
        return f"this Triton's headers are not CUDA {CUDA}'s"
    return None


def compiler() -> str | None:
    """The machine's C compiler."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def headers() -> Path:
    """Where CUDA's headers are if Triton is installed, whose wheel brings them."""
    found = importlib.util.find_spec("triton")
    package = Path("triton") if found is None or found.origin is None else Path(found.origin).parent
    return package / "backends" / "nvidia" / "include"


@dataclass(frozen=True)
class StandIn:
    """The stand-in, compiled in `folder`."""

    folder: Path

    @classmethod
    def compiled(cls, folder: Path) -> StandIn:
        """Compiles it there."""
        command = [str(compiler()), "-std=gnu11", "-shared", "-fPIC", "-w"]
        sources = [str(HERE / name) for name in ("runtime.c", "succeeds.c")]
        subprocess.run([*command, f"-I{headers()}", *sources, "-o", str(folder / "libruntime.so")], check=True)
        (folder / "driver").mkdir()
        built = str(folder / "driver" / "libcuda.so.1")
        subprocess.run([*command, str(HERE / "driver.c"), "-o", built], check=True)
        return cls(folder)

    def environment(self) -> dict[str, str]:
        """What a process needs to take the stubs for CUDA. Triton's kernels are then those of a GPU."""
        given = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "INFER_FAST_BACKEND")}
        paths = [str(self.folder / "driver"), *filter(None, [given.get("LD_LIBRARY_PATH")])]
        runtime = str(self.folder / "libruntime.so")
        return given | {
            "LD_PRELOAD": runtime,
            "LD_LIBRARY_PATH": ":".join(paths),
            "TRITON_CACHE_DIR": str(self.folder / "triton"),
            RUNTIME: runtime,
        }

    def run(self, module: str, *arguments: str, seconds: float = 280) -> subprocess.CompletedProcess[str]:
        """`python -m module *arguments` under the stand-in."""
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
