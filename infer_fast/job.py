"""A run of the main job: what was asked for, and what was settled before it begins."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import arg

import infer_fast
from infer_fast import cli
from infer_fast.data.budget import Base, weighed
from infer_fast.data.card import Card, DatasetCard, ExecutionCard, TaskCard, TeacherCard, VersionCard
from infer_fast.data.distilled import DistilledSet
from infer_fast.data.images import ImageDataset
from infer_fast.data.loader import check_loader
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError
from infer_fast.models.checkpoint import published_weights
from infer_fast.models.execution import Execution
from infer_fast.models.teacher import Teacher
from infer_fast.models.weight_files import read_file
from infer_fast.run_folder import DATASETS, STUDENTS, check_name
from infer_fast.settings import Engine, Precision, Recipe
from infer_fast.squeeze import Origin, check_given
from infer_fast.students.candidates import Evaluation, Store, kinds
from infer_fast.students.training import check_students
from infer_fast.synthesis.base import check_enough, expected_count
from infer_fast.synthesis.memory import Demand, Room, find_room
from infer_fast.synthesis.plan import Plan, make_plan
from infer_fast.synthesis.problem import with_statistics
from infer_fast.synthesis.tasks import Results, Synthesis
from infer_fast.void import check_image_size, check_options


@dataclass(frozen=True)
class DistillOptions:
    """Flags of python -m infer_fast.distill: the recipe's own, and where and how to run it."""

    recipe: Annotated[Recipe, arg(name="")]
    data_path: Path | None = None
    """the dataset's folder: idx(.gz) files, class folders, parquet, or torchvision's layout; None: fetch it by name"""
    image_size: int | None = None
    """resize and centre-crop files to this many pixels squared"""
    arch_path: tuple[Path, ...] = ()
    """a checkpoint to import for each teacher, in place of training"""
    init_path: Path | None = None
    """base images in place of random ones: tensor_J.pt of shape (C,3,H,W), normalised, or class folders of images"""
    val_dir: Path | None = None
    """class folders of test images, in place of the dataset's own"""
    held_out: int = 0
    """judge on so many training images, held out for it, in place of the test images: to choose settings on"""
    M: int | None = None
    """use the first M of the teachers; None: all"""
    syn_data_path: Path = Path("runs")
    """where everything is kept: the distilled set goes to its folder EXP_NAME"""
    exp_name: str | None = None
    """name of the run; None: the recipe's"""
    store_best_images: bool = False
    """also write the instances as image files, to the run's folder images/: newCCC/classCCC_idIII.jpg"""
    wandb_name: str | None = None
    """also log the table to Weights & Biases, as a run of this name (needs the package wandb)"""
    ipc_start: int = 0
    """first task index to solve here (to share a run among machines)"""
    ipc_end: int | None = None
    """task index to stop before; None: all"""
    lanes: int | None = None
    """tasks solved side by side in one batch; None: as many as fill the device and fit its free memory"""
    chunk: int | None = None
    """images of a task in one pass (all are matched as one batch all the same); None: all, or what fits the memory"""
    precision: Precision = "auto"
    """of the teachers' passes; auto: bfloat16 on a GPU, float32 elsewhere; fast: bfloat16 also on a processor with
    instructions for it"""
    engine: Engine = "auto"
    """how an iteration is run; auto: a CUDA graph on a GPU, eager elsewhere"""
    backend: Literal["auto", "reference", "native", "triton"] = "auto"
    """which implementation of the fused ops; auto: the fastest for the device"""
    dry_run: bool = False
    """print the plan (tasks, bytes, estimated time) and stop"""

    @property
    def execution(self) -> Execution:
        """How the teachers' passes are run, as it was asked for."""
        return Execution(self.precision, self.engine, self.backend)


