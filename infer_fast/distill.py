"""The main job, the whole way: dataset -> teachers -> compensators -> soft labels -> distilled set -> students' table.

    python -m infer_fast.distill                                   # digits: under two minutes on two cores, no network
    python -m infer_fast.distill fashion-mnist --data-path DIR     # a recipe on files of your own
    python -m infer_fast.distill cifar100-infer-ipc10 --data-path DIR --dry-run
    python -m infer_fast.distill --list                            # every recipe: tasks, bytes, operations

Finished teachers, tasks and students are kept: the same command goes on where it stopped. On a CPU it ends with the
same bytes; on a GPU cuDNN chooses convolutions by measuring them, so two runs agree within rounding only.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import arg

import infer_fast
from infer_fast import cli
from infer_fast.data.budget import Base, storage_of, weighed
from infer_fast.data.card import Card, DatasetCard, ExecutionCard, Row, TaskCard, TeacherCard, VersionCard
from infer_fast.data.distilled import DistilledSet
from infer_fast.data.images import ImageDataset
from infer_fast.data.loader import check_loader
from infer_fast.data.sources import canonical_name, load_dataset
from infer_fast.dry_run import describe, estimate, list_recipes
from infer_fast.errors import InferFastError
from infer_fast.export import export
from infer_fast.files import write_json
from infer_fast.models.execution import Execution
from infer_fast.models.teacher import Teacher
from infer_fast.progress import Clock
from infer_fast.recipes import RECIPES
from infer_fast.relabel import relabel
from infer_fast.report import write_report
from infer_fast.settings import Engine, Precision, Recipe
from infer_fast.squeeze import Origin, squeeze
from infer_fast.students.candidates import Evaluation, kinds
from infer_fast.students.results import WandbRun
from infer_fast.students.training import check_students
from infer_fast.synthesis.base import base_images, check_enough, expected_count
from infer_fast.synthesis.memory import ROOM, Demand, Room, find_room
from infer_fast.synthesis.plan import Plan, make_plan
from infer_fast.synthesis.problem import with_statistics
from infer_fast.synthesis.tasks import Results, Synthesis, assemble, synthesise
from infer_fast.validate import STORE, present, validate
from infer_fast.void import check_image_size, check_options

PROG = "python -m infer_fast.distill [RECIPE]"


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
            store=self.folder / STORE,
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


def distill(options: DistillOptions, recipe_name: str = "digits") -> list[Row]:
    """Runs the whole way and leaves a distilled set in syn_data_path/exp_name; returns the table's rows.

    Raises InferFastError, after saving everything that was finished, for bad input or a task that diverged.
    """
    clock, log = Clock(), WandbRun(options.wandb_name)
    log.check()
    with clock.stage("dataset"):
        job = decide(options, recipe_name)
        if options.dry_run:
            seconds = estimate(job.plan, job.recipe, job.dataset)
            print(describe(job.plan, job.dataset, job.recipe.store, job.room, seconds))
            return []
    with clock.stage("squeeze"):
        teachers = squeeze(job.dataset, job.recipe.arch_name, job.origin, options.syn_data_path / "teachers")
    with clock.stage("base images"):
        base = base_images(job.dataset, job.recipe, job.plan, options.init_path)
        job = job.with_base_images(base.images.shape[1])
    with clock.stage("synthesis"):
        write_json(job.folder / ROOM, job.room._asdict())  # the run goes on in the room it was planned for
        work = job.synthesis(teachers, base)
        results = synthesise(work, job.folder, job.wanted)
    if results is None:
        done = job.wanted
        print(f"Tasks {done.start}..{done.stop - 1} are solved; run the others, then once without a range.")
        return []
    with clock.stage("relabel"):
        distilled = relabel(assemble(work, storage_of(job.recipe, job.plan.n), results, job.dataset), teachers)
        distilled.save(job.folder)
    card = job.card(work, results, distilled, clock.seconds)
    if options.store_best_images:
        export(distilled, job.folder / "images", "jpg")
    _publish(card, job.folder)
    with clock.stage("validate"):
        evaluation = job.evaluation(distilled, teachers)
        rows = validate(evaluation)
    text = present(evaluation, rows, job.folder, log)
    _publish(replace(card, table=text, results=tuple(rows)), job.folder)
    print(f"\nThe distilled set is in {job.folder} (preview.png shows it, report.html tells the rest).")
    return rows


def decide(options: DistillOptions, recipe_name: str) -> Job:
    """What the options ask for, settled: the dataset on its device, the recipe filled in, the plan of the tasks.

    Raises InferFastError for what can't be had, students and loaders included, before any of the work.
    """
    check_options(options)
    dataset = _dataset(options)
    recipe = first_teachers(options)
    recipe = replace(recipe, synthesis=with_statistics(recipe.synthesis, dataset.pixels))
    check_students(recipe.student, len(dataset.classes), dataset.size)
    check_loader(recipe.squeeze.loader)
    kinds(recipe.compare, recipe.student.labels, recipe.store.budget == "bytes")  # or an error
    folder = options.syn_data_path / (options.exp_name or recipe_name)
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


def _publish(card: Card, folder: Path) -> None:
    """Writes the card, and the pages that are made from it."""
    card.write(folder)
    write_report(folder)


def _dataset(options: DistillOptions) -> ImageDataset:
    cache = None if options.dry_run else options.syn_data_path / "datasets"
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


@dataclass(frozen=True)
class _Published:
    """The flags of the published scripts that a recipe is chosen by, as they were written."""

    dataset: str | None = None
    ipc: str | None = None
    ipc_end: str | None = None


def _recipe(args: list[str]) -> tuple[str, Recipe, list[str]]:
    """The recipe that is named, or the one that the flags of the published scripts stand for.

    Without a name, --dataset chooses its own INFER recipe if it has one, else digits'; and since those scripts have no
    budget but the last task, an --ipc-end beyond the recipe's ipc sets it, where --ipc does not.
    """
    name, recipe, flags = cli.take_recipe(args)
    if flags is not args:
        return name, recipe, flags
    given = cli.glance(_Published, flags, PROG)
    if given.dataset is not None:
        name = f"{canonical_name(given.dataset).removesuffix('-imagenet')}-infer-ipc10"
        name = name if name in RECIPES else "digits-infer"
        recipe = RECIPES[name]
    last = given.ipc_end
    if last is not None and last.isdecimal() and len(last) < 8 and given.ipc is None:  # longer: out of its range
        recipe = replace(recipe, ipc=max(recipe.ipc, int(last)))
    return name, recipe, flags


def _main(args: list[str]) -> None:
    if "--list" in args:
        print(list_recipes())
        return
    name, recipe, flags = _recipe(args)
    options = cli.parse(
        DistillOptions,
        DistillOptions(recipe),
        flags,
        PROG,
        f"Recipe {name}: from a dataset to a distilled set and the table that judges it.",
    )
    distill(options, name)


if __name__ == "__main__":
    sys.exit(cli.run(_main))
