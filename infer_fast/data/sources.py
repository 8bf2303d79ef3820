"""Where datasets come from: each source is read into the same ImageDataset.

digits (scikit-learn's own), torchvision's names (downloaded, or found under the given path), a folder of idx(.gz)
files, an ImageFolder (train/ and val/ or test/), Tiny-ImageNet's own layout, and Hugging Face parquet files.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from infer_fast.data.images import ImageDataset, Split, image_dataset
from infer_fast.errors import InferFastError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
TORCHVISION_NAMES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "mnist": "MNIST",
    "svhn": "SVHN",
}
ANNOTATIONS = "val_annotations.txt"
DIGITS_TEST_SHARE = 3  # every third image of each class is held out


def load_dataset(
    name: str, data_path: Path | None = None, *, image_size: int | None = None, cache: Path | None = None
) -> ImageDataset:
    """Reads dataset `name`: from `data_path` in whatever layout is found there, else from its public source.

    image_size: resize (shorter side) and centre-crop every image of a folder or parquet to this many pixels squared.
    cache: a folder where channel statistics are kept.
    Raises InferFastError when the path is missing or holds no images, an image does not decode, sizes are mixed,
    labels are out of range, or a download fails.
    """
    key = name.lower().replace("_", "-").replace("fashionmnist", "fashion-mnist")
    if data_path is None:
        if key == "digits":
            parts = read_digits()
        elif key in TORCHVISION_NAMES:
            parts = read_torchvision(key, Path("data"), download=True)
        else:
            known = ", ".join(["digits", *TORCHVISION_NAMES])
            raise InferFastError(
                f"{name} is not a dataset that can be fetched by name ({known}): give its place with --data-path."
            )
    else:
        parts = _read_path(key, data_path, image_size)
        parts = (*parts[:2], _known_names(key, parts[2]))
    return image_dataset(key, *parts, cache=cache)


def _read_path(name: str, path: Path, image_size: int | None) -> tuple[Split, Split, tuple[str, ...]]:
    if not path.exists():
        raise InferFastError(f"{path} does not exist: --data-path must be the folder that holds the dataset.")
    if not path.is_dir():
        raise InferFastError(f"{path} is a file: --data-path must be the folder that holds the dataset.")
    if any(path.rglob("*.parquet")):
        return read_parquet(path, image_size)
    if any(path.glob("*-ubyte*")):
        return read_idx(path)
    if (path / "val" / ANNOTATIONS).is_file():
        return read_tiny_imagenet(path, image_size)
    if (path / "train").is_dir():
        return read_image_folder(path, image_size)
    if name in TORCHVISION_NAMES:
        return read_torchvision(name, path, download=False)
    raise InferFastError(
        f"{path} holds no images in a known layout: expected *.parquet, idx files (train-images-idx3-ubyte[.gz] ...), "
        "or train/<class>/ and val|test/<class>/ folders."
    )


def _known_names(name: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Files without class names get torchvision's, where the dataset is one that it knows."""
    if name not in TORCHVISION_NAMES or any(not c.isdigit() for c in classes):
        return classes
    import torchvision

    names = getattr(getattr(torchvision.datasets, TORCHVISION_NAMES[name]), "classes", ())
    return tuple(names) if len(names) == len(classes) else classes


def read_digits() -> tuple[Split, Split, tuple[str, ...]]:
    """scikit-learn's bundled 8x8 digits (1,797 grey images, levels 0..16): two thirds training, one third test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.round(data.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(10):
        held_out[torch.nonzero(labels == c).flatten()[::DIGITS_TEST_SHARE]] = True
    train, test = (Split(images[mask], labels[mask]) for mask in (~held_out, held_out))
    return train, test, tuple(str(c) for c in range(10))


def read_torchvision(name: str, root: Path, *, download: bool) -> tuple[Split, Split, tuple[str, ...]]:
    """A dataset that torchvision knows, kept under `root` in torchvision's own layout."""
    import torchvision

    cls = getattr(torchvision.datasets, TORCHVISION_NAMES[name])
    splits = []
    try:
        for train in (True, False):
            which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
            splits.append(cls(str(root), download=download, **which))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = "or give its place with --data-path" if download else "expected torchvision's layout of it there"
        raise InferFastError(
            f"{name} could not be read under {root} ({reason}): check the network, {advice}."
        ) from error
    parts = []
    for split in splits:
        pixels = torch.as_tensor(split.data)
        if name == "svhn":
            images, targets = pixels, split.labels
        else:
            images = pixels.permute(0, 3, 1, 2) if pixels.dim() == 4 else pixels.unsqueeze(1)
            targets = split.targets
        parts.append(Split(images.contiguous(), torch.as_tensor(targets).long()))
    classes = getattr(splits[0], "classes", None) or [str(c) for c in range(10)]
    return parts[0], parts[1], tuple(classes)


