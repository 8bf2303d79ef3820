"""Files on the disk are known by what they hold, read once, and refused before the work."""

import os
import sqlite3
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from infer_fast.data import survey
from infer_fast.data.images import FileSplit, image_dataset
from infer_fast.data.pixels import AS_STORED
from infer_fast.data.sources import load_dataset
from infer_fast.data.survey import content_hashes
from infer_fast.errors import DiskError, InferFastError

from .kinds import write_kinds


@pytest.fixture
def files(tmp_path, generator):
    (tmp_path / "files").mkdir()
    return write_kinds(tmp_path / "files", np.random.default_rng(generator.initial_seed()))


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read."""
    seen = []
    monkeypatch.setattr(survey, "_read", lambda file, own=survey._read: seen.append(file.name) or own(file))
    return seen


def dataset(files, known=None, **other):
    split = FileSplit(tuple(files), torch.zeros(len(files), dtype=torch.int64), (8, 8), known=known, **other)
    return image_dataset("d", split, split, ("a",), pixels=AS_STORED)


def test_each_file_is_read_once(files, tmp_path, read, capsys):
    kept = tmp_path / "kept" / "files.sqlite"
    first = content_hashes(files, kept)
    assert sorted(read) == sorted(file.name for file in files) and len(set(first)) > len(files) // 2
    assert capsys.readouterr().err.startswith(f"files read: {len(files)}/{len(files)} files, ")
    assert content_hashes(files[::-1], kept) == first[::-1] and len(read) == len(files)
    assert capsys.readouterr().err == ""
    assert content_hashes(files) == first and len(read) == 2 * len(files)


def test_the_fingerprint_is_that_of_the_content(files, tmp_path, read):
    kept = tmp_path / "files.sqlite"
    before = dataset(files, kept).fingerprint
    changed = next(file for file in files if file.name == "rgb.bmp")
    state, data = changed.stat(), bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(bytes(data))
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # of the same name and size, a moment later
    read.clear()
    assert dataset(files, kept).fingerprint != before and set(read) == {"rgb.bmp"}
    data[-1] ^= 1
    changed.unlink()
    changed.write_bytes(bytes(data))
    assert dataset(files, kept).fingerprint == before
    elsewhere = [file.rename(tmp_path / f"{i:03d}{file.suffix}") for i, file in enumerate(files)]
    assert dataset(elsewhere, kept).fingerprint == before
    assert dataset(elsewhere[::-1], kept).fingerprint != before
    assert dataset(elsewhere, kept, margin=1.5).fingerprint != before


def test_what_was_read_is_kept_when_a_later_file_is_refused(files, tmp_path, read, monkeypatch):
    kept = tmp_path / "files.sqlite"
    monkeypatch.setattr(survey, "SPAN", 4)
    files[6].write_bytes(b"no picture")
    with pytest.raises(InferFastError, match=f"{files[6].name} does not decode"):
        content_hashes(files, kept)
    read.clear()
    Image.new("RGB", (8, 8)).save(files[6], "PNG")
    assert len(content_hashes(files, kept)) == len(files)
    assert len(read) == len(files) - 4 and not {file.name for file in files[:4]} & set(read)


@pytest.mark.parametrize("damage", ["half", "levels", "bomb"])
def test_a_file_is_refused_before_the_work(tmp_path, damage, monkeypatch):
    for which in ("train", "val"):
        (tmp_path / which / "a").mkdir(parents=True)
        Image.new("RGB", (20, 20), "blue").save(tmp_path / which / "a" / "0.jpg")
    odd = tmp_path / "val" / "a" / "z.jpg"
    Image.new("RGB", (400, 400), "red").save(odd)
    if damage == "half":
        odd.write_bytes(odd.read_bytes()[:-60])
    elif damage == "levels":
        Image.fromarray(np.full((9, 9), 2, np.float32)).save(odd, "TIFF")
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InferFastError, match="z.jpg"):
            load_dataset("imagenet", tmp_path, cache=tmp_path / "cache")


def test_a_file_that_is_gone_is_named(files, tmp_path):
    files[2].unlink()
    with pytest.raises(InferFastError, match=f"{files[2].name} can't be read"):
        content_hashes(files, tmp_path / "files.sqlite")


def test_a_plan_reads_no_files(files, read):
    data = dataset(files)
    assert data.to(torch.device("cpu")).train.files == tuple(files) and read == []
    assert data.fingerprint == data.to(torch.device("cpu")).fingerprint and read


def test_a_store_that_is_damaged_or_cannot_be_written_is_named(files, tmp_path):
    (tmp_path / "bad.sqlite").write_bytes(b"no store" * 200)
    with pytest.raises(InferFastError, match=r"bad.sqlite is damaged .* delete it"):
        content_hashes(files, tmp_path / "bad.sqlite")
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(DiskError, match=r"folder.sqlite can't be written"):
        content_hashes(files, tmp_path / "folder.sqlite")


def test_two_runs_may_share_a_store(files, tmp_path):
    kept = tmp_path / "files.sqlite"
    expected = content_hashes(files[:3], kept)
    other = sqlite3.connect(kept)
    try:
        assert other.execute("SELECT count(*) FROM files").fetchone() == (3,)
        assert content_hashes(files, kept)[:3] == expected
        assert other.execute("SELECT count(*) FROM files").fetchone() == (len(files),)
    finally:
        other.close()
