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
from infer_fast.data.augment import Augmentation, Sampling
from infer_fast.data.images import ImageDataset
from infer_fast.data.loader import feed
from infer_fast.data.sets import training_set
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError
from infer_fast.files import file_hash
from infer_fast.models import build
from infer_fast.models.checkpoint import load_checkpoint, load_pretrained
from infer_fast.models.execution import Execution
from infer_fast.models.teacher import Teacher, load_teacher, save_teacher
from infer_fast.models.train import Schedule, Training, accuracy, fit, hard_loss, predict
from infer_fast.models.weight_files import check_file
from infer_fast.progress import Stage, stage
from infer_fast.ranges import check
from infer_fast.recipes import RECIPES
from infer_fast.run_folder import check_name
from infer_fast.settings import Recipe, SqueezeSettings
from infer_fast.void import check_image_size


@dataclass(frozen=True)
class Origin:
    """Where teachers come from: checkpoints, one for each, to import; else torchvision's weights of that name; else
    training as `settings` say, seeded by `seed`."""

    settings: SqueezeSettings
    seed: int = 0
    checkpoints: tuple[Path, ...] = ()
    weights: str | None = None


def squeeze(dataset: ImageDataset, names: tuple[str, ...], origin: Origin, folder: Path) -> list[Teacher]:
    """One teacher per name, in order: from `folder` if it was made before, else imported or trained and saved there.

    The dataset's device is the teachers'.
    Raises InferFastError for a setting out of its range, an unknown name, weights that don't fit, or training without
    training images.
    """
    check(origin)
    given = origin.checkpoints
    check_given(given, names)
    return [_teacher(dataset, name, origin, folder, given[i] if given else None) for i, name in enumerate(names)]


def check_given(checkpoints: tuple[Path, ...], names: tuple[str, ...]) -> None:
    """Raises InferFastError for checkpoints that are not one for each teacher, or no files."""
    if checkpoints and len(checkpoints) != len(names):
        raise InferFastError(f"{len(checkpoints)} checkpoints were given for {len(names)} teachers: give one for each.")
    for path in checkpoints:
        check_file(path)


def _teacher(dataset: ImageDataset, name: str, origin: Origin, folder: Path, checkpoint: Path | None) -> Teacher:
    if checkpoint is not None:
        source: dict[str, object] = {"checkpoint": file_hash(checkpoint)}
    elif origin.weights is not None:
        source = {"weights": origin.weights}
    else:
        source = asdict(origin.settings) | {"seed": origin.seed}
    key = json.dumps([dataset.fingerprint, name, source], sort_keys=True)
    path = folder / f"{dataset.name}-{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    if not path.is_file():
        network = build(name, len(dataset.classes), dataset.size, seed=origin.seed)
        if checkpoint is None and origin.weights is None:
            reached = _train(dataset, name, network, origin)
        else:
            reached = _import(dataset, name, network, checkpoint, origin.weights)
        save_teacher(path, network, reached, {"name": name, "dataset": dataset.name, "source": source})
    try:
        teacher = load_teacher(name, path, len(dataset.classes), dataset.size)
    except InferFastError as error:
        raise InferFastError(f"{str(error).rstrip('.')}: delete this file, and the teacher is made again.") from error
    teacher.network.to(dataset.device)
    return teacher


def _train(dataset: ImageDataset, name: str, network: nn.Module, origin: Origin) -> float:
    if len(dataset.train) == 0:
        raise InferFastError(f"{dataset.name} has no training images here: give them with --data-path.")
    network.to(dataset.device)
    settings, per_epoch = origin.settings, -(-len(dataset.train) // origin.settings.batch_size)
    schedule = Schedule(
        "sgd", settings.lr, settings.weight_decay, settings.momentum, settings.epochs * per_epoch, per_epoch
    )
    source = training_set(dataset.train, len(dataset.classes), dataset.pixels)
    sampling = Sampling(
        settings.batch_size,
        schedule.updates,
        Augmentation(settings.padding, settings.flip),
        torch.Generator().manual_seed(origin.seed),
    )
    with stage(f"squeeze {name}", settings.epochs * len(dataset.train), "images") as running:
        stream, make = feed(settings.loader, source, sampling, workers=settings.workers)
        training = Training(_counted(stream, running), hard_loss, make)
        fit(network, training, schedule, Execution(settings.precision, settings.engine))
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
        elif weights is not None:
            load_pretrained(network, name, weights)
        network.to(dataset.device)
        reached = measured_accuracy(network, dataset)
        running.advance()
        running.note(f"test accuracy {reached:.2f} %")
    return reached


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
        check_name("--dataset", options.dataset),
        options.data_path,
        image_size=options.image_size,
        cache=root / "datasets",
    ).to(cli.device())
    check_image_size(dataset.name, dataset.size, options.image_size)
    teachers = squeeze(
        dataset,
        options.arch_name,
        Origin(options.squeeze, options.seed, options.arch_path, options.arch_weights),
        root / "teachers",
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
