"""What is judged, and by which teachers: the flags of python -m infer_fast.validate as an Evaluation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import arg

from infer_fast import cli
from infer_fast.data.class_folders import has_folders, read_image_set
from infer_fast.data.distilled import TENSORS, DistilledSet, load
from infer_fast.data.images import ImageDataset
from infer_fast.data.sources import canonical_name, load_dataset
from infer_fast.errors import InferFastError, InferFastWarning
from infer_fast.models.teacher import Teacher
from infer_fast.recipes import IMAGENET_WEIGHTS, base_images_per_class
from infer_fast.relabel import relabel, teachers_of
from infer_fast.run_folder import DATASETS, STUDENTS, TEACHERS, check_name, place_in_card, writable
from infer_fast.settings import Compare, Recipe, SqueezeSettings, StudentSettings
from infer_fast.squeeze import Origin, squeeze
from infer_fast.students.candidates import Evaluation, Store
from infer_fast.void import check_image_size


@dataclass(frozen=True)
class ValidateOptions:
    """Flags of python -m infer_fast.validate."""

    syn_data_path: Annotated[Path, arg(aliases=["--train-dir"])]
    """the distilled set's folder, or class folders of images that anyone wrote (newCCC, or named as the classes)"""
    dataset: str | None = None
    """the real dataset's name; None: the one the set was distilled from (class folders of images need it)"""
    arch_name: Annotated[tuple[str, ...], arg(aliases=["--teacher-model"])] = ()
    """teachers that label; of a set of ours: some of its own (none named: all of them)"""
    arch_path: tuple[Path, ...] = ()
    """their checkpoints, one for each"""
    arch_weights: str | None = None
    """torchvision's weights for them in place of checkpoints (ImageNet: IMAGENET1K_V1 unless said otherwise)"""
    data_path: Path | None = None
    """the real dataset's folder (the test images, and what is compared)"""
    val_dir: Path | None = None
    """class folders of test images, in place of the dataset's own"""
    image_size: int | None = None
    """resize and centre-crop files to this many pixels squared"""
    ipc: int | None = None
    """images per class of the budget: judge the part of the set that it holds; None: the whole set"""
    M: int | None = None
    """teachers whose compensators are judged, the first M (class folders: each class has k*(M+1) images of --ipc)"""
    seeds: int = 3
    """independent students per row"""
    compare: Compare = "random"
    """rows beside the distilled set's: none; random real images of the same bytes (coded: through the set's codec
    alone); all (and the whole dataset)"""
    resume: Annotated[bool, arg(aliases=["-r"])] = True
    """take the students that are finished from the folder students/; --no-resume: train them all again"""
    check_ckpt: Path | None = None
    """print the accuracy and epoch that a checkpoint says it has, and stop"""
    wandb_name: str | None = None
    """also log the table to Weights & Biases, as a run of this name (needs the package wandb)"""
    wandb_project: str = "infer_fast"
    """the project of that run"""
    wandb_api_key: str | None = None
    """the key to log in with; None: as wandb is logged in"""
    tsne: bool = False
    """also draw t-SNE of a student's features, distilled-trained beside random-trained: tsne.png"""
    budgets: tuple[str, ...] = ()
    """also draw accuracy against bytes at these shares of the set's budget, such as 25% 50% 100% 200%: curve.png"""
    output_dir: Path | None = None
    """where table.md and students/ go; None: the distilled set's folder"""
    student: Annotated[StudentSettings, arg(name="")] = field(default_factory=StudentSettings)

    @property
    def output(self) -> Path:
        """Where results go."""
        return self.syn_data_path if self.output_dir is None else self.output_dir


def evaluation_of(options: ValidateOptions, recipe: Recipe) -> Evaluation:
    """What the options ask to be judged, labelled; recipe: of a set of ours.

    Raises InferFastError for a folder that holds neither kind of set, another dataset, or teachers that don't fit.
    """
    folder = options.syn_data_path
    others = has_folders(folder) and not (folder / TENSORS).exists()
    evaluation = _images_of_others(options) if others else _our_set(options, recipe)
    if len(evaluation.dataset.train) == 0 and evaluation.compare != "none":
        warnings.warn(
            "There are no training images (--data-path gives them): the set is compared with nothing.",
            InferFastWarning,
            stacklevel=2,
        )
        return replace(evaluation, compare="none")
    return evaluation


def _evaluation(
    options: ValidateOptions, distilled: DistilledSet, dataset: ImageDataset, teachers: list[Teacher], ipc: int
) -> Evaluation:
    store = Store(options.output / STUDENTS, resume=options.resume, keep=writable(options.output))
    return Evaluation(distilled, dataset, teachers, options.student, ipc, options.compare, options.seeds, store=store)


def _cache(kept: Path) -> Path | None:
    """Where what was read of a dataset is remembered, if anything can be written there."""
    return kept / DATASETS if writable(kept) else None


