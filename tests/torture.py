"""Bad command lines and bad files, made by rules: each must end with one sentence, and with exit code 1 or 2.

    python -m tests.torture                  # every rule; prints the count, and each case that ended otherwise
    python -m tests.torture --only card      # the cases whose name has the word

No traceback, nothing "Unexpected", no success in silence: a command that goes on all the same has to say what it found.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from infer_fast import cli

SECONDS, LATE = 60, 130  # of a case, at most, and the code of one that took longer
FLAG = re.compile(r"(--[a-z][\w.-]*)(?:, (?:-\w|--[\w.-]+))* ?(.*)")
TINY = ["--squeeze.epochs=1", "--iteration=1", "--student.epochs=1", "--seeds=1", "--arch-name", "convnet"]
SMALL = ["digits-infer", *TINY, "--compare=none", "--ipc=3"]
SET = ["--syn-data-path", "runs/digits-infer"]
BAD_VALUES = {  # by what --help says a flag takes
    "INT": ["", "x", "1.5", "nan", "inf", "1e3", "-1", "9" * 30, "0x"],
    "FLOAT": ["", "x", "nan", "inf", "-inf", "1e999", "1,5"],
    "PATH": ["nowhere/at/all", "file.txt", "/dev/null", "a" * 300],
    "STR": ["", "../../x", "/x", "no such name", "\x1b[2J", "\udc80"],
    "{": ["nonsense", "", "None None"],
}
FREE = {  # any text is right, or a path that is made where it is not there
    "--wandb-project", "--wandb-api-key", "--output", "--output-dir", "--syn-data-path", "--data-path", "--exp-name",
}  # fmt: skip


class Case(NamedTuple):
    """A command that must not succeed, or (said) may if it says that it found something; begin: what is done before."""

    name: str
    module: str
    args: list[str]
    begin: Callable[[Path], object] = lambda _: None
    said: bool = False


@dataclass(frozen=True)
class Ended:
    """How a case ended: its exit code, and what it printed."""

    code: int | None
    output: str
    error: str

    def fault(self, said: bool) -> str | None:
        """What is wrong with that, if anything."""
        if self.code is None:
            return f"hangs for {SECONDS} seconds"
        for word in ("Traceback", "Unexpected"):
            if word in self.error:
                return f"{word}: {self.error.strip().splitlines()[-1][:200]}"
        sentences = [line for line in self.error.splitlines() if line.startswith("infer_fast: ")]
        if self.code == 0 and not (said and sentences):
            return "succeeds in silence"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if self.code == 1 and len(sentences) != 1:
            return f"{len(sentences)} sentences: {self.error[-200:]}"
        return None if self.error.strip() else "says nothing"


def run(case: Case, finished: Path) -> Ended:
    """The case in this process, in a folder of its own with a copy of a finished run."""
    with tempfile.TemporaryDirectory() as place, standing_in(Path(place)), alarm():
        shutil.copytree(finished / "runs", "runs")
        Path("file.txt").write_text("no such thing")
        case.begin(Path())
        output, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error), warnings.catch_warnings():
            warnings.simplefilter("always")  # each case is to be like a process of its own
            try:
                code: int | None = cli.run(importlib.import_module(f"infer_fast.{case.module}")._main, case.args)
            except SystemExit as stopped:
                code = stopped.code if isinstance(stopped.code, int) else 1
        code = None if code == LATE else code
        return Ended(code, output.getvalue(), error.getvalue())


@contextlib.contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    def late(*_: object) -> None:
        raise KeyboardInterrupt  # which nothing takes for an error of its own

    former = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def command_lines() -> Iterator[Case]:
    """Every flag of every command with values that it can't have, and flags that there are not."""
    settled = {
        "distill": [*SMALL, "--dry-run"], "squeeze": ["digits-infer", "--epochs=1", "--arch-name", "convnet"],
        "validate": [*SET, "--compare=none", "--seeds=1", "--epochs=1"], "relabel": SET, "report": [],
        "export": [*SET, "--output", "out"],
    }  # fmt: skip
    for module, args in settled.items():
        yield Case(f"{module}: an unknown flag", module, [*args, "--no-such-flag"])
        yield Case(f"{module}: a word too many", module, [*args, "word"])
        for flag, kind in flags_of(module).items():
            for value in [] if flag in FREE else values_for(kind):
                yield Case(f"{module} {flag}={value!r:.20}", module, [*args, f"{flag}={value}"])
            if kind and not kind.startswith("["):
                yield Case(f"{module} {flag} without a value", module, [*args, flag])
    for name in ("../x", "/x", "a/../../x", "..", "a//b", "a\\b", "\n", "x" * 300):
        yield Case(f"distill: leading out by --exp-name={name!r:.20}", "distill", [*SMALL, f"--exp-name={name}"])
        yield Case(f"distill: leading out by --dataset={name!r:.20}", "distill", [*SMALL, f"--dataset={name}"])
    for word in ("nonsense", "../digits", "DIGITS", "digits ", "", "\udc80"):
        yield Case(f"distill {word!r}", "distill", [word])
    for module in ("validate", "relabel", "report"):
        for folder in ("nowhere", "file.txt", "/dev/null", "", "runs/teachers", "a" * 300):
            yield Case(f"{module} of {folder!r:.20}", module, ["--syn-data-path", folder])


