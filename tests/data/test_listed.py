"""Tiny-ImageNet and ImageNet as people have them: sorted or not, with lists or without, as Kaggle packs it."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from infer_fast.data.class_names import class_positions
from infer_fast.data.images import FileSplit
from infer_fast.data.listed import KAGGLE, class_words
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError

WNIDS = ("n01443537", "n01629819", "n01641577")
EACH = 2


def picture(path, label):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 40 + 60 * label, np.uint8)).save(path)


@pytest.fixture
def tiny(tmp_path):
    """Tiny-ImageNet as it is published; val_I.JPEG is of class I modulo 3."""
    for label, wnid in enumerate(WNIDS):
        for i in range(EACH):
            picture(tmp_path / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", label)
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
    lines = []
    for i in range(9):
        picture(tmp_path / "val" / "images" / f"val_{i}.JPEG", i % 3)
        lines.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t7\t7")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    picture(tmp_path / "test" / "images" / "test_0.JPEG", 0)
    return tmp_path


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet with its test images in one folder and no list."""
    for label, wnid in enumerate(WNIDS):
        for i in range(EACH):
            picture(tmp_path / "train" / wnid / f"{wnid}_{i}.JPEG", label)
    for i in range(9):
        picture(tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", i % 3)
    return tmp_path


def solution(ending="\n", boxes=" 1 2 3 4 "):
    rows = [f"ILSVRC2012_val_{i:08d},{WNIDS[i % 3]}{boxes}" for i in range(9)]
    return ending.join(["ImageId,PredictionString", *rows]) + ending


def sort(val, images, below):
    """What the scripts that people run do: the test images into class folders, or into `below` in them."""
    for i, path in enumerate(sorted(images.glob("*.JPEG"))):
        place = val / WNIDS[i % 3] / below
        place.mkdir(parents=True, exist_ok=True)
        shutil.move(path, place)


def right(data):
    """Whether every image has the level of its class, in both splits."""
    levels = [split.at(torch.arange(len(split))).float().mean((1, 2, 3)) for split in (data.train, data.test)]
    expected = [40 + 60 * split.labels for split in (data.train, data.test)]
    near = all((a - b).abs().max() < 4 for a, b in zip(levels, expected, strict=True))
    return near and (len(data.train), len(data.test)) == (3 * EACH, 9)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
def test_tiny_imagenet_as_it_is_published(tiny, ending):
    list_ = tiny / "val" / "val_annotations.txt"
    list_.write_bytes(list_.read_text().replace("\n", ending).encode())
    data = load_dataset("tiny", tiny)
    assert data.classes == WNIDS and right(data)


@pytest.mark.parametrize("below", ["", "images"])
@pytest.mark.parametrize("list_left", [True, False])
@pytest.mark.parametrize("folder_left", [True, False])
def test_tiny_imagenet_with_sorted_test_images(tiny, below, list_left, folder_left):
    sort(tiny / "val", tiny / "val" / "images", below)
    if not list_left:
        (tiny / "val" / "val_annotations.txt").unlink()
    if not folder_left:
        (tiny / "val" / "images").rmdir()
    assert right(load_dataset("tiny", tiny))
    assert right(load_dataset("tiny", tiny, val_path=tiny / "val"))


def test_tiny_imagenet_half_sorted_or_without_its_list_is_refused(tiny):
    list_ = tiny / "val" / "val_annotations.txt"
    lines = list_.read_text()
    list_.unlink()
    with pytest.raises(InferFastError, match="val holds no class folders, and there is no list"):
        load_dataset("tiny", tiny)
    list_.write_text(lines)
    (tiny / "val" / WNIDS[0]).mkdir()
    shutil.move(tiny / "val" / "images" / "val_0.JPEG", tiny / "val" / WNIDS[0])
    with pytest.raises(InferFastError, match="val has a class 'images'"):
        load_dataset("tiny", tiny)


def test_a_list_of_files_that_are_gone_names_the_first(tiny):
    (tiny / "val" / "images" / "val_4.JPEG").unlink()
    with pytest.raises(InferFastError, match=r"val_annotations.txt entry 5: .*val_4.JPEG does not exist"):
        load_dataset("tiny", tiny)


@pytest.mark.parametrize(("ending", "boxes"), [("\n", " 1 2 3 4 "), ("\r\n", ""), ("\r\n", " 1 2 3 4"), ("\n\n", "")])
@pytest.mark.parametrize("place", [".", "val"])
def test_imagenets_flat_test_images_with_their_list(imagenet, ending, boxes, place):
    (imagenet / place / "LOC_val_solution.csv").write_bytes(solution(ending, boxes).encode())
    data = load_dataset("imagenet", imagenet, image_size=8)
    assert isinstance(data.test, FileSplit) and data.classes == WNIDS and right(data)


@pytest.mark.parametrize("list_left", [True, False])
def test_imagenets_sorted_test_images(imagenet, list_left):
    sort(imagenet / "val", imagenet / "val", "")
    if list_left:
        (imagenet / "LOC_val_solution.csv").write_text(solution())
    assert right(load_dataset("imagenet", imagenet, image_size=8))


def test_imagenets_flat_test_images_without_a_list_are_refused(imagenet):
    with pytest.raises(InferFastError, match=r"sort them into class folders, or put .* LOC_val_solution.csv into"):
        load_dataset("imagenet", imagenet)


def test_imagenet_as_kaggle_packs_it(imagenet, tmp_path, monkeypatch):
    root = tmp_path / "kaggle"
    images = root / KAGGLE
    for which in ("train", "val"):
        images.mkdir(parents=True, exist_ok=True)
        shutil.move(imagenet / which, images)
    picture(images / "test" / "ILSVRC2012_test_00000001.JPEG", 0)
    (root / "LOC_val_solution.csv").write_text(solution())
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{w} word{i}, other\n" for i, w in enumerate(WNIDS)))
    monkeypatch.chdir(images)
    for path in (root, images, images.relative_to(images)):
        data = load_dataset("imagenet", path, image_size=8)
        assert data.classes == ("word0", "word1", "word2") and right(data)


def test_words_for_some_of_the_wnids_name_those(tmp_path):
    (tmp_path / "words.txt").write_text(f"n00000001\tother\n{WNIDS[0]}\tgoldfish, Carassius\n\n{WNIDS[1]}\t\n")
    words = class_words(tmp_path, WNIDS)
    assert words == ("goldfish", *WNIDS[1:])
    assert class_positions([WNIDS[2], WNIDS[0]], words, "x") == [2, 0]
    (tmp_path / "words.txt").write_text(f"{WNIDS[0]}\tcrane\n{WNIDS[1]}\tcrane, bird\n")
    assert class_words(tmp_path, WNIDS) == WNIDS


def test_words_and_wnids_name_the_same_folders(tiny):
    sort(tiny / "val", tiny / "val" / "images", "")
    (tiny / "words.txt").write_text("".join(f"{w}\tword{2 - i}\n" for i, w in enumerate(WNIDS)))
    data = load_dataset("tiny", tiny)
    assert data.classes == ("word2", "word1", "word0") and right(data)
    again = load_dataset("tiny", tiny, val_path=tiny / "val")
    assert torch.equal(again.test.labels, data.test.labels)
    alone = load_dataset("tiny", val_path=tiny / "val")
    judged = alone.with_classes(tuple(map(str, data.classes)), tiny / "val")
    assert torch.equal(judged.test.labels, data.test.labels)