def _our_set(options: ValidateOptions, recipe: Recipe) -> Evaluation:
    folder = options.syn_data_path
    whole = load(folder)
    data = whole.made.dataset
    data_path, val_dir = (
        place_in_card(folder, stored, flag) if given is None else given
        for given, stored, flag in (
            (options.data_path, data.data_path, "--data-path"),
            (options.val_dir, data.val_dir, "--val-dir"),
        )
    )
    image_size = options.image_size or data.image_size
    hold_out = data.held_out if options.val_dir is None else 0
    asked = ("The card's dataset", data.name) if options.dataset is None else ("--dataset", options.dataset)
    name = check_name(*asked)
    cache = _cache(folder.parent if options.output_dir is None else options.output_dir)
    dataset = load_dataset(name, data_path, image_size=image_size, cache=cache, val_path=val_dir, hold_out=hold_out)
    check_image_size(dataset.name, dataset.size, image_size)
    if options.val_dir is None and dataset.fingerprint != data.fingerprint:
        raise InferFastError(f"{data.name} is not the dataset this set was distilled from (its fingerprint differs).")
    if len(dataset.classes) != len(whole.classes):
        raise InferFastError(f"{options.val_dir} has {len(dataset.classes)} classes, this set {len(whole.classes)}.")
    if options.val_dir is not None:  # else the fingerprint has said that they are the set's own
        dataset = replace(dataset.with_classes(whole.classes, options.val_dir), pixels=whole.pixels)
    dataset = dataset.to(cli.device())
    distilled = _part(whole, options)
    named = bool(options.arch_name)
    drawn = options.tsne or bool(options.budgets)
    given = bool(options.arch_path) or options.arch_weights is not None
    relabelled = set(options.student.labels) & {"dynamic", "fkd"}
    needed = options.compare != "none" or drawn or named or given or relabelled
    teachers = _labellers(whole, options, dataset) if needed else []
    if named:
        distilled = relabel(distilled, teachers)
    evaluation = _evaluation(options, distilled, dataset, teachers, options.ipc or recipe.ipc)
    counted = recipe.store.budget == "bytes" and distilled.coded is not None
    budget = whole.made.bytes.budget if counted else None
    return replace(evaluation, seed=recipe.synthesis.seed, labels_folder=folder, budget=budget)


def _part(whole: DistilledSet, options: ValidateOptions) -> DistilledSet:
    """What --ipc and --M leave of a set of ours."""
    had, k = whole.views_per_base - 1, whole.base.shape[1]
    teachers = had if options.M is None else options.M
    if not 0 <= teachers <= had:
        raise InferFastError(f"--M {teachers}: the set has compensators of {had} teachers.")
    if options.ipc is not None:
        k = base_images_per_class(options.ipc, teachers, len(whole.classes))
    if not 0 < k <= whole.base.shape[1]:
        raise InferFastError(
            f"--ipc {options.ipc} stands for {k} base images per class, the set has {whole.base.shape[1]}: choose an "
            "ipc that it holds."
        )
    return whole.part(k, teachers)


def _labellers(whole: DistilledSet, options: ValidateOptions, dataset: ImageDataset) -> list[Teacher]:
    """The set's own teachers, those of them that were named, or checkpoints that were given."""
    if options.arch_path or options.arch_weights is not None:
        return _given_teachers(options, dataset, options.output)
    own = teachers_of(whole, options.syn_data_path)
    unknown = [name for name in options.arch_name if name not in {t.name for t in own}]
    if unknown:
        raise InferFastError(
            f"{unknown[0]} is none of this set's teachers ({', '.join(t.name for t in own)}): name some of them, or "
            "give its checkpoint with --arch-path."
        )
    return [t for t in own if not options.arch_name or t.name in options.arch_name]


def _images_of_others(options: ValidateOptions) -> Evaluation:
    """Class folders of images, labelled by the given teachers."""
    folder = options.syn_data_path
    imagenet = options.dataset is not None and canonical_name(options.dataset) == "imagenet"
    if imagenet and not options.arch_path and options.arch_weights is None:
        options = replace(options, arch_weights=IMAGENET_WEIGHTS)
    given = len(options.arch_name) == len(options.arch_path) or options.arch_weights is not None
    if options.dataset is None or not options.arch_name or not given:
        raise InferFastError(
            f"{folder} holds class folders of images: name the dataset they stand for (--dataset, --data-path) and the "
            "teachers that label them (--arch-name, and a checkpoint for each with --arch-path)."
        )
    name = check_name("--dataset", options.dataset)
    kept = folder.parent if options.output_dir is None else options.output_dir
    cache = _cache(kept)
    dataset = load_dataset(
        name, options.data_path, image_size=options.image_size, cache=cache, val_path=options.val_dir
    )
    check_image_size(dataset.name, dataset.size, options.image_size)
    dataset = dataset.to(cli.device())
    each = None
    if options.ipc is not None:
        teachers = options.M or 0
        each = base_images_per_class(options.ipc, teachers, len(dataset.classes)) * (teachers + 1)
    image_size = options.image_size or (dataset.size[0] if imagenet else None)
    images = read_image_set(folder, dataset.classes, image_size, each)
    if tuple(images.shape[-2:]) != dataset.size:
        raise InferFastError(
            f"{folder} holds images of {images.shape[-1]}x{images.shape[-2]}, {dataset.name} of "
            f"{dataset.size[1]}x{dataset.size[0]}: --image-size N brings both to NxN."
        )
    labellers = _given_teachers(options, dataset, kept)
    logits = torch.zeros(len(dataset.classes), images.shape[1], 1, len(dataset.classes), dtype=torch.float16)
    unlabelled = DistilledSet(images, None, logits, dataset.pixels, dataset.classes)
    labelled = relabel(unlabelled, labellers)
    evaluation = _evaluation(options, labelled, dataset, labellers, options.ipc or images.shape[1])
    return replace(evaluation, labels_folder=kept)


def _given_teachers(options: ValidateOptions, dataset: ImageDataset, kept: Path) -> list[Teacher]:
    if not options.arch_name:
        raise InferFastError("--arch-path and --arch-weights are of the teachers that --arch-name names: name them.")
    origin = Origin(SqueezeSettings(), checkpoints=options.arch_path, weights=options.arch_weights)
    return squeeze(dataset, options.arch_name, origin, kept / TEACHERS)
