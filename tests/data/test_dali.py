"""DALI's real pipelines on the CPU: resident sets, and folders of image files of every kind."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from infer_fast.data.augment import Augmentation
from infer_fast.data.dali import centred_batches, file_batches
from infer_fast.data.images import FileSplit, Split
from infer_fast.data.pixels import AS_STORED, Pixels
from infer_fast.data.sets import FileSet, resident_distilled, resident_split
from infer_fast.errors import InferFastError

from .kinds import write_kinds
from .test_distilled import make
from .test_loader import levels, made, resident

pytest.importorskip("nvidia.dali")


def test_without_augmentation_dali_gives_the_fused_batches():
    own = resident_distilled(make(torch.Generator().manual_seed(5)), soft=True)
    fused, dali = (
        made(own, loader, batch_size=8, updates=7, generator=torch.Generator().manual_seed(1))
        for loader in ("fused", "dali")
    )
    assert len(fused) == len(dali) == 7

    def sums(batches):  # DALI's seed is drawn first, so its epochs are other shuffles
        return torch.cat([images.sum((1, 2, 3)) for images, _ in batches[: -(-len(own) // 8)]]).sort()[0]

    torch.testing.assert_close(sums(dali), sums(fused), atol=1e-3, rtol=1e-4)


def test_each_epoch_holds_every_instance_once(generator):
    stream = made(resident(generator), "dali", batch_size=4, updates=7, generator=generator)
    assert [len(images) for images, _ in stream] == [4, 4, 2, 4, 4, 2, 4]
    for part in (stream[:3], stream[3:6]):
        assert sorted(level for images, _ in part for level in levels(images)) == list(range(10))
    for images, targets in stream:
        assert targets.argmax(1).tolist() == [level % 3 for level in levels(images)]


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_targets_are_mixed_as_the_images_are(generator, mix):
    logits = torch.arange(10).float().view(-1, 1).repeat(1, 3)
    for images, targets in made(
        resident(generator, size=8, logits=logits), "dali", batch_size=5, updates=6,
        augmentation=Augmentation(mix=mix), generator=generator,
    ):  # fmt: skip
        torch.testing.assert_close(targets[:, 0], images.mean((1, 2, 3)) * 255 / 20, atol=1e-3, rtol=1e-3)


def corner_image():
    """One image, all black but for one white pixel off the centre: where it ends up tells the crop and the flip."""
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    images[0, :, 7, 5] = 255
    return images


@pytest.mark.parametrize("loader", ["torch", "fused", "dali"])
def test_loaders_draw_crops_and_flips_from_the_same_distribution(generator, loader):
    """2,000 draws with padding 2: every one of 5 x 5 offsets and both flips, each about as often."""
    split = Split(corner_image().repeat(100, 1, 1, 1), torch.zeros(100, dtype=torch.int64))
    own = resident_split(split, 2, AS_STORED)
    stream = made(own, loader, batch_size=100, updates=20, augmentation=Augmentation(2, True), generator=generator)
    images = torch.cat([images for images, _ in stream])[:, 0]
    where = images.flatten(1).argmax(1)
    rows, columns = where // 16, where % 16
    flipped = columns > 7  # column 5 goes to 3..7, its mirror image to 8..12
    assert images.flatten(1).sum(1).eq(1).all()
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.06)
    across = torch.where(flipped, 15 - columns, columns)
    for offsets, low in ((rows, 5), (across, 3)):
        counts = torch.bincount(offsets - low, minlength=5)
        assert len(counts) == 5 and counts.min() > 300, counts
    both = torch.bincount((rows - 5) * 5 + across - 3, minlength=25)
    assert both.min() > 40, both


@pytest.mark.parametrize("loader", ["torch", "fused", "dali"])
@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_loaders_mix_with_the_same_weights_and_pixels(generator, loader, mix):
    """400 batches of a black and a white image: the weight of each, and the pixels' mean and deviation."""
    levels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    own = resident_split(Split(levels, torch.arange(2)), 2, AS_STORED)
    how = Augmentation(mix=mix, mix_alpha=0.8)
    batches = made(own, loader, batch_size=2, updates=400, augmentation=how, generator=generator)
    weights = torch.stack([targets.max(1).values for _, targets in batches])[:, 0]  # of the image that has more of it
    pixels = torch.cat([images for images, _ in batches])
    drawn = torch.distributions.Beta(0.8, 0.8).sample((4000,))
    expected = torch.maximum(drawn, 1 - drawn)
    mixed = weights[weights < 1]  # half of the pairs are an image and itself
    if mix == "mixup":
        assert mixed.mean().item() == pytest.approx(expected.mean().item(), abs=0.05)
        assert mixed.std().item() == pytest.approx(expected.std().item(), abs=0.03)
    assert pixels.mean().item() == pytest.approx(0.5, abs=0.03)
    shares = torch.stack([targets[:, 1] for _, targets in batches]).flatten()
    torch.testing.assert_close(shares, pixels.mean((1, 2, 3)), atol=1e-3, rtol=1e-3)
    deviation = pixels.flatten(1).std(1, correction=0)
    expected_deviation = (shares * (1 - shares)).sqrt() if mix == "cutmix" else torch.zeros_like(shares)
    torch.testing.assert_close(deviation, expected_deviation, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("loader", ["torch", "fused", "dali"])
def test_loaders_draw_resized_crops_from_torchvisions_distribution(generator, loader):
    """A picture of its own rows and columns, seen 1,500 times: where each crop was, against RandomResizedCrop's own."""
    rows, columns = torch.meshgrid(torch.arange(48) * 4, torch.arange(64) * 3, indexing="ij")
    picture = torch.stack([rows, columns, 0 * rows]).to(torch.uint8)
    split = Split(picture.repeat(100, 1, 1, 1), torch.zeros(100, dtype=torch.int64))
    own = resident_split(split, 2, AS_STORED)
    how = Augmentation(flip=True, resized=True)
    stream = made(own, loader, batch_size=100, updates=15, augmentation=how, generator=generator)
    images = torch.cat([images for images, _ in stream]) * 255
    down, across = images[:, 0].mean(2) / 4, images[:, 1].mean(1) / 3
    height, width = (down[:, -4] - down[:, 3]) * 48 / 41, (across[:, -4] - across[:, 3]) * 64 / 57
    seen = torch.stack([height, width.abs(), down.mean(1) + 0.5, across.mean(1) + 0.5], dim=1)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(1500)]
    ).float()
    expected = torch.stack(
        [theirs[:, 2], theirs[:, 3], theirs[:, 0] + theirs[:, 2] / 2, theirs[:, 1] + theirs[:, 3] / 2], dim=1
    )
    assert (width < 0).float().mean().item() == pytest.approx(0.5, abs=0.07)
    torch.testing.assert_close(seen.mean(0), expected.mean(0), atol=1.5, rtol=0.03)
    torch.testing.assert_close(seen.std(0), expected.std(0), atol=1.2, rtol=0.05)


