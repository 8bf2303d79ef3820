"""Datasets from files: every layout gives the same images back, and what is broken is named."""

import gzip
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infer_fast.data.images import FileSplit, Split
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError


def draw(generator, count, size=6):
    images = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return images.numpy(), (torch.arange(count) % 2).numpy()


def write_folder(root, generator, size=6):
    stored = {}
    for which, count in (("train", 8), ("val", 4)):
        images, labels = draw(generator, count, size)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / which / ("cat", "dog")[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        stored[which] = images, labels
    return stored


def write_idx(path, array, compress):
    raw = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.with_name(path.name + ".gz" * compress).write_bytes(gzip.compress(raw) if compress else raw)


def png(image):
    import io

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(root, generator, image="image", label="label", names=None):
    import pyarrow as pa
    from pyarrow import parquet

    stored = {}
    for which, count in (("train", 8), ("test", 4)):
        images, labels = draw(generator, count)
        table = pa.table({image: [{"bytes": png(i), "path": None} for i in images], label: labels})
        if names:
            features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        parquet.write_table(table, root / f"{which}-00000-of-00001.parquet")
        stored[which] = images, labels
    return stored


def test_digits_are_scikit_learns():
    data = load_dataset("digits")
    assert data.train.images.shape[1:] == (3, 8, 8) and len(data.train) + len(data.test) == 1797
    assert data.train.images.max() == 255 and data.train.images.min() == 0
    counts = torch.bincount(data.test.labels)
    assert len(counts) == 10 and counts.min() >= 55


def test_image_folder(generator, tmp_path):
    stored = write_folder(tmp_path, generator)
    data = load_dataset("mine", tmp_path)
    assert data.classes == ("cat", "dog")
    by_class = np.concatenate([stored["train"][0][stored["train"][1] == c] for c in (0, 1)])
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1).numpy(), by_class)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4


