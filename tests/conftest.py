"""Fixtures: a fresh printed seed for every run, small random datasets, and subprocesses of our command lines."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from infer_fast import cli
from infer_fast.data.images import ImageDataset, Split, image_dataset

# Triton decides at import whether its kernels are compiled or interpreted: without a GPU, they are interpreted here.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
SEED = int(os.environ.get("INFER_FAST_TEST_SEED", int.from_bytes(os.urandom(4), "big")))


def pytest_configure() -> None:
    """A shell starts what runs in the background with interrupts ignored, and tests send some."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"random inputs: INFER_FAST_TEST_SEED={SEED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        if "interpreter" in item.keywords and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="Triton's interpreter is off: a GPU runs the kernels themselves"))


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A torch generator that is fresh per run and test; the global one is seeded alike."""
    own = (SEED + sum(request.node.nodeid.encode())) % 2**31
    torch.manual_seed(own)
    return torch.Generator().manual_seed(own)


@pytest.fixture
def tiny_dataset(generator: torch.Generator) -> ImageDataset:
    """4 classes of 8x8 colour blobs, 12 training and 6 test images each: separable, and trained on in a second."""

    def split(each: int) -> Split:
        labels = torch.arange(4).repeat_interleave(each)
        images = torch.randint(0, 60, (4 * each, 3, 8, 8), generator=generator)
        for i, label in enumerate(labels.tolist()):
            images[i, label % 3, 4 * (label // 3) :, :] += 150
        return Split(images.to(torch.uint8), labels)

    return image_dataset("tiny", split(12), split(6), ("a", "b", "c", "d"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """One small finished run of the digits recipe, in a folder of its own: tests look at it and don't change it."""
    folder = tmp_path_factory.mktemp("finished")
    done = run_in(folder, "distill", *SMALL)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def run_module(tmp_path: Path, finished: tuple[Path, subprocess.CompletedProcess]):
    """run_module("distill", "--flag", ...) runs `python -m infer_fast.distill --flag ...` in tmp_path.

    The finished run's teachers are there already, unless `--syn-data-path` leads elsewhere.
    """
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "teachers").symlink_to(finished[0] / "runs" / "teachers")
    return partial(run_in, tmp_path)


@pytest.fixture
def call_module(run_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """What run_module does, in this process: for the many runs that need no interpreter of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # what cli.run changes is put back

    def call(module: str, *args: str) -> subprocess.CompletedProcess:
        capfd.readouterr()
        try:
            code = cli.run(importlib.import_module(f"infer_fast.{module}")._main, list(args))
        except SystemExit as stopped:
            code = stopped.code
        return subprocess.CompletedProcess([module, *args], code, *capfd.readouterr())

    return call


@pytest.fixture
def copied_run(tmp_path: Path, finished: tuple[Path, subprocess.CompletedProcess], run_module) -> Path:
    """A copy of the finished run's folder in tmp_path/runs/digits, to be changed at will."""
    return Path(shutil.copytree(finished[0] / "runs" / "digits", tmp_path / "runs" / "digits"))


def run_in(folder: Path, module: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"infer_fast.{module}", *args]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # as a user runs it
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


SMALL = [
    "--squeeze.epochs=2",
    "--iteration=6",
    "--lanes=2",
    "--student.epochs=2",
    "--seeds=1",
    "--arch-name",
    "convnet",
    "convnet-silu",
    "--ipc=4",
    "--budget=images",
    "--codec=raw",
    "--label-bits=float16",
    "--label-truth=0",
    "--compensators=None",
]


@pytest.fixture
def small_flags() -> list[str]:
    """Flags that make a few seconds of INFER of the digits recipe: 2 teachers, k = 3, 6 iterations."""
    return list(SMALL)