def read_idx(path: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """A folder of idx files as MNIST is published: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]."""
    splits = []
    for prefix in ("train", "t10k"):
        images = _read_idx_file(_find_idx(path, f"{prefix}-images-idx3-ubyte"))
        labels = _read_idx_file(_find_idx(path, f"{prefix}-labels-idx1-ubyte"))
        if images.ndim != 3 or labels.ndim != 1:
            raise InferFastError(
                f"{path}: the {prefix} idx files have {images.ndim} and {labels.ndim} axes, not 3 and 1."
            )
        splits.append(Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))))
    classes = max(10, max(int(s.labels.max()) + 1 if len(s) else 0 for s in splits))
    return splits[0], splits[1], tuple(str(c) for c in range(classes))


def _find_idx(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise InferFastError(f"{folder} has no {name} or {name}.gz: an idx dataset needs all four files.")


def _read_idx_file(path: Path) -> np.ndarray:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, axes = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
        if zero != 0 or kind != 0x08:
            raise ValueError(f"magic number {raw[:4].hex()} is not that of unsigned bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
    except (OSError, EOFError, struct.error, ValueError) as error:
        raise InferFastError(f"{path} is not a whole idx file ({error}).") from error


def read_image_folder(path: Path, image_size: int | None = None) -> tuple[Split, Split, tuple[str, ...]]:
    """train/<class>/*.{png,jpg,...} and val/ or test/ likewise; class names in sorted order."""
    test = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if test is None:
        raise InferFastError(f"{path} has train/ but neither val/ nor test/: students are judged on images held out.")
    classes = tuple(sorted(p.name for p in (path / "train").iterdir() if p.is_dir()))
    if not classes:
        raise InferFastError(f"{path / 'train'} holds no class folders.")
    unknown = sorted({p.name for p in test.iterdir() if p.is_dir()} - set(classes))
    if unknown:
        raise InferFastError(f"{test} has a class {unknown[0]!r} that {path / 'train'} has not.")
    splits = [_read_class_folders(folder, classes, image_size) for folder in (path / "train", test)]
    return splits[0], splits[1], classes


def _read_class_folders(folder: Path, classes: tuple[str, ...], image_size: int | None) -> Split:
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise InferFastError(f"{folder} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}).")
    return Split(_decode_all([(str(f), f) for f in files], image_size), torch.tensor(labels))


def read_image_set(path: Path, classes: tuple[str, ...], image_size: int | None = None) -> torch.Tensor:
    """A distilled set that anyone wrote as class folders of images, uint8 (C, k, 3, H, W).

    Folders are newCCC or CCC (CCC the class's position), or named as the classes, or as many as there are classes (then
    in sorted order). Raises InferFastError for a missing class, unequal numbers of images, or what doesn't decode.
    """
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    place = _class_positions([p.name for p in folders], classes)
    missing = sorted(set(range(len(classes))) - set(place))
    if missing or len(place) != len(classes):
        raise InferFastError(
            f"{path} has {len(folders)} class folders for {len(classes)} classes: none for {classes[missing[0]]!r}."
            if missing
            else f"{path} has {len(folders)} class folders for {len(classes)} classes: expected one for each."
        )
    ordered = [folder for _, folder in sorted(zip(place, folders, strict=True))]
    files = [sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) for folder in ordered]
    counts = [len(found) for found in files]
    if min(counts) == 0 or min(counts) != max(counts):
        few, many = ordered[counts.index(min(counts))], ordered[counts.index(max(counts))]
        raise InferFastError(
            f"{few} holds {min(counts)} images and {many} {max(counts)}: every class must have as many, at least 1."
        )
    images = _decode_all([(str(f), f) for found in files for f in found], image_size)
    return images.view(len(classes), counts[0], *images.shape[1:])


def _class_positions(names: list[str], classes: tuple[str, ...]) -> list[int]:
    digits = [name.removeprefix("new") for name in names]
    if all(d.isdigit() and int(d) < len(classes) for d in digits):
        return [int(d) for d in digits]
    if set(names) <= set(classes):
        return [classes.index(name) for name in names]
    return list(range(len(names)))


def read_tiny_imagenet(path: Path, image_size: int | None = None) -> tuple[Split, Split, tuple[str, ...]]:
    """Tiny-ImageNet as it is published: train/<wnid>/images/*, val/images/* with their wnids in val_annotations.txt.

    Class names from words.txt where it is there; else the wnids.
    """
    wnids = tuple(sorted(p.name for p in (path / "train").iterdir() if p.is_dir())) if (path / "train").is_dir() else ()
    if not wnids:
        raise InferFastError(f"{path / 'train'} holds no class folders.")
    files, labels = [], []
    for number, line in enumerate((path / "val" / ANNOTATIONS).read_text().splitlines(), start=1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in wnids:
            raise InferFastError(f"{path / 'val' / ANNOTATIONS} line {number}: {wnid!r} is no class of train/.")
        files.append(path / "val" / "images" / name)
        labels.append(wnids.index(wnid))
    if not files:
        raise InferFastError(f"{path / 'val' / ANNOTATIONS} names no images.")
    test = Split(_decode_all([(str(f), f) for f in files], image_size), torch.tensor(labels))
    return _read_class_folders(path / "train", wnids, image_size), test, _words(path / "words.txt", wnids)


def _words(path: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """The first word of each wnid, if the file has them all and they differ."""
    pairs = [line.partition("\t") for line in path.read_text().splitlines()] if path.is_file() else []
    words = {wnid: names.split(",")[0].strip() for wnid, _, names in pairs}
    named = tuple(words.get(wnid, wnid) for wnid in wnids)
    return named if len(set(named)) == len(wnids) else wnids


def read_parquet(path: Path, image_size: int | None = None) -> tuple[Split, Split, tuple[str, ...]]:
    """Hugging Face parquet: column image|img as {bytes, path}, column fine_label|label as integers.

    Splits by file name (train*, then test* or val*); class names from the Hugging Face schema if it is there.
    """
    files = sorted(path.rglob("*.parquet"))
    train = [f for f in files if f.name.startswith("train")]
    test = next((g for p in ("test", "val") if (g := [f for f in files if f.name.startswith(p)])), [])
    if not train or not test:
        raise InferFastError(f"{path} needs parquet files named train* and test* (or val*): found {_names(files)}.")
    splits, names = [], None
    for group in (train, test):
        split, found = _read_parquet_files(group, image_size)
        splits.append(split)
        names = names or found
    if names is None:
        names = tuple(str(c) for c in range(int(splits[0].labels.max()) + 1 if len(splits[0]) else 0))
    return splits[0], splits[1], names


def _read_parquet_files(files: list[Path], image_size: int | None) -> tuple[Split, tuple[str, ...] | None]:
    import pyarrow
    from pyarrow import parquet

    items, labels, names = [], [], None
    for file in files:
        try:
            table = parquet.read_table(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise InferFastError(f"{file} is not a whole parquet file ({str(error).splitlines()[0]}).") from error
        image = _column(file, table.column_names, ("image", "img"))
        label = _column(file, table.column_names, ("fine_label", "label"))
        rows = table.column(image).to_pylist()
        if any(not isinstance(row, dict) or row.get("bytes") is None for row in rows):
            raise InferFastError(f"{file}: column {image} must hold {{bytes, path}} with the bytes of a PNG or JPEG.")
        items += [(f"{file} row {i}", row["bytes"]) for i, row in enumerate(rows)]
        labels.append(torch.from_numpy(table.column(label).to_numpy().astype(np.int64)))
        names = names or _class_names(table.schema.metadata, label)
    if not items:
        raise InferFastError(f"{_names(files)} hold no images.")
    return Split(_decode_all(items, image_size), torch.cat(labels)), names


def _column(file: Path, present: list[str], wanted: tuple[str, ...]) -> str:
    for name in wanted:
        if name in present:
            return name
    raise InferFastError(f"{file} has columns {', '.join(present)}: expected one named {' or '.join(wanted)}.")


def _class_names(metadata: dict | None, label: str) -> tuple[str, ...] | None:
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _names(files: list[Path]) -> str:
    return ", ".join(f.name for f in files[:4]) + (", ..." if len(files) > 4 else "") or "none"


def _decode_all(items: list[tuple[str, Path | bytes]], image_size: int | None) -> torch.Tensor:
    """Decodes named files or byte strings into one uint8 tensor (N, 3, H, W), on all cores."""
    first = _decode(*items[0], image_size)
    images = np.empty((len(items), *first.shape), np.uint8)

    def place(position: int) -> None:
        name, source = items[position]
        pixels = _decode(name, source, image_size)
        if pixels.shape != first.shape:
            raise InferFastError(
                f"{name} is {_pixels(pixels)} where {items[0][0]} is {_pixels(first)}: "
                "all images must have one size (--image-size N brings them to NxN)."
            )
        images[position] = pixels

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(place, range(len(items)), chunksize=256):
            pass
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _pixels(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def _decode(name: str, source: Path | bytes, image_size: int | None) -> np.ndarray:
    """One image as uint8 (H, W, 3)."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            rgb = image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds; each means this image can't be read
        raise InferFastError(f"{name} does not decode as an image ({error}): repair or remove it.") from error
    if image_size is not None:
        rgb = _resize_and_crop(rgb, image_size)
    return np.asarray(rgb)


def _resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (max(size, round(n * scale)) for n in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