@pytest.fixture
def folder(tmp_path, generator):
    """3 classes of 5 files: JPEG, PNG, grey JPEG, CMYK JPEG, and one with transparency; each of one colour."""
    for c in range(3):
        (tmp_path / f"class{c}").mkdir()
        level = 40 + 80 * c
        for i, (mode, ending) in enumerate(
            [("RGB", "jpg"), ("RGB", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png")]
        ):
            height, width = (torch.randint(20, 60, (2,), generator=generator)).tolist()
            pixels = np.full((height, width, 3), level, dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(tmp_path / f"class{c}" / f"{i}.{ending}")
    return tmp_path


def source_of(folder):
    files = sorted(folder.glob("*/*"))
    labels = torch.tensor([int(file.parent.name[-1]) for file in files])
    return FileSet(FileSplit(tuple(files), labels, (16, 16), 256 / 224), 3, Pixels(*[(0.5, 0.5, 0.5)] * 2))


def read(folder, **options):
    return list(centred_batches(source_of(folder), batch_size=4, **options))


def read_for_training(folder, **options):
    return list(file_batches(source_of(folder), batch_size=4, **options))


@pytest.mark.parametrize("training", [False, True])
def test_files_of_every_kind_are_decoded_to_rgb_with_their_class(folder, generator, training):
    stream = read_for_training(folder, generator=generator) if training else read(folder)
    assert [len(images) for images, _ in stream] == [4, 4, 4, 3]
    images, labels = (torch.cat(parts) for parts in zip(*stream, strict=True))
    assert images.shape == (15, 3, 16, 16) and sorted(labels.tolist()) == sorted([0, 1, 2] * 5)
    expected = ((40 + 80 * labels).float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(images.mean((1, 2, 3)), expected, atol=0.04, rtol=0)
    assert (labels.tolist() == sorted(labels.tolist())) != training


def test_shards_hold_every_image_once_between_them(folder):
    for training in (False, True):
        seen = []
        for shard in range(2):
            generator = torch.Generator().manual_seed(3)
            own = {"shard": (shard, 2)}
            stream = read_for_training(folder, generator=generator, **own) if training else read(folder, **own)
            seen += [label for _, labels in stream for label in labels.tolist()]
            assert sum(len(images) for images, _ in stream) in (7, 8)
        assert sorted(seen) == [0] * 5 + [1] * 5 + [2] * 5
    with pytest.raises(InferFastError, match="shard 2 of 2"):
        read(folder, shard=(2, 2))


def test_a_corrupt_file_is_named(folder):
    (folder / "class1" / "0.jpg").write_bytes(b"\xff\xd8\xff no picture")
    with pytest.raises(InferFastError, match=r"class1/0\.jpg does not decode"):
        read(folder)


def test_dali_and_pillow_give_the_same_pixels_of_every_kind_of_file(tmp_path, generator):
    paths = tuple(write_kinds(tmp_path, np.random.default_rng(generator.initial_seed())))
    split = FileSplit(paths, torch.zeros(len(paths), dtype=torch.int64), (24, 24))
    source = FileSet(split, 1, AS_STORED)
    images = torch.cat([images for images, _ in centred_batches(source, batch_size=8)])
    for path, dali, own in zip(paths, images, split.at(torch.arange(len(paths))), strict=True):
        assert torch.equal((dali * 255).round().to(torch.uint8), own), path.name


def test_turned_photographs_are_cropped_upright(tmp_path):
    """Columns from black to white, lying on their side: DALI's crops of them are brighter to the right."""
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))).convert("RGB")
    exif = Image.Exif()
    exif[0x112] = 6
    ramp.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif)
    ramp.save(tmp_path / "b.jpg")
    split = FileSplit((tmp_path / "a.jpg", tmp_path / "b.jpg"), torch.arange(2), (16, 16))
    generator = torch.Generator().manual_seed(0)
    ((images, _),) = file_batches(FileSet(split, 2, AS_STORED), batch_size=2, flip=False, generator=generator)
    assert (images.mean((1, 2))[:, -1] - images.mean((1, 2))[:, 0] > 0.15).all()
    assert (images.mean((1, 3)).std(1) < 0.02).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("damage", ["half", "empty", "other", "float"])