def test_tiny_imagenets_own_layout(generator, tmp_path):
    wnids = ("n01443537", "n01629819")
    (tmp_path / "val" / "images").mkdir(parents=True)
    lines = []
    for c, wnid in enumerate(wnids):
        (tmp_path / "train" / wnid / "images").mkdir(parents=True)
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("a.JPEG\t0\t0\t1\t1\n")
        for i in range(3):
            pixels = np.full((8, 8, 3), 50 + 100 * c, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
            Image.fromarray(pixels).save(tmp_path / "val" / "images" / f"val_{c}{i}.JPEG")
            lines.append(f"val_{c}{i}.JPEG\t{wnid}\t0\t0\t7\t7")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(reversed(lines)) + "\n")
    (tmp_path / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n")
    dataset = load_dataset("tiny-imagenet", tmp_path)
    assert dataset.classes == ("goldfish", "European fire salamander")
    for split in (dataset.train, dataset.test):
        assert torch.bincount(split.labels).tolist() == [3, 3]
        assert (split.images.float().mean((1, 2, 3)) - (50 + 100 * split.labels)).abs().max() < 2
    (tmp_path / "val" / "val_annotations.txt").write_text("val_00.JPEG\tn00000000\t0\t0\t7\t7\n")
    with pytest.raises(InferFastError, match=r"entry 1 \(val_00.JPEG\): 'n00000000' is no class"):
        load_dataset("tiny-imagenet", tmp_path)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files(generator, tmp_path, compress):
    images = torch.randint(0, 256, (20, 28, 28), generator=generator, dtype=torch.uint8).numpy()
    labels = (np.arange(20) % 10).astype(np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", images, compress)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", labels, compress)
    data = load_dataset("fashion-mnist", tmp_path)
    assert np.array_equal(data.train.images[:, 1, 2:-2, 2:-2].numpy(), images)
    assert data.classes[9] == "Ankle boot" and load_dataset("mine", tmp_path).classes[9] == "9"


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label")])
def test_parquet(generator, tmp_path, image, label):
    stored = write_parquet(tmp_path, generator, image, label, names=["cat", "dog"])
    data = load_dataset("mine", tmp_path)
    assert data.classes == ("cat", "dog")
    assert np.array_equal(data.test.images.permute(0, 2, 3, 1).numpy(), stored["test"][0])
    assert data.test.labels.tolist() == stored["test"][1].tolist()


def test_grey_palette_and_transparent_images_become_rgb(generator, tmp_path):
    write_folder(tmp_path, generator)
    for mode in ("L", "P", "RGBA", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new("RGB", (6, 6), (10, 20, 30)).convert(mode).save(tmp_path / "train" / "cat" / f"z{mode}.{suffix}")
    assert load_dataset("mine", tmp_path).train.images.shape == (12, 3, 6, 6)


def test_image_size_brings_mixed_sizes_to_one(generator, tmp_path):
    write_folder(tmp_path, generator)
    Image.new("RGB", (20, 9), "red").save(tmp_path / "train" / "dog" / "wide.png")
    with pytest.raises(InferFastError, match=r"wide.png is 20x9 where .* is 6x6"):
        load_dataset("mine", tmp_path)
    assert load_dataset("mine", tmp_path, image_size=5).train.images.shape == (9, 3, 5, 5)


def test_broken_images_are_named(generator, tmp_path):
    write_folder(tmp_path, generator)
    whole = (tmp_path / "train" / "cat" / "0.png").read_bytes()
    (tmp_path / "train" / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InferFastError, match=r"cut.png does not decode"):
        load_dataset("mine", tmp_path)


def test_missing_and_empty_places_are_errors(tmp_path):
    with pytest.raises(InferFastError, match="does not exist"):
        load_dataset("mine", tmp_path / "nowhere")
    with pytest.raises(InferFastError, match="holds no images in a known layout"):
        load_dataset("mine", tmp_path)
    with pytest.raises(InferFastError, match="--data-path"):
        load_dataset("mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(InferFastError, match="is a file"):
        load_dataset("mine", tmp_path / "file")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(InferFastError, match="neither val/ nor test/"):
        load_dataset("mine", tmp_path)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    with pytest.raises(InferFastError, match="holds no images"):
        load_dataset("mine", tmp_path)
    (tmp_path / "val" / "cow").mkdir()
    with pytest.raises(InferFastError, match="'cow'"):
        load_dataset("mine", tmp_path)


def test_broken_idx_and_parquet_files_are_named(generator, tmp_path):
    write_parquet(tmp_path, generator)
    path = tmp_path / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InferFastError, match="train-00000-of-00001.parquet is not a whole parquet file"):
        load_dataset("mine", tmp_path)
    idx = tmp_path / "idx"
    idx.mkdir()
    (idx / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\0" * 7))
    with pytest.raises(InferFastError, match="train-images-idx3-ubyte.gz is not a whole idx file"):
        load_dataset("mine", idx)


def test_parquet_with_other_columns_or_missing_splits_is_an_error(generator, tmp_path):
    write_parquet(tmp_path, generator, image="picture")
    with pytest.raises(InferFastError, match="one named image or img"):
        load_dataset("mine", tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(InferFastError, match="train\\* and test\\*"):
        load_dataset("mine", tmp_path)


def test_torchvision_layout_found_under_a_path(generator, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = torch.randint(0, 256, (20, 28, 28), generator=generator, dtype=torch.uint8).numpy()
    for prefix in ("train", "t10k"):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images, False)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(20) % 10).astype(np.uint8), False)
    data = load_dataset("fashion-mnist", tmp_path)
    assert data.train.images.shape == (20, 3, 32, 32) and data.classes[0] == "T-shirt/top"
    with pytest.raises(InferFastError, match="cifar10 could not be read"):
        load_dataset("cifar10", tmp_path)


CIFAR100 = os.environ.get("INFER_FAST_CIFAR100")


@pytest.mark.skipif(
    CIFAR100 is None, reason="INFER_FAST_CIFAR100 does not name a folder with CIFAR-100's parquet files"
)
def test_real_cifar100_parquet():
    data = load_dataset("cifar100", Path(CIFAR100))
    assert data.train.images.shape == (50_000, 3, 32, 32) and len(data.test) == 10_000
    assert data.pixels.mean == pytest.approx((0.5071, 0.4865, 0.4409), abs=1e-3)
    assert torch.bincount(data.train.labels).tolist() == [500] * 100 and data.classes[0] == "apple"


def test_imagenet_stays_on_the_disk_and_is_read_as_it_comes(generator, tmp_path):
    """Class folders, then a flat val/ with its table of classes: 224x224 of a shorter side of 256, known statistics."""
    stored = write_folder(tmp_path, generator, size=300)
    data = load_dataset("ImageNet-1K", tmp_path)
    assert data.name == "imagenet" and data.size == (224, 224) and data.pixels.mean == (0.485, 0.456, 0.406)
    assert isinstance(data.train, FileSplit) and isinstance(data.test, FileSplit)
    assert not data.train.keep and data.test.keep and data.train.nbytes == 8 * 3 * 224 * 224
    expected = Image.fromarray(stored["train"][0][0]).resize((256, 256), Image.Resampling.BILINEAR)
    expected = np.asarray(expected.crop((16, 16, 240, 240)))
    first = int([path.name for path in data.train.files].index("0.png"))
    assert np.array_equal(data.train.at(torch.tensor(first)).permute(1, 2, 0).numpy(), expected)
    fingerprint = data.fingerprint
    assert load_dataset("imagenet", tmp_path).to(torch.device("cpu")).fingerprint == fingerprint
    assert load_dataset("imagenet", tmp_path, image_size=64).fingerprint != fingerprint

    lines = ["ImageId,PredictionString"]
    for path in sorted((tmp_path / "val").glob("*/*.png")):
        Image.open(path).save(tmp_path / "val" / f"x{path.stem}.JPEG")
        lines.append(f"x{path.stem},{path.parent.name} 1 2 3 4")
        path.unlink()
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).rmdir()
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "LOC_synset_mapping.txt").write_text("cat tabby, tabby cat\ndog beagle\n")
    flat = load_dataset("imagenet", tmp_path)
    assert flat.classes == ("tabby", "beagle") and flat.test.labels.tolist() == data.test.labels.tolist()


