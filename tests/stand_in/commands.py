"""Whole commands with tiny settings, as a user with a GPU runs them: engine, backend and precision chosen by auto."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infer_fast import cli
from infer_fast.errors import InferFastWarning
from infer_fast.extras import installed
from tests.stand_in.emulation import emulated
from tests.stand_in.record import Record

SMALL = (
    "--arch-name convnet convnet-residual --ipc 2 --iteration 4 --squeeze.epochs 1 --squeeze.batch-size 128 "
    "--student.epochs 4 --student.batch-size 8 --student.networks convnet --seeds 1 --compare none"
)


@contextmanager
def working_folder() -> Iterator[Record]:
    """A folder of its own, on the stand-in; a warning of ours (a teacher that was not captured) is an error."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), emulated() as record:
        warnings.simplefilter("error", InferFastWarning)
        os.chdir(folder)
        try:
            yield record
        finally:
            os.chdir(before)


def command(module: str, flags: str) -> None:
    """`python -m infer_fast.module flags`."""
    code = cli.run(importlib.import_module(f"infer_fast.{module}")._main, [*flags.split(), "--debug"])
    assert code == 0, f"{module} {flags} ended with {code}"


def check_distill_with_all_labels_relabel_and_validate():
    labels = "--student.labels static dynamic fkd --student.mix-type mixup"
    with working_folder() as record:
        command("distill", f"digits-infer --exp-name digits {SMALL} {labels}")
        run = Path("runs/digits")
        card = json.loads((run / "card.json").read_text())
        assert card["results"][0]["labels"], card["results"]
        command("relabel", "--fkd --epochs 5")
        drawn = installed("matplotlib")
        flags = "--tsne" if drawn else ""
        command("validate", f"{flags} --epochs 6 --seeds 1 --compare none --mix-type cutmix --labels static dynamic")
        assert (run / "tsne.png").is_file() == drawn
    assert all(record.captured_launches[kernel] > 0 for kernel in ("_forward", "_compose", "_scale_shift"))


def check_images_with_weight_adjustment():
    images = "--optimise images --steps 2 --rho 0.1 --r-var 11 --tv-l2 1e-3"
    with working_folder() as record:
        command("distill", f"digits-infer {SMALL} --arch-name convnet {images}")
    assert record.captured_launches["_forward"] > 0 and record.launches["_step"] == 4