def values_for(kind: str) -> list[str]:
    """Values that a flag of this kind can't have; of a flag that may be None too, those of its other kind."""
    other = kind.removeprefix("{None}|").lstrip("[")
    return next((values for start, values in BAD_VALUES.items() if other.startswith(start)), [])


def flags_of(module: str) -> dict[str, str]:
    """The flags of a command, and what --help says they take."""
    output = io.StringIO()
    os.environ["COLUMNS"] = "400"
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        cli.run(importlib.import_module(f"infer_fast.{module}")._main, ["--help"])
    lines = [line.strip(" │┃") for line in output.getvalue().splitlines()]
    found = [FLAG.match(line) for line in lines if line.startswith("--")]
    return {match[1]: match[2].split("  ")[0].strip() for match in found if match and match[1] != "--help"}


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "two bytes short": lambda data: data[:-2],
    "noise": lambda data: bytes(np.random.default_rng(0).integers(0, 256, len(data), dtype=np.uint8)),
    "a page": lambda data: b"<!DOCTYPE html><html><body>Not found</body></html>",
    "a pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "zeros": lambda data: bytes(len(data)),
    "null": lambda data: b"null",
    "brackets": lambda data: b"[" * 100_000,
}


def damaged_files() -> Iterator[Case]:
    """Every file of a finished run damaged in every way, gone, or a folder: read by every command that reads it."""
    sets = ["runs/digits-infer/distilled.safetensors", "runs/digits-infer/card.json"]
    teachers, students = "runs/teachers/*.safetensors", "runs/digits-infer/students/*.json"
    readers = [("report", SET), ("export", [*SET, "--output", "out"]), ("validate", [*SET, "--compare=none"])]
    again = [("distill", [*SMALL, "--seeds=1"])]
    for pattern, commands, said in (
        *((path, [*readers, ("relabel", SET)], False) for path in sets),
        (teachers, [("relabel", SET), ("validate", [*SET, "--compare=random"]), *again], False),
        ("runs/digits-infer/room.json", again, False),
        (students, again, True),
    ):
        for how, damage in DAMAGE.items():
            for module, args in commands:
                name = f"{module}: {Path(pattern).name} is {how}"
                yield Case(
                    name,
                    module,
                    args,
                    lambda _, p=pattern, d=damage: each(p, lambda f: f.write_bytes(d(f.read_bytes()))),
                    said,
                )
        for module, args in commands if not said and "room" not in pattern else []:
            if module != "distill":
                yield Case(f"{module}: {pattern} is gone", module, args, lambda _, p=pattern: each(p, Path.unlink))
                yield Case(f"{module}: {pattern} is a folder", module, args, lambda _, p=pattern: each(p, into_folder))


def each(pattern: str, change: Callable[[Path], object]) -> None:
    for path in list(Path().glob(pattern)):
        change(path)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def hostile_cards() -> Iterator[Case]:
    """A card that leads elsewhere, or whose numbers and texts can't be."""
    teacher = [("relabel", SET)]
    judged = [("validate", [*SET, "--compare=none", "--seeds=1", "--epochs=1"])]
    everyone = [("report", SET), *judged, *teacher]
    rules = {
        ("teachers", 0, "path"): (["/etc/passwd", "../../../etc/passwd", "/dev/zero", "~/x", "..", "\0", ""], teacher),
        ("teachers", 0, "name"): (["nonsense", "../x", "", "\0"], teacher),
        ("teachers", 0, "sha256"): (["", "0" * 64], teacher),
        ("dataset", "data_path"): (["/etc", "/dev/zero", "../../..", "~", "//host/share", "\0", "nowhere"], judged),
        ("dataset", "val_dir"): (["/etc", "/proc", "../..", "\0"], judged),
        ("dataset", "name"): (["../../x", "/x", "", "\x1b[2J"], judged),
        ("dataset", "classes"): ([[], ["a"], ["a"] * 11, None, [1] * 10, ["\ud800"] * 10], everyone),
        ("dataset", "std"): ([[0, 0, 0], [-1, 1, 1], [float("nan")] * 3, [1, 1], "x"], everyone),
        ("dataset", "mean"): ([[float("inf")] * 3, [], None], everyone),
        ("dataset", "fingerprint"): (["", "x"], judged),
        ("sha256",): ([["0" * 64], [None], "x", 5], everyone),
        ("recipe",): ([None, {}, [], 5], everyone),
        ("recipe", "student", "lr"): ([float("nan"), "x", None, 10**400], everyone),
        ("recipe", "student", "loader"): (["x", None, 5], everyone),
        ("k",): ([None, "x", 1.5, 10**30], everyone),
        ("seconds",): ([{"a": float("nan")}, None, {"\ud800": 1}], everyone),
        ("table",): ([5, ["x"]], everyone),
        ("results",): ([None, [{}], [5], {"a": 1}], everyone),
        ("bytes", "ratio"): ([float("nan"), float("inf"), "x", None], everyone),
    }  # fmt: skip
    for place, (values, commands) in rules.items():
        for value in values:
            for module, args in commands:
                name = f"{module}: card {'.'.join(map(str, place))} = {value!r:.30}"
                yield Case(name, module, args, lambda _, p=place, v=value: changed_card(p, v))


