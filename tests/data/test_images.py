"""The one form of a dataset in memory."""

import pytest
import torch

from infer_fast.data.images import FileSplit, Split, channel_statistics, held_out, image_dataset
from infer_fast.data.pixels import Pixels
from infer_fast.errors import InferFastError


def split(generator, *shape, classes=3):
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(shape[0]) % classes)


def test_statistics_equal_float64_ones(generator):
    images = split(generator, 9, 3, 5, 4).images
    mean, std = channel_statistics(images)
    exact = images.double().transpose(0, 1).flatten(1) / 255
    assert mean == pytest.approx(exact.mean(1).tolist(), rel=1e-12)
    assert std == pytest.approx(exact.std(1, unbiased=False).tolist(), rel=1e-12)


def test_a_constant_channel_has_a_usable_deviation():
    assert min(channel_statistics(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))[1]) > 0


def test_grey_becomes_colour_and_28_is_padded_to_32(generator):
    data = image_dataset("d", split(generator, 6, 1, 28, 28), split(generator, 3, 1, 28, 28), ("a", "b", "c"))
    assert data.train.images.shape == (6, 3, 32, 32)
    assert (data.train.images[:, :, :2] == 0).all() and (data.train.images[..., -2:] == 0).all()
    assert torch.equal(data.train.images[:, 0], data.train.images[:, 2])


def test_statistics_are_cached_under_the_fingerprint(generator, tmp_path):
    parts = split(generator, 6, 3, 4, 4), split(generator, 3, 3, 4, 4)
    first = image_dataset("d", *parts, ("a", "b", "c"), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text('{"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}')
    assert image_dataset("d", *parts, ("a", "b", "c"), tmp_path).pixels.mean == (0.1, 0.2, 0.3)
    other = image_dataset("d", split(generator, 6, 3, 4, 4), parts[1], ("a", "b", "c"), tmp_path)
    assert other.fingerprint != first.fingerprint and other.pixels.mean != (0.1, 0.2, 0.3)


def test_bytes_survive_normalisation(generator):
    images = split(generator, 4, 3, 5, 5).images
    pixels = Pixels((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert torch.equal(pixels.to_bytes(pixels.normalise(images)), images)


def test_held_out_images_are_training_images_and_always_the_same(generator):
    data = image_dataset("d", split(generator, 30, 3, 4, 4), split(generator, 3, 3, 4, 4), ("a", "b", "c"))
    part, again = held_out(data, 10), held_out(data, 10)
    assert (len(part.train), len(part.test)) == (20, 10) and part.pixels == data.pixels
    assert part.fingerprint == again.fingerprint != data.fingerprint

    def seen(split):
        return [
            (label, bytes(image.flatten().tolist()))
            for image, label in zip(split.images, split.labels.tolist(), strict=True)
        ]

    assert sorted(seen(part.train) + seen(part.test)) == sorted(seen(data.train))


def test_held_out_files_are_training_files(tmp_path):
    files = tuple(tmp_path / f"{i}.jpg" for i in range(9))
    for file in files:
        file.write_bytes(b"x")
    data = image_dataset(
        "d", FileSplit(files, torch.arange(9) % 3, (8, 8)), FileSplit(files[:1], torch.zeros(1).long(), (8, 8)),
        ("a", "b", "c"), pixels=Pixels((0.5,) * 3, (0.2,) * 3),
    )  # fmt: skip
    part = held_out(data, 4)
    assert sorted(part.train.files + part.test.files) == sorted(files) and len(part.test) == 4
    assert [files.index(f) % 3 for f in part.train.files] == part.train.labels.tolist()


@pytest.mark.parametrize("count", [-1, 30, 31])
def test_a_held_out_part_leaves_something(generator, count):
    data = image_dataset("d", split(generator, 30, 3, 4, 4), split(generator, 3, 3, 4, 4), ("a", "b", "c"))
    with pytest.raises(InferFastError, match=f"--held-out {count}: d has 30 training images"):
        held_out(data, count)


def test_what_is_wrong_is_named(generator):
    good = split(generator, 6, 3, 4, 4)
    with pytest.raises(InferFastError, match="label 2 in the training split is out of range"):
        image_dataset("d", good, good, ("a", "b"))
    with pytest.raises(InferFastError, match="label -1 in the test split"):
        image_dataset("d", good, Split(good.images, good.labels - 1), ("a", "b", "c"))
    with pytest.raises(InferFastError, match="holds no images"):
        image_dataset("d", Split(good.images[:0], good.labels[:0]), good, ("a", "b", "c"))
    with pytest.raises(InferFastError, match="4x4 and test images 5x5"):
        image_dataset("d", good, split(generator, 6, 3, 5, 5), ("a", "b", "c"))
    with pytest.raises(InferFastError, match="6 images but 5 labels"):
        image_dataset("d", Split(good.images, good.labels[:5]), good, ("a", "b", "c"))
