"""Runs that are killed at random moments, and two runs at once: the same command ends with the same bytes.

    python -m tests.kills                    # 100 kills, at least 10 in each stage; some minutes on one core
    python -m tests.kills --kills 6          # one in each stage

Each run is killed by SIGKILL inside a stage, perhaps a second time in another, and then run to its end. The set, the
table and the names of all files must be those of a run that was left alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

STAGES = {  # where a stage's work is done: (module, function)
    "squeeze": ("infer_fast.squeeze", "_train"),
    "import": ("infer_fast.squeeze", "_import"),
    "synthesis": ("infer_fast.synthesis.tasks", "_solve_batch"),
    "labelling": ("infer_fast.distill", "relabel"),
    "students": ("infer_fast.students.training", "train_student"),
    "writing": ("infer_fast.files", "write_atomically"),
}
FLAGS = [
    "digits-infer", "--squeeze.epochs=1", "--iteration=4", "--lanes=2", "--student.epochs=1", "--seeds=2", "--ipc=4",
    "--compare=random", "--arch-name", "convnet", "convnet-silu", "--store-best-images",
]  # fmt: skip
WHAT_ENDS = ("distilled.safetensors", "table.md", "results.json", "README.md", "report.html", "preview.png")


@dataclass(frozen=True)
class Kill:
    """SIGKILL in the call `number` (from 1) of a stage's function, `delay` seconds after its beginning."""

    stage: str
    number: int
    delay: float


@dataclass(frozen=True)
class Alone:
    """What a run that was left alone is: its files, what they hold, and each stage's calls and seconds."""

    names: frozenset[str]
    contents: dict[str, bytes]
    calls: dict[str, list[float]]


def flags_of(kind: str, checkpoints: Path) -> list[str]:
    """The command: with teachers that are trained, or imported."""
    given = ["--arch-path", str(checkpoints / "a.pth"), str(checkpoints / "b.pth")]
    return FLAGS + (given if kind == "imported" else [])


def run(folder: Path, flags: list[str], kill: Kill | None = None, module: str = "distill") -> int:
    """The command in a process of its own below `folder`; its exit code, negative the signal that ended it."""
    return ended(begun(folder, flags, kill, module))


def ended(child: int) -> int:
    """Waits for a process's end."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begun(folder: Path, flags: list[str], kill: Kill | None = None, module: str = "distill") -> int:
    """The process of a command that was begun: a fork, so that nothing is imported anew."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kill is not None:
            plant(kill)
        code = command(module, flags)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def command(module: str, flags: list[str]) -> int:
    """What `python -m infer_fast.MODULE FLAGS` does; its exit code."""
    from infer_fast import cli

    try:
        return cli.run(importlib.import_module(f"infer_fast.{module}")._main, flags)
    except SystemExit as stopped:
        return int(stopped.code or 0)


def plant(kill: Kill) -> None:
    """Has this process killed in the middle of its work, or else at the very end of that call."""
    calls = 0

    def around(work: Callable[[], object]) -> object:
        nonlocal calls
        calls += 1
        if calls != kill.number:
            return work()
        threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        try:
            return work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)

    wrap(kill.stage, around)


def wrap(stage: str, around: Callable[[Callable[[], object]], object]) -> None:
    """Calls of a stage's function go through around(work)."""
    module, name = importlib.import_module(STAGES[stage][0]), STAGES[stage][1]
    work = getattr(module, name)
    setattr(module, name, lambda *args, **named: around(lambda: work(*args, **named)))


def left_alone(folder: Path, flags: list[str]) -> Alone:
    """A run without a kill: in this process, so that its stages can be timed."""
    calls: dict[str, list[float]] = {stage: [] for stage in STAGES}
    former = {stage: getattr(importlib.import_module(m), name) for stage, (m, name) in STAGES.items()}

    def timed(stage: str) -> Callable[[Callable[[], object]], object]:
        def around(work: Callable[[], object]) -> object:
            began = time.monotonic()
            result = work()
            calls[stage].append(time.monotonic() - began)
            return result

        return around

    for stage in STAGES:
        wrap(stage, timed(stage))
    folder.mkdir(parents=True)
    here = Path.cwd()
    os.chdir(folder)
    try:
        with (folder.parent / "alone.log").open("a") as log, redirected(log):
            assert command("distill", flags) == 0, f"see {log.name}"
    finally:
        os.chdir(here)
        for stage, (module, name) in STAGES.items():
            setattr(importlib.import_module(module), name, former[stage])
    return Alone(names(folder), contents(folder), calls)