def test_both_loaders_refuse_a_file_by_the_same_sentence(folder, generator, training, damage):
    odd = folder / "class1" / "0.jpg"
    if damage == "float":
        odd = odd.with_suffix(".tif")
        Image.fromarray(np.full((20, 20), 7, np.float32)).save(odd)
    else:
        odd.write_bytes({"half": odd.read_bytes()[:-40], "empty": b"", "other": b"GIF89a"}[damage])
    with pytest.raises(InferFastError) as ours:
        pillows(folder)
    with pytest.raises(InferFastError) as dalis:
        read_for_training(folder, generator=generator) if training else read(folder)
    assert str(ours.value) == str(dalis.value) and odd.name in str(dalis.value)


def pillows(folder):
    split = source_of(folder).split
    return [split.at(torch.tensor([i])) for i in range(len(split))]


def test_damaged_exif_data_turn_a_photograph_in_both_loaders_or_in_none(tmp_path, generator):
    """Bytes of it replaced or missing, and twice in one file (on which DALI's own reading crashes)."""
    rng = np.random.default_rng(generator.initial_seed())
    picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112], exif[0x110] = 6, "a camera"
    whole, paths = exif.tobytes(), []
    for i in range(120):
        held = bytearray(whole)
        for place in rng.integers(6, len(held), rng.integers(1, 6)):
            held[place] = rng.integers(0, 256)
        paths.append(tmp_path / f"{i}.jpg")
        picture.save(paths[-1], exif=bytes(held[: rng.integers(6, len(held) + 1)] if i % 3 == 0 else held))
    segment = b"\xff\xe1" + (2 + len(whole)).to_bytes(2, "big") + whole
    data = paths[0].read_bytes()
    paths[0].write_bytes(data[:2] + segment + segment + data[2:])
    split = FileSplit(tuple(paths), torch.zeros(len(paths), dtype=torch.int64), (24, 24))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF data
        images = torch.cat([images for images, _ in centred_batches(FileSet(split, 1, AS_STORED), batch_size=40)])
        assert torch.equal((images * 255).round().to(torch.uint8), split.at(torch.arange(len(split))))
