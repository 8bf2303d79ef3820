"""The one command for a GPU: what it needs, in which order it works, and what a step cut short leaves."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, measure

HIDE = """
import sys
class Hide:  # not a function, which would become a method where others keep it
    def __init__(self, find):
        self.find = find
    def __call__(self, name, *rest, **more):
        hidden = any(name == n or name.startswith(n + ".") for n in {names!r})
        return None if hidden else self.find(name, *rest, **more)
for finder in sys.meta_path:
    finder.find_spec = Hide(finder.find_spec)
"""


def run_without(folder: Path, names: tuple[str, ...], *words: str) -> subprocess.CompletedProcess:
    """Python from the root of the checkout, where the modules of those names can't be found."""
    (folder / "sitecustomize.py").write_text(HIDE.format(names=names))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(folder)}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True, check=False)


NOT_ON_A_BARE_MACHINE = ("tyro", "nvidia", "sklearn", "pyarrow", "timm", "wandb")


@pytest.mark.slow
def test_everything_below_the_command_lines_is_imported_without_tyro_and_dali(tmp_path):
    rooms = [*(gpu.ROOT / "infer_fast" / room for room in ("synthesis", "models", "students", "data", "ops"))]
    apart = ("plot", "draws")  # which want matplotlib, and the main job's command line
    files = [file for folder in (gpu.ROOT / "bench", *rooms) for file in folder.glob("*.py") if file.stem not in apart]
    names = [".".join(file.relative_to(gpu.ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    program = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    done = run_without(tmp_path, NOT_ON_A_BARE_MACHINE, "-c", program)
    assert done.returncode == 0 and len(names) > 40, done.stderr


@pytest.mark.slow
def test_a_bare_gpu_machine_runs_the_benchmarks_and_the_tests(tmp_path):
    words = ["-m", "bench.gpu", "--quick", "--steps", "subset", "profile", "--output", str(tmp_path / "out")]
    done = run_without(tmp_path, NOT_ON_A_BARE_MACHINE, *words)
    assert done.returncode == 0 and "every step ended well" in done.stdout, done.stdout + done.stderr
    (row,) = json.loads(next((tmp_path / "out").glob("subset-*.json")).read_text())["rows"]
    assert row["passed" if torch.cuda.is_available() else "skipped"] == len(gpu.SUBSET)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["infer_fast.kernels", "infer_fast._native"])
def test_a_plain_install_is_told_what_to_do_before_anything_is_measured(tmp_path, hidden):
    if hidden == "infer_fast._native" and torch.cuda.is_available():
        pytest.skip("a GPU goes on without it")
    for words in (["-m", "bench.gpu", "--quick", "--output", str(tmp_path / "out")], ["-m", "bench.ops", "--quick"]):
        done = run_without(tmp_path, (hidden,), *words)
        assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
        sentence = done.stderr.strip().splitlines()[-1]
        assert sentence.startswith(f"bench: {hidden} can't be found") and measure.INSTALL in sentence, done.stderr


@pytest.mark.slow
def test_the_tests_that_a_gpu_runs_first_are_there():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *gpu.SUBSET]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"{len(gpu.SUBSET)} tests collected" in done.stdout, done.stdout


def test_the_headline_comes_second_and_all_benchmarks_have_their_time():
    assert list(gpu.STEPS)[:2] == ["subset", "distill"] and list(gpu.STEPS)[-1] == "tests"
    assert sum(step.promised for step in gpu.STEPS.values()) <= gpu.SECONDS


ENDLESS = """
import json, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[-1]).write_text(json.dumps({"rows": [{"pid": child.pid}]}))
print("began", end="")
time.sleep(600)
"""


@pytest.mark.slow
def test_a_step_cut_short_keeps_its_rows_and_output_and_leaves_no_process(tmp_path, monkeypatch, capsys):
    path = tmp_path / "ops-here.json"
    monkeypatch.setattr(gpu, "command", lambda name, path, quick: [sys.executable, "-c", ENDLESS, str(path)])
    outcome = gpu.run("ops", path, quick=True, seconds=gpu.LEAST)
    assert outcome is not None and outcome.startswith("cut short after 5 s") and outcome.endswith("began")
    assert path.with_suffix(".log").read_text() == "began" and "ops: cut short" in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["rows"]
    for _ in range(100):
        state = Path(f"/proc/{row['pid']}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":  # dead, and not yet buried
            return
        time.sleep(0.05)
    pytest.fail("the step's own process is still running")


def test_tests_that_were_cut_short_are_counted():
    lines = ["tests/a.py::one[x y] PASSED [ 10%]", "tests/a.py::two FAILED [ 20%]", "tests/a.py::three "]
    told = gpu.verdicts(lines)
    assert (told["passed"], told["failed"], told["skipped"], told["broken"]) == (1, 1, 0, ["tests/a.py::two"])


def test_a_step_that_has_no_time_is_not_begun(tmp_path):
    assert gpu.run("ops", tmp_path / "ops.json", quick=True, seconds=1.0) == "no time was left"
    assert list(tmp_path.iterdir()) == []
