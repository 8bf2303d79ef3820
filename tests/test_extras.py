"""What a plain install leaves out is named before the work, with the line that brings it."""

from __future__ import annotations

import importlib.util

import pytest

from infer_fast import extras
from infer_fast.data.loader import choose_loader
from infer_fast.data.sets import FileSet
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError


@pytest.fixture
def without(monkeypatch):
    """without("pyarrow") makes that package, and what is in it, impossible to find."""
    find = importlib.util.find_spec

    def hide(*packages):
        def hidden(name, *rest):
            if name.split(".")[0] in packages:
                if "." in name:
                    raise ModuleNotFoundError(name)  # as find_spec does where the package around it is missing
                return None
            return find(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", hidden)

    return hide


def test_a_missing_package_is_named_with_its_line(without):
    assert extras.installed("json") and not extras.installed("nowhere_to_be_found.inner")
    without("nvidia", "pyarrow")
    with pytest.raises(InferFastError, match=r"The loader dali needs the package nvidia.dali.*pip install nvidia-dali"):
        extras.require("nvidia.dali", "The loader dali")


ASKED = {
    "dali for students": (["distill", "--student.loader", "dali"], "pip install nvidia-dali-cuda130"),
    "dali for teachers": (["distill", "--squeeze.loader", "dali"], "pip install nvidia-dali-cuda130"),
    "wandb": (["distill", "--wandb-name", "mine"], "pip install wandb"),
    "timm for students": (["distill", "--student.networks", "resnet10t"], "timm"),
    "the picture of features": (["validate", "--tsne"], "pip install matplotlib"),
    "parquet": (["export", "--format", "parquet", "--output", "out"], "pip install pyarrow"),
}


@pytest.mark.parametrize("name", ASKED)
def test_it_is_named_before_the_work(tmp_path, call_module, copied_run, without, monkeypatch, name):
    words, line = ASKED[name]
    if "timm" in name and extras.installed("timm"):
        pytest.skip("timm is installed, and its import is not looked for first")
    without("nvidia", "wandb", "matplotlib", "pyarrow", "timm")
    before = sorted((tmp_path / "runs").rglob("*"))
    done = call_module(*words)
    assert done.returncode == 1 and line in done.stderr, done.stderr
    after = sorted(path for path in (tmp_path / "runs").rglob("*") if "datasets" not in path.parts)  # statistics
    assert after == before and not (tmp_path / "out").exists()


def test_parquet_files_name_what_reads_them(tmp_path, without):
    for name in ("train-0.parquet", "test-0.parquet"):
        (tmp_path / name).write_bytes(b"PAR1")
    without("pyarrow")
    with pytest.raises(InferFastError, match=r"Reading train-0.parquet needs the package pyarrow.*pip install pyarrow"):
        load_dataset("mine", tmp_path)


def test_files_on_the_disk_go_without_dali_where_it_is_not_there(without):
    source = FileSet(None, 3, None)
    without("nvidia")
    assert choose_loader("auto", source) == "torch"
