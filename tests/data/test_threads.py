"""Files that stay on the disk, through both loaders that can read them."""

import numpy as np
import pytest
import torch
from PIL import Image

from infer_fast.data.augment import Augmentation, Sampling
from infer_fast.data.images import FileSplit
from infer_fast.data.loader import choose_loader, feed
from infer_fast.data.pixels import AS_STORED
from infer_fast.data.sets import FileSet
from infer_fast.errors import InferFastError

LOADERS = ["torch", "dali"]


def needed(loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")


def files(folder, count=10, size=(40, 30)):
    """Image i is filled with level 20*i, PNG and JPEG in turn: a batch tells what is in it."""
    paths = []
    for i in range(count):
        paths.append(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
        Image.fromarray(np.full((*size, 3), 20 * i, dtype=np.uint8)).save(paths[-1])
    return FileSplit(tuple(paths), torch.arange(count) % 3, (16, 16))


def made(split, loader, workers=4, **options):
    needed(loader)
    source = FileSet(split, 3, AS_STORED)
    sampling = Sampling(**{"augmentation": Augmentation(flip=True), **options})
    stream, make = feed(loader, source, sampling, workers=workers)
    return [make(*batch) for batch in stream]


def levels(images):
    return (images.mean((1, 2, 3)) * 255 / 20).round().int().tolist()


@pytest.mark.parametrize("loader", LOADERS)
def test_each_epoch_holds_every_file_once_with_its_class(tmp_path, generator, loader):
    batches = made(files(tmp_path), loader, batch_size=4, updates=7, generator=generator)
    assert [tuple(images.shape) for images, _ in batches] == [(n, 3, 16, 16) for n in (4, 4, 2, 4, 4, 2, 4)]
    orders = [[level for images, _ in part for level in levels(images)] for part in (batches[:3], batches[3:6])]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1]
    for images, targets in batches:
        assert targets.argmax(1).tolist() == [level % 3 for level in levels(images)]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_targets_are_mixed_as_the_files_are(tmp_path, generator, loader, mix):
    split = files(tmp_path, count=6)
    split = FileSplit(split.files[::5], torch.tensor([0, 1]), split.size)  # levels 0 and 100
    for images, targets in made(
        split, loader, batch_size=2, updates=6, augmentation=Augmentation(mix=mix), generator=generator
    ):
        torch.testing.assert_close(targets[:, 1], images.mean((1, 2, 3)) * 2.55, atol=0.02, rtol=0)


def gradient(folder):
    """One file whose red channel tells the row and whose green channel tells the column of every pixel."""
    rows, columns = np.meshgrid(np.arange(96) * 2, np.arange(120) * 2, indexing="ij")
    pixels = np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "gradient.png")
    return FileSplit((folder / "gradient.png",) * 300, torch.zeros(300, dtype=torch.int64), (32, 32))


def crops_of(images):
    """(height, width, centre row, centre column, flipped) of each crop of the gradient, in its pixels."""
    pixels = images * 255 / 2
    rows, columns = pixels[:, 0].mean(2), pixels[:, 1].mean(1)  # (N, 32)
    heights, widths = (rows[:, -1] - rows[:, 0]) * 32 / 31, (columns[:, -1] - columns[:, 0]) * 32 / 31
    return torch.stack([heights, widths.abs(), rows.mean(1), columns.mean(1), (widths < 0).float()], dim=1)


@pytest.mark.slow
def test_both_loaders_draw_crops_and_flips_from_the_same_distribution(tmp_path, generator):
    seen = []
    for loader in LOADERS:
        batches = made(gradient(tmp_path), loader, batch_size=50, updates=36, generator=generator)
        seen.append(crops_of(torch.cat([images for images, _ in batches])))
    ours, dali = seen
    area, ratio = ours[:, 0] * ours[:, 1] / (96 * 120), ours[:, 1] / ours[:, 0]
    assert 0.06 < area.min() < 0.15 and 0.9 < area.max() < 1.1 and ratio.min() > 0.7 and ratio.max() < 1.4
    for statistic, tolerance in ((torch.mean, (3.0, 3.0, 2.0, 2.0, 0.07)), (torch.std, (2.5, 2.5, 2.0, 2.0, 0.03))):
        difference = (statistic(ours, dim=0) - statistic(dali, dim=0)).abs()
        assert (difference < torch.tensor(tolerance)).all(), difference


def test_the_same_generator_gives_the_same_batches_whatever_the_workers(tmp_path):
    split = gradient(tmp_path)
    runs = [
        torch.cat([images for images, _ in made(split, "torch", batch_size=50, updates=3, workers=workers,
                                                generator=torch.Generator().manual_seed(3))])
        for workers in (0, 1, 4)
    ]  # fmt: skip
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[1], runs[2])


@pytest.mark.parametrize("loader", LOADERS)
def test_a_corrupt_file_is_named(tmp_path, generator, loader):
    split = files(tmp_path)
    split.files[3].write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(InferFastError, match=r"3\.jpg"):
        made(split, loader, batch_size=4, updates=3, generator=generator)


def test_the_loader_of_files_is_dali_or_torch(tmp_path, monkeypatch):
    source = FileSet(files(tmp_path, 2), 3, AS_STORED)
    with pytest.raises(InferFastError, match="fused needs a set in memory"):
        choose_loader("fused", source)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_loader("auto", source) == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_loader("auto", source) == "dali"


def test_a_file_split_decodes_what_is_asked_for_and_keeps_it_if_told(tmp_path):
    split = files(tmp_path, size=(40, 30))
    images = split.at(torch.tensor([[3, 1], [1, 9]]))
    assert images.shape == (2, 2, 3, 16, 16)
    assert (images.float().mean((2, 3, 4)) / 20).round().tolist() == [[3, 1], [1, 9]]
    kept = FileSplit(split.files, split.labels, split.size, keep=True)
    first = kept.at(torch.tensor([4, 2]))
    for path in split.files:
        path.unlink()
    assert torch.equal(kept.at(torch.tensor([2, 4])), first.flip(0))
    with pytest.raises(InferFastError, match=r"5\.jpg does not decode"):
        kept.at(torch.tensor([5]))


def test_the_margin_is_cut_off_around_the_centre(tmp_path):
    """256/224: the shorter side becomes 16/14 of the size, and a square is cut from the centre."""
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[1:15, 9:23] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    split = FileSplit((tmp_path / "a.png",), torch.tensor([0]), (14, 14), margin=16 / 14)
    assert split.at(torch.tensor([0])).eq(200).all()
