"""Where datasets come from: each source is read into the same ImageDataset.

digits (scikit-learn's own), torchvision's names (downloaded, or found under the given path), a folder of idx(.gz)
files, an ImageFolder (train/ and val/ or test/), Tiny-ImageNet's and ImageNet's own layouts, and Hugging Face parquet
files. Class folders too large for the memory, and ImageNet always, stay on the disk (FileSplit).
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from infer_fast.data.decode import IMAGE_SUFFIXES, decode_all, image_files, open_rgb
from infer_fast.data.images import FileSplit, ImageDataset, Split, image_dataset, most_resident
from infer_fast.data.pixels import Pixels
from infer_fast.errors import InferFastError, first_line

AnySplit = Split | FileSplit
TORCHVISION_NAMES = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "fashion-mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "mnist": "MNIST",
    "svhn": "SVHN",
}
ANNOTATIONS = "val_annotations.txt"
SOLUTION = "LOC_val_solution.csv"  # the classes of ImageNet's validation images, where those lie in one folder
ALIASES = {
    "fashionmnist": "fashion-mnist",
    "tiny": "tiny-imagenet",
    "imagenet-1k": "imagenet",
    "imagenet1k": "imagenet",
}
IMAGENET_SIZE = 224
IMAGENET_MARGIN = 256 / 224  # a test image's shorter side over the square cut from its centre, as torchvision measures
IMAGENET_PIXELS = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what torchvision's weights were trained with
DIGITS_TEST_SHARE = 3  # every third image of each class is held out


class Reading(NamedTuple):
    """How image files are read: brought to image_size (None: as they are) with a margin; on_disk: never all decoded."""

    image_size: int | None = None
    margin: float = 1.0
    on_disk: bool = False


def load_dataset(
    name: str,
    data_path: Path | None = None,
    *,
    image_size: int | None = None,
    cache: Path | None = None,
    val_path: Path | None = None,
) -> ImageDataset:
    """Reads dataset `name`: from `data_path` in whatever layout is found there, else from its public source.

    image_size: resize (shorter side) and centre-crop every image of a folder or parquet to this many pixels squared
    (ImageNet: 224 unless given, the shorter side to 256/224 of it). cache: a folder where channel statistics are kept.
    val_path: class folders of test images, in place of the dataset's own; without a data_path there are then no
    training images (but digits'), and the statistics are those of the test images.
    Raises InferFastError when a path is missing or holds no images, an image does not decode, sizes are mixed,
    labels are out of range, or a download fails.
    """
    key = canonical_name(name)
    reading, pixels = Reading(image_size), None
    if key == "imagenet":
        reading = Reading(image_size or IMAGENET_SIZE, IMAGENET_MARGIN, on_disk=True)
        pixels = IMAGENET_PIXELS
    if data_path is not None:
        parts = _read_path(key, data_path, reading)
        parts = (*parts[:2], _known_names(key, parts[2]))
    elif key == "digits":
        parts = read_digits()
    elif val_path is not None:
        test, classes = read_test_folders(val_path, None, reading)
        return _without_training(key, test, classes, pixels)
    elif key in TORCHVISION_NAMES:
        parts = read_torchvision(key, Path("data"), download=True)
    else:
        known = ", ".join(["digits", *TORCHVISION_NAMES])
        raise InferFastError(
            f"{name} is not a dataset that can be fetched by name ({known}): give its place with --data-path."
        )
    if val_path is not None:
        parts = (parts[0], *read_test_folders(val_path, parts[2], reading))
    return image_dataset(key, *parts, cache=cache, pixels=pixels)


def canonical_name(name: str) -> str:
    """The one name of a dataset that goes by several: hyphens and underscores alike, `tiny` for tiny-imagenet."""
    key = name.lower().replace("_", "-")
    return ALIASES.get(key, key)


def _without_training(name: str, test: AnySplit, classes: tuple[str, ...], pixels: Pixels | None) -> ImageDataset:
    """A dataset of test images alone: no training image, statistics of the test images where none are known."""
    judged = image_dataset(name, test, test, classes, pixels=pixels)
    nothing = Split(torch.empty(0, 3, *judged.size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    return replace(judged, train=nothing)


def _read_path(name: str, path: Path, reading: Reading) -> tuple[AnySplit, AnySplit, tuple[str, ...]]:
    if not path.exists():
        raise InferFastError(f"{path} does not exist: --data-path must be the folder that holds the dataset.")
    if not path.is_dir():
        raise InferFastError(f"{path} is a file: --data-path must be the folder that holds the dataset.")
    if (path / "val" / ANNOTATIONS).is_file():
        return read_tiny_imagenet(path, reading)
    if has_folders(path / "train"):
        return read_image_folder(path, reading)
    if any(path.rglob("*.parquet")):
        return read_parquet(path, reading.image_size)
    if any(path.glob("*-ubyte*")):
        return read_idx(path)
    if (path / "train").is_dir():
        raise InferFastError(f"{path / 'train'} holds no class folders.")
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
        advice = "or give its place with --data-path" if download else "expected torchvision's layout of it there"
        raise InferFastError(
            f"{name} could not be read under {root} ({first_line(error)}): check the network, {advice}."
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


def read_image_folder(path: Path, reading: Reading) -> tuple[AnySplit, AnySplit, tuple[str, ...]]:
    """train/<class>/*.{png,jpg,...} and val/ or test/ likewise; class names in sorted order.

    ImageNet as it is published too: val/ without class folders, beside LOC_val_solution.csv that names their classes.
    """
    test = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if test is None:
        raise InferFastError(f"{path} has train/ but neither val/ nor test/: students are judged on images held out.")
    folders = _class_folders(path / "train")
    classes = tuple(folder.name for folder in folders)
    if (path / SOLUTION).is_file() and not has_folders(test):
        held_out = _read_solution(path / SOLUTION, test, classes, reading)
    else:
        unknown = sorted({p.name for p in test.iterdir() if p.is_dir()} - set(classes))
        if unknown:
            raise InferFastError(f"{test} has a class {unknown[0]!r} that {path / 'train'} has not.")
        held_out, _ = read_test_folders(test, classes, reading)
    return _read_class_folders(folders, path / "train", reading), held_out, _words(path, classes)


def read_test_folders(
    folder: Path, classes: tuple[str, ...] | None, reading: Reading
) -> tuple[AnySplit, tuple[str, ...]]:
    """Class folders of test images, and the classes' names: those given, else the folders'.

    Folders are the classes' names, or as many as there are classes (then in sorted order). What is decoded stays in
    memory if it all fits. Raises InferFastError for a folder that is no class.
    """
    if not folder.is_dir():
        raise InferFastError(f"{folder} does not exist: it must be a folder of class folders.")
    folders = _class_folders(folder)
    names = tuple(f.name for f in folders)
    if classes is None or set(names) <= set(classes):
        by_name = {f.name: f for f in folders}
        ordered = [by_name.get(name) for name in classes or names]
    elif len(names) == len(classes):
        ordered = folders
    else:
        unknown = sorted(set(names) - set(classes))[0]
        raise InferFastError(f"{folder} has a class {unknown!r} that is none of the {len(classes)} of the dataset.")
    return _read_class_folders(ordered, folder, reading, keep=True), classes or names


def has_folders(path: Path) -> bool:
    """Whether `path` is a folder with folders in it."""
    return path.is_dir() and any(p.is_dir() for p in path.iterdir())


def _class_folders(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.is_dir())
    if not found:
        raise InferFastError(f"{folder} holds no class folders.")
    return found


def _read_class_folders(
    folders: Sequence[Path | None], parent: Path, reading: Reading, *, keep: bool = False
) -> AnySplit:
    """The images of a folder for each class (None: the class has none)."""
    files, labels = [], []
    for label, folder in enumerate(folders):
        found = image_files(folder) if folder is not None else []
        files += found
        labels += [label] * len(found)
    if not files:
        raise InferFastError(f"{parent} holds no images (looked for {', '.join(sorted(IMAGE_SUFFIXES))}).")
    return _split(files, labels, reading, keep=keep)


def _split(files: list[Path], labels: list[int], reading: Reading, *, keep: bool = False) -> AnySplit:
    """The files decoded, or left on the disk where they would not fit the memory."""
    width, height = (reading.image_size,) * 2 if reading.image_size else open_rgb(str(files[0]), files[0]).size
    if not reading.on_disk and len(files) * 3 * width * height <= most_resident():
        images = decode_all([(str(f), f) for f in files], reading.image_size, reading.margin)
        return Split(images, torch.tensor(labels))
    if width != height:
        raise InferFastError(
            f"{len(files)} images of {width}x{height} stay on the disk, and are brought to squares then: give "
            "--image-size N."
        )
    split = FileSplit(tuple(files), torch.tensor(labels), (height, width), reading.margin)
    return replace(split, keep=keep and split.nbytes <= most_resident())


def read_image_set(
    path: Path, classes: tuple[str, ...], image_size: int | None = None, each: int | None = None
) -> torch.Tensor:
    """A distilled set that anyone wrote as class folders of images, uint8 (C, k, 3, H, W).

    Folders are newCCC or CCC (CCC the class's position), or named as the classes, or as many as there are classes (then
    in sorted order). each: take the first so many files of every class, in sorted order (None: all, which must be as
    many in every class). Raises InferFastError for a missing class, too few images, or what doesn't decode.
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
    files = [image_files(folder)[:each] for folder in ordered]
    counts = [len(found) for found in files]
    if each is not None and min(counts) < each:
        few = ordered[counts.index(min(counts))]
        raise InferFastError(f"{few} holds {min(counts)} images: {each} of every class are wanted.")
    if min(counts) == 0 or min(counts) != max(counts):
        few, many = ordered[counts.index(min(counts))], ordered[counts.index(max(counts))]
        raise InferFastError(
            f"{few} holds {min(counts)} images and {many} {max(counts)}: every class must have as many, at least 1."
        )
    images = decode_all([(str(f), f) for found in files for f in found], image_size)
    return images.view(len(classes), counts[0], *images.shape[1:])


def _class_positions(names: list[str], classes: tuple[str, ...]) -> list[int]:
    digits = [name.removeprefix("new") for name in names]
    if all(d.isdigit() and int(d) < len(classes) for d in digits):
        return [int(d) for d in digits]
    if set(names) <= set(classes):
        return [classes.index(name) for name in names]
    return list(range(len(names)))


def read_tiny_imagenet(path: Path, reading: Reading) -> tuple[AnySplit, AnySplit, tuple[str, ...]]:
    """Tiny-ImageNet as it is published: train/<wnid>/images/*, val/images/* with their wnids in val_annotations.txt.

    Class names from words.txt where it is there; else the wnids.
    """
    folders = _class_folders(path / "train") if (path / "train").is_dir() else []
    wnids = tuple(folder.name for folder in folders)
    if not wnids:
        raise InferFastError(f"{path / 'train'} holds no class folders.")
    annotations = path / "val" / ANNOTATIONS
    lines = [line.partition("\t") for line in annotations.read_text().splitlines()]
    pairs = [(name, rest.partition("\t")[0]) for name, _, rest in lines]
    test = _read_listed(annotations, pairs, path / "val" / "images", wnids, reading)
    return _read_class_folders(folders, path / "train", reading), test, _words(path, wnids)


def _read_solution(csv: Path, folder: Path, wnids: tuple[str, ...], reading: Reading) -> AnySplit:
    """ImageNet's validation images in one folder, with their wnids in a table "ImageId,PredictionString"."""
    pairs = [line.partition(",") for line in csv.read_text().splitlines()[1:]]
    return _read_listed(csv, [(f"{name}.JPEG", rest.split(" ")[0]) for name, _, rest in pairs], folder, wnids, reading)


def _read_listed(
    source: Path, pairs: list[tuple[str, str]], folder: Path, wnids: tuple[str, ...], reading: Reading
) -> AnySplit:
    """Test images that a list names with their classes: (file name, wnid), a line each."""
    place = {wnid: label for label, wnid in enumerate(wnids)}
    for number, (name, wnid) in enumerate(pairs, start=1):
        if wnid not in place:
            raise InferFastError(f"{source} entry {number} ({name}): {wnid!r} is no class of train/.")
    if not pairs:
        raise InferFastError(f"{source} names no images.")
    return _split([folder / name for name, _ in pairs], [place[wnid] for _, wnid in pairs], reading, keep=True)


def _words(path: Path, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """The first word of each wnid, if Tiny-ImageNet's or ImageNet's list is there, has them all, and they differ."""
    words = {}
    for name, separator in (("words.txt", "\t"), ("LOC_synset_mapping.txt", " ")):
        lines = (path / name).read_text().splitlines() if (path / name).is_file() else []
        words |= {wnid: names.split(",")[0].strip() for wnid, _, names in (line.partition(separator) for line in lines)}
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
    return Split(decode_all(items, image_size), torch.cat(labels)), names


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
