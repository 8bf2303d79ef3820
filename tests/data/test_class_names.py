"""Which class a folder stands for: names first, else numbers, else a refusal with both lists; one rule everywhere."""

import pytest
import torch
from PIL import Image

from infer_fast.data.class_folders import Reading, read_image_set, read_test_folders
from infer_fast.data.class_names import ClassName, class_positions
from infer_fast.data.images import Split, image_dataset
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError

TWELVE = tuple(str(n) for n in range(12))


def write(folder, names, level=lambda name: int(name.removeprefix("new"))):
    """One image for each folder, filled with 10 times its number."""
    for name in names:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (6, 6), (10 * level(name),) * 3).save(folder / name / "0.png")
    return folder


def shuffled(names, generator):
    return [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]


@pytest.mark.parametrize("form", ["{}", "{:03d}", "new{:03d}", "new{}"])
def test_folder_10_is_class_10_everywhere(tmp_path, generator, capsys, form):
    write(tmp_path / "data" / "train", TWELVE)
    write(tmp_path / "data" / "val", shuffled([form.format(n) for n in range(12)], generator))
    data = load_dataset("mine", tmp_path / "data")
    assert data.classes == TWELVE
    elsewhere = load_dataset("mine", tmp_path / "data", val_path=tmp_path / "data" / "val")
    for split in (data.train, data.test, elsewhere.test):
        assert (split.images[:, 0, 0, 0] == 10 * split.labels).all() and len(split) == 12
    given = read_image_set(tmp_path / "data" / "val", data.classes)
    assert given[:, 0, 0, 0, 0].tolist() == [10 * n for n in range(12)]
    how = "name" if form == "{}" else "number"
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{tmp_path}/data/val: 12 of 12 classes, folders matched by {how}"] * 4


def test_names_come_before_numbers(generator):
    classes = tuple(shuffled(TWELVE, generator))
    assert class_positions(TWELVE, classes, "x") == [classes.index(name) for name in TWELVE]
    assert class_positions(["1", "0"], ("1", "0"), "x") == [0, 1]
    assert class_positions(["new1", "new0"], ("new0", "new1"), "x") == [1, 0]


def test_numbers_are_positions_unless_the_classes_are_numbers_themselves():
    assert class_positions(["2", "000", "new1"], ("cat", "dog", "cow"), "x") == [2, 0, 1]
    assert class_positions(["001", "003"], ("1", "2", "3"), "x") == [0, 2]
    assert class_positions(["000", "002"], ("1", "2", "3"), "x") == [0, 2]
    assert class_positions(["new001"], ("1", "2", "3"), "x") == [1]


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (["cat", "cow"], "cow"),
        (["cat", "1", "7"], "7"),
        (["0", "1", "3"], "3"),
        (["-1"], "-1"),
        (["new"], "new"),
        (["²"], "²"),
        (["1.0"], "1.0"),
    ],
)
def test_folders_that_are_neither_are_refused_with_both_lists(names, wrong):
    with pytest.raises(InferFastError) as refused:
        class_positions(names, ("cat", "dog", "hen"), "x/val")
    assert f"x/val has a class {wrong!r} that is none of the 3" in str(refused.value)
    assert f"its folders are {', '.join(names)}, the classes cat, dog, hen." in str(refused.value)


def test_names_beside_numbers_are_refused():
    with pytest.raises(InferFastError, match="x has folders that are names of classes beside folders that are numbers"):
        class_positions(["cat", "new1"], ("cat", "dog"), "x")


def test_two_folders_for_one_class_are_refused():
    with pytest.raises(InferFastError, match="x has two folders for the class 'b', '1' and 'new01'"):
        class_positions(["0", "1", "new01"], ("a", "b", "c"), "x")


def test_long_lists_are_cut():
    with pytest.raises(InferFastError, match="its folders are x, the classes c0, c1, .*, c11 and 988 more"):
        class_positions(["x"], tuple(f"c{i}" for i in range(1000)), "x")


def test_a_class_goes_by_its_folders_name_too(generator):
    classes = (ClassName("tench", "n01440764"), ClassName("goldfish", "n01443537"), "n01484850")
    assert class_positions(["n01443537", "tench", "n01484850"], classes, "x") == [1, 0, 2]
    assert classes == ("tench", "goldfish", "n01484850")


def test_test_folders_may_be_some_of_the_classes(tmp_path):
    write(tmp_path, ["cow", "cat"], level=len)
    split, classes = read_test_folders(tmp_path, ("hen", "cat", "cow"), Reading())
    assert classes == ("hen", "cat", "cow") and split.labels.tolist() == [1, 2]


def test_a_set_of_others_has_a_folder_for_every_class(tmp_path):
    write(tmp_path, ["0", "2"])
    with pytest.raises(InferFastError, match="2 class folders for 3 classes: none for 'b'"):
        read_image_set(tmp_path, ("a", "b", "c"))


def test_a_dataset_of_test_images_alone_takes_the_classes_of_a_set(tmp_path, generator):
    names = ["cat", "dog", "hen", "owl"]
    write(tmp_path, names, level=names.index)
    data = load_dataset("mine", val_path=tmp_path)
    classes = tuple(shuffled(names, generator))
    judged = data.with_classes(classes, tmp_path)
    assert [classes[label] for label in judged.test.labels.tolist()] == names and judged.classes == classes
    assert data.with_classes(data.classes, tmp_path) is data
    with pytest.raises(InferFastError, match="has a class 'hen' that is none"):
        data.with_classes(("cat", "dog", "cow", "owl"), tmp_path)


def test_words_keep_their_wnids_on_the_way_through_a_dataset(generator):
    images = torch.randint(0, 256, (4, 3, 4, 4), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(4) % 2)
    data = image_dataset("d", split, split, (ClassName("tench", "n1"), ClassName("shark", "n2")))
    assert class_positions(["n2", "n1"], data.to(torch.device("cpu")).classes, "x") == [1, 0]


def test_a_training_class_without_images_is_named(tmp_path):
    for which in ("train", "val"):
        write(tmp_path / which, TWELVE)
    (tmp_path / "train" / "7" / "0.png").unlink()
    with pytest.raises(InferFastError, match="train/7 holds no images"):
        load_dataset("mine", tmp_path)