def changed_card(place: tuple, value: object) -> None:
    path = Path("runs/digits-infer/card.json")
    card = json.loads(path.read_text())
    inner = card
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path.write_text(json.dumps(card))


def strangers_files() -> Iterator[Case]:
    """Checkpoints and folders of images that are not what they are given as."""
    squeeze = ["digits-infer", "--epochs=1", "--arch-name", "convnet"]
    for how, damage in DAMAGE.items():
        for ending in ("pth", "safetensors", "pt"):
            name = f"w.{ending}"
            yield Case(
                f"squeeze: a checkpoint {name} is {how}", "squeeze", [*squeeze, "--arch-path", name],
                lambda _, n=name, d=damage: Path(n).write_bytes(d(bytes(5000))),
            )  # fmt: skip
    data = ["--dataset", "mine", "--data-path", "data"]
    layouts: dict[str, Callable[[], object]] = {
        "empty": lambda: Path("data").mkdir(),
        "a file": lambda: Path("data").write_text("x"),
        "no test images": lambda: images("data/train", 2, 2),
        "empty classes": lambda: [Path(f"data/{s}/{c}").mkdir(parents=True) for s in ("train", "val") for c in "ab"],
        "other classes": lambda: (images("data/train", 2, 2), images("data/val", 2, 2, first=5)),
        "sizes that differ": lambda: (images("data/train", 2, 2), images("data/val", 2, 2, side=9)),
        "idx that is none": lambda: [image_free(f"data/{name}", b"x" * 100) for name in IDX],
        "idx that is empty": lambda: [image_free(f"data/{name}", b"") for name in IDX],
        "parquet that is none": lambda: [image_free(f"data/{s}.parquet", b"PAR1") for s in ("train", "test")],
    }
    for how, damage in DAMAGE.items():
        if how == "two bytes short":  # of a PNG's last four, which hold no pixel
            continue
        layouts[f"a picture is {how}"] = lambda d=damage: (
            images("data/train", 2, 2), images("data/val", 2, 2),
            (p := Path("data/train/c0/0.png")).write_bytes(d(p.read_bytes())),
        )  # fmt: skip
    for how, make in layouts.items():
        yield Case(f"squeeze: data: {how}", "squeeze", [*squeeze, *data], lambda _, m=make: m())
        yield Case(f"distill: data: {how}", "distill", [*SMALL, *data, "--dry-run"], lambda _, m=make: m())


IDX = [f"{s}-{what}-ubyte" for s in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


def images(folder: str, classes: int, each: int, first: int = 0, side: int = 8) -> None:
    for c in range(first, first + classes):
        Path(folder, f"c{c}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(np.full((side, side, 3), 9 * c + i, dtype=np.uint8)).save(f"{folder}/c{c}/{i}.png")


def image_free(name: str, data: bytes) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(data)


def every_case() -> list[Case]:
    """All cases of all rules."""
    return [*command_lines(), *damaged_files(), *hostile_cards(), *strangers_files()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    cases, wrong = [case for case in every_case() if only in case.name], []
    with tempfile.TemporaryDirectory() as folder:
        with standing_in(Path(folder)), contextlib.redirect_stdout(None), contextlib.redirect_stderr(io.StringIO()):
            code = cli.run(importlib.import_module("infer_fast.distill")._main, list(SMALL))
        assert code == 0, "the run that the cases are copies of failed"
        for case in cases:
            fault = run(case, Path(folder)).fault(case.said)
            wrong += [f"{case.name}: {fault}"] if fault else []
    counts = Counter(re.split(r"[:=]", line.rpartition(": ")[2])[0][:30] for line in wrong)
    print("\n".join(wrong))
    print(f"{len(cases)} cases, {len(wrong)} that ended otherwise: {dict(counts)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