@dataclass(frozen=True)
class Job:
    """A run of the main job that is decided and not begun: on which data, by which recipe, in which batches."""

    options: DistillOptions
    recipe_name: str
    recipe: Recipe
    dataset: ImageDataset
    folder: Path
    room: Room
    plan: Plan

    @property
    def origin(self) -> Origin:
        """Where its teachers come from."""
        recipe, given = self.recipe, self.options.arch_path[: self.options.M]
        return Origin(recipe.squeeze, recipe.synthesis.seed, given, recipe.arch_weights)

    @property
    def shared(self) -> bool:
        """Whether it solves some of the tasks, and others may solve others meanwhile."""
        return self.wanted != range(self.plan.indices)

    @property
    def wanted(self) -> range:
        """The task indices to solve here."""
        return self.plan.wanted(self.options.ipc_start, self.options.ipc_end)

    def with_base_images(self, k: int) -> Job:
        """The same with k base images of each class, as many as a budget of bytes turned out to hold."""
        if self.recipe.store.budget == "images":
            return self
        classes, size = len(self.dataset.classes), self.dataset.size
        return replace(self, plan=make_plan(self.recipe, classes, size, self.room.lanes, k))

    def synthesis(self, teachers: list[Teacher], base: Base) -> Synthesis:
        """All of its tasks."""
        execution = self.options.execution.on(self.dataset.device)
        return Synthesis(self.plan, teachers, base, self.recipe.synthesis, execution, self.room.chunks)

    def evaluation(self, distilled: DistilledSet, teachers: list[Teacher]) -> Evaluation:
        """What its students judge."""
        recipe = self.recipe
        return Evaluation(
            distilled,
            self.dataset,
            teachers,
            recipe.student,
            recipe.ipc,
            recipe.compare,
            recipe.seeds,
            recipe.synthesis.seed,
            store=Store(self.folder / STUDENTS),
            labels_folder=self.folder,
            budget=self.plan.budget_bytes if recipe.store.budget == "bytes" else None,
        )

    def card(self, work: Synthesis, results: Results, distilled: DistilledSet, seconds: dict[str, float]) -> Card:
        """What is known of the set before students have judged it."""
        dataset, plan, how, options = self.dataset, self.plan, work.execution, self.options
        device, whole = dataset.device, dataset.train.nbytes
        return Card(
            recipe_name=self.recipe_name,
            recipe=self.recipe,
            dataset=DatasetCard(
                name=dataset.name,
                classes=dataset.classes,
                mean=dataset.pixels.mean,
                std=dataset.pixels.std,
                size=dataset.size,
                training_images=len(dataset.train),
                test_images=len(dataset.test),
                fingerprint=dataset.fingerprint,
                data_path=None if options.data_path is None else str(options.data_path),
                val_dir=None if options.val_dir is None else str(options.val_dir),
                image_size=options.image_size,
                held_out=options.held_out,
            ),
            teachers=tuple(
                TeacherCard(t.name, t.accuracy, t.sha256, os.path.relpath(t.path, self.folder)) for t in work.teachers
            ),
            k=plan.k,
            ipc=plan.ipc,
            bytes=weighed(distilled, plan.budget_bytes, whole, whole_file=self.recipe.store.budget == "bytes"),
            pixels=None if distilled.coded is None else distilled.coded.digest,
            tasks=tuple(
                TaskCard(plan.teachers[m], j, losses[0], losses[-1])
                for (m, j, _), losses in sorted((task, result.losses) for task, result in results.items())
            ),
            how=ExecutionCard(
                how.precision, how.engine, how.backend, device.type, tuple(self.room.lanes), tuple(self.room.chunks)
            ),
            versions=VersionCard(infer_fast.__version__, torch.__version__, platform.python_version()),
            device=torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
            seconds=seconds,
        )


def decide(options: DistillOptions, recipe_name: str) -> Job:
    """What the options ask for, settled: the dataset on its device, the recipe filled in, the plan of the tasks.

    Raises InferFastError for what can't be had, students and loaders included, before any of the work.
    """
    check_options(options)
    check_name("--dataset", options.recipe.dataset)
    run = recipe_name if options.exp_name is None else options.exp_name
    folder = options.syn_data_path / check_name("--exp-name", run)
    dataset = _dataset(options)
    recipe = first_teachers(options)
    recipe = replace(recipe, synthesis=with_statistics(recipe.synthesis, dataset.pixels))
    check_students(recipe.student, len(dataset.classes), dataset.size)
    check_loader(recipe.squeeze.loader)
    kinds(recipe.compare, recipe.student.labels, recipe.store.budget == "bytes")  # or an error
    check_given(options.arch_path[: options.M], recipe.arch_name)
    if options.dry_run:  # else they are read, once, when their teachers are imported
        for path in options.arch_path:
            read_file(path)
    if recipe.arch_weights is not None and not options.arch_path:
        for name in recipe.arch_name:
            published_weights(name, recipe.arch_weights)  # or an error
    demand = _demand(recipe, dataset, options.precision)
    room = find_room(demand, dataset.device, folder, options.lanes, options.chunk)
    k = expected_count(dataset, recipe) if recipe.store.budget == "bytes" else None
    plan = make_plan(recipe, len(dataset.classes), dataset.size, room.lanes, k)
    plan.wanted(options.ipc_start, options.ipc_end)  # or an error
    check_enough(dataset, recipe, plan, options.init_path)
    return Job(options, recipe_name, recipe, dataset, folder, room, plan)


def _demand(recipe: Recipe, dataset: ImageDataset, precision: str) -> Demand:
    """A compensator is shared by all classes, and batch_size are then the images of one pass."""
    settings, classes = recipe.synthesis, len(dataset.classes)
    shared = settings.optimise == "compensator"
    images = classes if shared else min(settings.batch_size, classes)
    most = settings.batch_size if shared and settings.batch_size > 0 else None
    return Demand(recipe.arch_name, classes, images, dataset.size, recipe.ipc, settings.optimise, precision, most)


def _dataset(options: DistillOptions) -> ImageDataset:
    cache = None if options.dry_run else options.syn_data_path / DATASETS
    dataset = load_dataset(
        options.recipe.dataset,
        options.data_path,
        image_size=options.image_size,
        cache=cache,
        val_path=options.val_dir,
        hold_out=options.held_out,
    )
    check_image_size(dataset.name, dataset.size, options.image_size)
    if len(dataset.train) == 0:
        raise InferFastError(f"{dataset.name} can't be fetched by name: give its place with --data-path.")
    return dataset.to(cli.device())


def first_teachers(options: DistillOptions) -> Recipe:
    """The recipe with the first --M of its teachers. Raises InferFastError when there are not so many."""
    names, count = options.recipe.arch_name, options.M
    if count is not None and not 1 <= count <= len(names):
        raise InferFastError(f"--M {count}: there are {len(names)} teachers ({', '.join(names)}).")
    return replace(options.recipe, arch_name=names[:count])