def test_folders_too_large_for_the_memory_stay_on_the_disk(generator, tmp_path, monkeypatch):
    write_folder(tmp_path, generator)
    resident = load_dataset("mine", tmp_path)
    monkeypatch.setattr("infer_fast.data.class_folders.most_resident", lambda: 700)  # of 8 x 108 bytes
    large = load_dataset("mine", tmp_path)
    assert isinstance(large.train, FileSplit) and isinstance(large.test, Split)
    assert torch.equal(large.train.at(torch.arange(8)), resident.train.images)
    assert (large.pixels, large.classes) == (resident.pixels, resident.classes)
    Image.new("RGB", (8, 6)).save(sorted((tmp_path / "train" / "cat").iterdir())[0])
    with pytest.raises(InferFastError, match="8 images of 8x6 stay on the disk.*--image-size"):
        load_dataset("mine", tmp_path)


def test_test_images_can_lie_elsewhere(generator, tmp_path):
    write_folder(tmp_path / "a", generator)
    other = write_folder(tmp_path / "b", generator)["val"][0]
    data = load_dataset("mine", tmp_path / "a", val_path=tmp_path / "b" / "val")
    assert len(data.train) == 8 and len(data.test) == 4
    found = sorted(data.test.images.sum((1, 2, 3)).tolist())
    assert found == sorted(int(image.sum()) for image in other)
    alone = load_dataset("mine", val_path=tmp_path / "b" / "val")
    assert len(alone.train) == 0 and alone.classes == ("cat", "dog") and alone.size == (6, 6)
    (tmp_path / "b" / "val" / "cow").mkdir()
    with pytest.raises(InferFastError, match="class 'cow' that is none of the 2"):
        load_dataset("mine", tmp_path / "a", val_path=tmp_path / "b" / "val")
