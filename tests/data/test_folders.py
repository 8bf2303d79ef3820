"""Which files and folders count: what systems leave is skipped everywhere, links are followed, pipes are not opened."""

import os

import pytest
import torch
from PIL import Image

from infer_fast.data.class_folders import has_folders, read_image_set
from infer_fast.data.decode import image_files
from infer_fast.data.folders import class_folders, files_below, split_folder, text_lines
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError

LEFT = [
    "._0.png",
    ".DS_Store",
    ".hidden.png",
    "Thumbs.db",
    "desktop.ini",
    ".ipynb_checkpoints/0-checkpoint.png",
    "__MACOSX/._0.png",
    "__MACOSX/0.png",
    "@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "Annotations/mask.png",
    "notes.txt",
]


def write(root, classes=("a", "b")):
    for which in ("train", "val"):
        for name in classes:
            (root / which / name).mkdir(parents=True)
            Image.new("RGB", (6, 6), "red").save(root / which / name / "0.png")


def leave(folder):
    """What systems, editors and annotators leave in a folder."""
    for name in LEFT:
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (3, 3)).save(path, "PNG")


def test_what_systems_leave_is_skipped_alike_everywhere(tmp_path):
    write(tmp_path / "data")
    clean = load_dataset("mine", tmp_path / "data")
    given = read_image_set(tmp_path / "data" / "train", clean.classes)
    for folder in [tmp_path / "data", *(tmp_path / "data").rglob("*")]:
        if folder.is_dir():
            leave(folder)
    left = load_dataset("mine", tmp_path / "data", val_path=tmp_path / "data" / "val")
    assert left.classes == ("a", "b") and left.fingerprint == clean.fingerprint
    assert torch.equal(read_image_set(tmp_path / "data" / "train", left.classes), given)
    leave(tmp_path / "alone")
    assert not has_folders(tmp_path / "alone") and image_files(tmp_path / "alone") == []


def test_links_to_folders_and_files_are_followed(tmp_path):
    write(tmp_path / "data", ("a",))
    for which in ("train", "val"):
        folder = tmp_path / "data" / which
        (folder / "b").symlink_to(folder / "a")
        (folder / "c" / "deep").mkdir(parents=True)
        (folder / "c" / "deep" / "part").symlink_to(folder / "a")
        (folder / "d").mkdir()
        (folder / "d" / "x.png").symlink_to(folder / "a" / "0.png")
    data = load_dataset("mine", tmp_path / "data")
    assert data.classes == ("a", "b", "c", "d") and data.train.labels.tolist() == [0, 1, 2, 3]


def test_a_link_back_to_a_folder_above_is_followed_once(tmp_path):
    write(tmp_path, ("a",))
    (tmp_path / "train" / "a" / "again").symlink_to(tmp_path / "train" / "a")
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path / "train")
    assert len(image_files(tmp_path / "train" / "a")) == 1


@pytest.mark.parametrize("where", ["train/c", "train/a/z.png", "val/a/part"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, where):
    write(tmp_path)
    (tmp_path / where).symlink_to(tmp_path / "nowhere")
    with pytest.raises(InferFastError, match=f"{where} is a link that leads nowhere"):
        load_dataset("mine", tmp_path)


@pytest.mark.timeout(20)
def test_pipes_and_devices_are_not_opened(tmp_path):
    write(tmp_path)
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    (tmp_path / "train" / "a" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "train" / "a" / "folder.png").mkdir()
    assert load_dataset("mine", tmp_path).train.labels.tolist() == [0, 1]


@pytest.mark.parametrize("where", [b"train/caf\xe9/0.png", b"val/caf\xe9/0.png", b"train/a/caf\xe9.png"])
def test_names_that_are_no_text_are_refused_when_they_are_read(tmp_path, where):
    write(tmp_path)
    path = os.path.join(os.fsencode(tmp_path), where)  # noqa: PTH118 - a path of bytes
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
    Image.new("RGB", (6, 6)).save(os.fsdecode(path))
    with pytest.raises(InferFastError, match=r"caf\\xe9.* has a name that is not UTF-8 text") as refused:
        load_dataset("mine", tmp_path)
    str(refused.value).encode()


def test_a_path_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    write(path)
    for read in (
        lambda: load_dataset("mine", path),
        lambda: load_dataset("mine", val_path=path / "val"),
        lambda: read_image_set(path / "val", ("a", "b")),
    ):
        with pytest.raises(InferFastError, match=r"caf\\xe9.* has a name that is not UTF-8 text") as refused:
            read()
        str(refused.value).encode()


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path, generator):
    names = [str(n) for n in torch.randperm(500, generator=generator)[:30].tolist()]
    for name in [*names, ".git"]:
        (tmp_path / name).mkdir()
    assert [f.name for f in class_folders(tmp_path)] == sorted(names, key=int)
    (tmp_path / "x").mkdir()
    assert [f.name for f in class_folders(tmp_path)] == sorted([*names, "x"])
    (tmp_path / "²").mkdir()  # a digit, and no number
    assert class_folders(tmp_path)[-1].name == "²"


def test_split_folders_may_have_capitals(tmp_path):
    write(tmp_path)
    (tmp_path / "train").rename(tmp_path / "Train")
    (tmp_path / "val").rename(tmp_path / "Valid")
    assert split_folder(tmp_path, "val", "valid", "test") == tmp_path / "Valid"
    assert split_folder(tmp_path, "test") is None
    assert len(load_dataset("mine", tmp_path).test) == 2
    (tmp_path / "valid").mkdir()
    assert split_folder(tmp_path, "valid") == tmp_path / "valid"


def test_lists_in_another_encoding_are_refused_and_marks_and_blank_lines_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffé\tb\r\n\r\nc\n \n".encode())
    assert text_lines(tmp_path / "a.txt") == ["é\tb", "c"]
    (tmp_path / "b.txt").write_bytes("abé".encode("latin-1"))
    with pytest.raises(InferFastError, match=r"b.txt is not UTF-8 text \(byte 2\)"):
        text_lines(tmp_path / "b.txt")


def test_the_order_of_files_is_that_of_their_paths(tmp_path):
    for name in ("b.PNG", "a/c.png", "a.png", "a/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert files_below(tmp_path, {".png"}) == sorted(tmp_path.rglob("*.[pP][nN][gG]"))