@contextlib.contextmanager
def redirected(log) -> Iterator[None]:
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def names(folder: Path) -> frozenset[str]:
    """Every file below `folder`."""
    return frozenset(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    """What a run ends with, and every picture."""
    run_folder = folder / "runs" / "digits-infer"
    paths = [*(run_folder / name for name in WHAT_ENDS), *sorted((run_folder / "images").rglob("*.jpg"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def faults(folder: Path, expected: Alone) -> list[str]:
    """What is other than in a run that was left alone."""
    there = names(folder)
    found = [f"{name} was left behind" for name in sorted(there - expected.names)]
    found += [f"{name} is missing" for name in sorted(expected.names - there)]
    found += [
        f"{n} differs" for n, data in expected.contents.items() if n in there and (folder / n).read_bytes() != data
    ]
    return found


def drawn(random: Random, stage: str, expected: Alone) -> Kill:
    """A kill at a random moment of a stage."""
    number = random.randrange(len(expected.calls[stage]))
    return Kill(stage, number + 1, random.uniform(0, expected.calls[stage][number]))


def kills(count: int, folder: Path, random: Random) -> tuple[Counter[str], list[str]]:
    """Kills in each stage, as many in one as in another; what went wrong."""
    checkpoints = checkpoints_in(folder)
    commands = {kind: flags_of(kind, checkpoints) for kind in ("trained", "imported")}
    expected = {kind: left_alone(folder / f"alone-{kind}", flags) for kind, flags in commands.items()}
    done, wrong = Counter(dict.fromkeys(STAGES, 0)), []
    while sum(done.values()) < count:
        stage = min(STAGES, key=lambda name: (done[name], random.random()))
        kind = {"squeeze": "trained", "import": "imported"}.get(stage, random.choice(list(commands)))
        planned = [drawn(random, stage, expected[kind])]
        if random.random() < 0.5:
            planned.append(drawn(random, random.choice([s for s in STAGES if expected[kind].calls[s]]), expected[kind]))
        place = folder / f"killed-{sum(done.values()):03d}"
        for kill in planned:
            done[kill.stage] += run(place, commands[kind], kill) == -signal.SIGKILL
        code = run(place, commands[kind])
        found = faults(place, expected[kind]) + ([f"exit code {code}"] if code else [])
        wrong += [f"{planned}: {fault} (see {place}.log)" for fault in found]
        if not found:
            shutil.rmtree(place)
    return done, wrong


def checkpoints_in(folder: Path) -> Path:
    """Weights of others for both teachers."""
    import torch

    from infer_fast.models import build

    folder.mkdir(parents=True, exist_ok=True)
    for name, network in (("a", "convnet"), ("b", "convnet-silu")):
        torch.save(build(network, 10, (8, 8), seed=3).state_dict(), folder / f"{name}.pth")
    return folder


def two_at_once(folder: Path) -> list[str]:
    """Two runs in one folder with different seeds: one works, the other says so; each in turn ends as if alone."""
    flags = {seed: [*FLAGS, f"--seed={seed}"] for seed in (0, 1)}
    expected = {seed: left_alone(folder / f"seed-{seed}", own) for seed, own in flags.items()}
    place = folder / "shared"
    codes = [ended(child) for child in [begun(place, own) for own in flags.values()]]
    wrong = [] if sorted(codes) in ([0, 1], [0, 0]) else [f"two at once: exit codes {codes}"]
    text = (folder / "shared.log").read_text()
    if 1 in codes and "Another run is at work in" not in text:
        wrong.append("two at once: the one that gave up did not say why")
    for seed, own in flags.items():
        code = run(place, own)
        wrong += [f"seed {seed}, one after the other: exit code {code}"] if code else []
        wrong += [f"seed {seed}: {f}" for f in faults(place, expected[seed]) if "left behind" not in f]
    lost = (expected[0].names | expected[1].names) - names(place)
    return wrong + [f"two at once: {name} is lost" for name in sorted(lost)]


def two_judges_at_once(folder: Path) -> list[str]:
    """Two validations of one set with different students: both end well, and every student is kept."""
    place = folder / "judged"
    wrong = [] if run(place, FLAGS) == 0 else ["the run to be judged failed"]
    kept = place / "runs" / "digits-infer" / "students"
    before = len(list(kept.iterdir()))
    asked = ["--syn-data-path", "runs/digits-infer", "--compare=none", "--seeds=3", "--epochs=1", "--networks"]
    children = [
        begun(place, [*asked, network], None, "validate") for network in ("convnet-silu", "convnet128-batchnorm")
    ]
    codes = [ended(child) for child in children]
    wrong += [] if codes == [0, 0] else [f"two judges: exit codes {codes}"]
    now = len(list(kept.iterdir()))
    return wrong + ([] if now == before + 6 else [f"two judges: {now - before} students were kept, of 6"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--folder", type=Path, default=None, help="where to work; None: a temporary folder")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # the same bytes need the same threads, and a fork has none but its own
    print(f"--kills {options.kills} --seed {options.seed}")
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        done, wrong = kills(options.kills, folder / "kills", Random(options.seed))
        wrong += two_at_once(folder / "two") + two_judges_at_once(folder / "two")
    print("\n".join(f"{stage}: {count} kills" for stage, count in done.items()))
    print("\n".join(wrong) or f"{sum(done.values())} kills and two runs at once: every byte is as if left alone.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
