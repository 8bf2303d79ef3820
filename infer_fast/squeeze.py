"""Stage 1: teachers, trained on the dataset or imported from a checkpoint, saved once and reused.

python -m infer_fast.squeeze                                       # the digits recipe's four teachers
python -m infer_fast.squeeze fashion-mnist --data-path DIR
python -m infer_fast.squeeze cifar100-infer-ipc10 --arch-name resnet18 --arch-path resnet18.pth --data-path DIR
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch import nn
from tyro.conf import arg

from infer_fast import cli
from infer_fast.data.augment import Augmentation
from infer_fast.data.images import ImageDataset
from infer_fast.data.loader import feed
from infer_fast.data.sets import training_set
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError
from infer_fast.files import read_tensors, write_tensors
from infer_fast.models import build
from infer_fast.models.checkpoint import file_hash, load_checkpoint, load_pretrained
from infer_fast.models.train import Schedule, accuracy, fit, hard_loss, predict
from infer_fast.progress import Stage, stage
from infer_fast.recipes import RECIPES, Recipe, SqueezeSettings


@dataclass(frozen=True)
class Teacher:
    """A frozen network, its test accuracy in percent, and the file that holds it (with the file's SHA-256)."""

    name: str
    network: nn.Module
    accuracy: float
    path: Path
    sha256: str

    @property
    def weight_bytes(self) -> int:
        """What the network's weights and statistics weigh."""
        return sum(t.nbytes for t in self.network.state_dict().values())


def squeeze(
    dataset: ImageDataset,
    names: tuple[str, ...],
    settings: SqueezeSettings,
    *,
    seed: int = 0,
    folder: Path,
    checkpoints: tuple[Path, ...] = (),
    weights: str | None = None,
) -> list[Teacher]:
    """One teacher per name, in order: from `folder` if it was made before, else imported or trained and saved there.

    checkpoints: one file per name to import instead of training; weights: the name of torchvision's weights to take
    instead, where no checkpoints are given. The dataset's device is the teachers'.
    Raises InferFastError for an unknown name, weights that don't fit, or training without training images.
    """
    if checkpoints and len(checkpoints) != len(names):
        raise InferFastError(f"{len(checkpoints)} checkpoints were given for {len(names)} teachers: give one for each.")
    return [
        _teacher(dataset, name, settings, seed, folder, checkpoints[position] if checkpoints else None, weights)
        for position, name in enumerate(names)
    ]


def load_teacher(name: str, path: Path, classes: int, size: tuple[int, int], sha256: str | None = None) -> Teacher:
    """Reads a teacher that squeeze saved. Raises InferFastError if the file is missing, damaged or another one."""
    state, card = read_tensors(path)
    digest = file_hash(path)
    if sha256 is not None and digest != sha256:
        raise InferFastError(f"{path} is not the teacher that was used (its SHA-256 differs): make the teachers again.")
    network = build(name, classes, size, seed=0)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise InferFastError(
            f"{path} does not hold a {name} for {classes} classes: make the teachers again."
        ) from error
    return Teacher(name, network.eval().requires_grad_(False), card["accuracy"], path, digest)


def _teacher(
    dataset: ImageDataset,
    name: str,
    settings: SqueezeSettings,
    seed: int,
    folder: Path,
    checkpoint: Path | None,
    weights: str | None,
) -> Teacher:
    if checkpoint is not None:
        source = {"checkpoint": _checkpoint_hash(checkpoint)}
    elif weights is not None:
        source = {"weights": weights}
    else:
        source = asdict(settings) | {"seed": seed}
    key = json.dumps([dataset.fingerprint, name, source], sort_keys=True)
    path = folder / f"{dataset.name}-{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not path.is_file():
        network = build(name, len(dataset.classes), dataset.size, seed=seed)
        if checkpoint is None and weights is None:
            reached = _train(dataset, name, network, settings, seed)
        else:
            reached = _import(dataset, name, network, checkpoint, weights)
        card = {"name": name, "dataset": dataset.name, "accuracy": reached, "source": source}
        write_tensors(path, network.state_dict(), card)
    teacher = load_teacher(name, path, len(dataset.classes), dataset.size)
    teacher.network.to(dataset.device)
    return teacher


def _train(dataset: ImageDataset, name: str, network: nn.Module, settings: SqueezeSettings, seed: int) -> float:
    if len(dataset.train) == 0:
        raise InferFastError(f"{dataset.name} has no training images here: give them with --data-path.")
    network.to(dataset.device)
    per_epoch = -(-len(dataset.train) // settings.batch_size)
    schedule = Schedule(
        "sgd", settings.lr, settings.weight_decay, settings.momentum, settings.epochs * per_epoch, per_epoch
    )
    source = training_set(dataset.train, len(dataset.classes), dataset.pixels)
    with stage(f"squeeze {name}", settings.epochs * len(dataset.train), "images") as running:
        stream, make = feed(
            settings.loader,
            source,
            batch_size=settings.batch_size,
            updates=schedule.updates,
            augmentation=Augmentation(settings.padding, settings.flip),
            generator=torch.Generator().manual_seed(seed),
            workers=settings.workers,
        )
        fit(
            network,
            _counted(stream, running),
            hard_loss,
            schedule,
            make=make,
            precision=settings.precision,
            engine=settings.engine,
        )
        reached = measured_accuracy(network, dataset)
        running.note(f"test accuracy {reached:.2f} %")
    return reached


def _counted(stream: Iterable[tuple], running: Stage) -> Iterator[tuple]:
    for batch in stream:
        yield batch
        running.advance(len(batch[0]))


def _import(
    dataset: ImageDataset, name: str, network: nn.Module, checkpoint: Path | None, weights: str | None
) -> float:
    with stage(f"import {name}", 1, "checkpoint") as running:
        if checkpoint is not None:
            load_checkpoint(network, checkpoint)
        else:
            load_pretrained(network, name, weights)
        network.to(dataset.device)
        reached = measured_accuracy(network, dataset)
        running.advance()
        running.note(f"test accuracy {reached:.2f} %")
    return reached


def _checkpoint_hash(path: Path) -> str:
    if not path.is_file():
        raise InferFastError(f"{path} does not exist: --arch-path must name a checkpoint for each teacher.")
    return file_hash(path)


def measured_accuracy(network: nn.Module, dataset: ImageDataset) -> float:
    """Top-1 accuracy of `network` on the test split, in percent."""
    logits = predict(network, lambda p: dataset.pixels.normalise(dataset.test.at(p)), len(dataset.test))
    return accuracy(logits, dataset.test.labels)


@dataclass(frozen=True)
class SqueezeOptions:
    """Flags of python -m infer_fast.squeeze."""

    dataset: str
    """digits, a torchvision name, or any name with --data-path"""
    arch_name: tuple[str, ...]
    """teachers, by name"""
    squeeze: Annotated[SqueezeSettings, arg(name="")] = field(default_factory=SqueezeSettings)
    arch_path: tuple[Path, ...] = ()
    """a checkpoint to import for each teacher, in place of training"""
    arch_weights: str | None = None
    """torchvision's weights to import in place of training, such as IMAGENET1K_V1 (downloaded)"""
    data_path: Path | None = None
    """the dataset's folder: idx(.gz) files, ImageFolder, parquet, or torchvision's layout"""
    image_size: int | None = None
    """resize and centre-crop files to this many pixels squared"""
    syn_data_path: Path = Path("runs")
    """where everything is kept: teachers go to its folder teachers/"""
    seed: int = 0
    """seed of initialisation, shuffling and augmentation"""


def _main(args: list[str]) -> None:
    name, recipe, flags = cli.take_recipe(args)
    default = _default_options(recipe)
    options = cli.parse(SqueezeOptions, default, flags, "python -m infer_fast.squeeze [RECIPE]", f"Recipe {name}.")
    root = options.syn_data_path
    dataset = load_dataset(
        options.dataset, options.data_path, image_size=options.image_size, cache=root / "datasets"
    ).to(cli.device())
    teachers = squeeze(
        dataset,
        options.arch_name,
        options.squeeze,
        seed=options.seed,
        folder=root / "teachers",
        checkpoints=options.arch_path,
        weights=options.arch_weights,
    )
    for teacher in teachers:
        print(f"{teacher.name}: test accuracy {teacher.accuracy:.2f} %, {teacher.path}")


def _default_options(recipe: Recipe = RECIPES["digits"]) -> SqueezeOptions:
    return SqueezeOptions(
        recipe.dataset,
        recipe.arch_name,
        recipe.squeeze,
        arch_weights=recipe.arch_weights,
        seed=recipe.synthesis.seed,
    )


if __name__ == "__main__":
    sys.exit(cli.run(_main))
