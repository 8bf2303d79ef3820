"""The main job, the whole way: dataset -> teachers -> compensators -> soft labels -> distilled set -> students' table.

    python -m infer_fast.distill                                   # digits: about a minute on two cores, no network
    python -m infer_fast.distill fashion-mnist --data-path DIR     # a recipe on files of your own
    python -m infer_fast.distill cifar100-infer-ipc10 --data-path DIR --dry-run
    python -m infer_fast.distill --list                            # every recipe: tasks, bytes, operations

Finished teachers, tasks and students are kept: the same command goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import arg

import infer_fast
from infer_fast import cli
from infer_fast.data.distilled import CARD, DistilledSet
from infer_fast.data.images import ImageDataset, draw_of_each_class
from infer_fast.data.sources import canonical_name, has_folders, load_dataset, read_image_set
from infer_fast.errors import InferFastError
from infer_fast.export import export
from infer_fast.files import read_json, write_json
from infer_fast.models import build
from infer_fast.outlook import Room, describe, estimate, list_recipes, weights
from infer_fast.recipes import RECIPES, Engine, Precision, Recipe, SynthesisSettings
from infer_fast.relabel import relabel
from infer_fast.report import write_report
from infer_fast.squeeze import Teacher, squeeze
from infer_fast.synthesis.memory import choose_lanes
from infer_fast.synthesis.plan import Plan, make_plan
from infer_fast.synthesis.problem import pixels_of
from infer_fast.synthesis.views import task_generator
from infer_fast.tasks import How, TaskResult, assemble, synthesise
from infer_fast.validate import Row, check_wandb, log_to_wandb, table, validate, write_results

ROOM = "room.json"


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
    def how(self) -> How:
        """How the teachers' passes are run."""
        return How(self.precision, self.engine, self.backend)


def distill(options: DistillOptions, recipe_name: str = "digits") -> list[Row]:
    """Runs the whole way and leaves a distilled set in syn_data_path/exp_name; returns the table's rows.

    Raises InferFastError, after saving everything that was finished, for bad input or a task that diverged.
    """
    check_wandb(options.wandb_name)
    began = time.monotonic()
    dataset = _dataset(options)
    recipe = _with_statistics(first_teachers(options), dataset)
    folder = options.syn_data_path / (options.exp_name or recipe_name)
    room = find_room(options, recipe, dataset, folder)
    plan = make_plan(recipe, len(dataset.classes), dataset.size, room.lanes)
    if options.dry_run:
        print(describe(plan, dataset, room, estimate(plan, recipe, dataset)))
        return []
    base = _base_images(dataset, recipe, plan, options.init_path)
    clock = {"dataset": time.monotonic() - began}

    began = time.monotonic()
    teachers = squeeze(
        dataset,
        recipe.arch_name,
        recipe.squeeze,
        seed=recipe.synthesis.seed,
        folder=options.syn_data_path / "teachers",
        checkpoints=options.arch_path[: options.M],
        weights=recipe.arch_weights,
    )
    clock["squeeze"] = time.monotonic() - began

    began = time.monotonic()
    write_json(folder / ROOM, room._asdict())
    wanted = range(options.ipc_start, plan.k if options.ipc_end is None else min(options.ipc_end, plan.k))
    results = synthesise(plan, teachers, base, recipe.synthesis, folder, options.how, room.chunks, wanted)
    clock["synthesis"] = time.monotonic() - began
    if results is None:
        print(f"Tasks {wanted.start}..{wanted.stop - 1} are solved; run the others, then once without a range.")
        return []

    began = time.monotonic()
    distilled = relabel(assemble(plan, base, results, dataset), teachers)
    distilled = replace(
        distilled,
        card=_card(distilled, dataset, recipe, recipe_name, plan, teachers, results, options, room, folder, clock),
    )
    distilled.save(folder)
    clock["relabel"] = time.monotonic() - began
    if options.store_best_images:
        export(distilled, folder / "images", "jpg")
    write_json(folder / CARD, distilled.card)
    write_report(folder)

    began = time.monotonic()
    rows = validate(
        distilled,
        dataset,
        teachers,
        recipe.student,
        ipc=recipe.ipc,
        compare=recipe.compare,
        seeds=recipe.seeds,
        seed=recipe.synthesis.seed,
        store=folder / "students.json",
        labels_folder=folder,
    )
    clock["validate"] = time.monotonic() - began
    text = table(rows, dataset.train.nbytes)
    write_results(folder, text, rows)
    card = {**distilled.card, "seconds": clock, "table": text, "results": [asdict(r) for r in rows]}
    write_json(folder / CARD, card)
    write_report(folder)
    print(text)
    print("\n" + weights(distilled, teachers, recipe.student, dataset.train.nbytes))
    if options.wandb_name is not None:
        log_to_wandb(rows, options.wandb_name)
    print(f"\nThe distilled set is in {folder} (preview.png shows it, report.html tells the rest).")
    return rows


def find_room(options: DistillOptions, recipe: Recipe, dataset: ImageDataset, folder: Path) -> Room:
    """The lanes and chunks of each teacher: what was asked for, else what this run began with, else what fits now."""
    device, names = cli.device(), list(recipe.arch_name)
    settings, classes = recipe.synthesis, len(dataset.classes)
    images = classes if settings.optimise == "compensator" else min(settings.batch_size, classes)
    made_for = [names, images, list(dataset.size), recipe.ipc, settings.optimise, options.precision, device.type]
    path = folder / ROOM
    if options.lanes is not None:
        lanes, chunks = [options.lanes] * len(names), [None] * len(names)
    elif path.is_file() and (written := read_json(path))["made_for"] == made_for:
        lanes, chunks = written["lanes"], written["chunks"]
    else:
        found = []
        for name in names:
            network = build(name, len(dataset.classes), dataset.size, seed=0).to(device)
            found.append(choose_lanes(network, images, dataset.size, options.precision, recipe.ipc))
        lanes, chunks = (list(each) for each in zip(*found, strict=True))
    if options.chunk is not None:
        chunks = [options.chunk] * len(names)
    elif 0 < settings.batch_size < images:  # a compensator is shared by all classes: these are the images of one pass
        chunks = [min(chunk or images, settings.batch_size) for chunk in chunks]
    return Room(lanes, chunks, made_for)


def _dataset(options: DistillOptions) -> ImageDataset:
    cache = None if options.dry_run else options.syn_data_path / "datasets"
    dataset = load_dataset(
        options.recipe.dataset,
        options.data_path,
        image_size=options.image_size,
        cache=cache,
        val_path=options.val_dir,
    )
    if len(dataset.train) == 0:
        raise InferFastError(f"{dataset.name} can't be fetched by name: give its place with --data-path.")
    return dataset.to(cli.device())


def first_teachers(options: DistillOptions) -> Recipe:
    """The recipe with the first --M of its teachers. Raises InferFastError when there are not so many."""
    names, count = options.recipe.arch_name, options.M
    if count is not None and not 1 <= count <= len(names):
        raise InferFastError(f"--M {count}: there are {len(names)} teachers ({', '.join(names)}).")
    return replace(options.recipe, arch_name=names[:count])


def _with_statistics(recipe: Recipe, dataset: ImageDataset) -> Recipe:
    settings = recipe.synthesis
    filled = replace(settings, mean=settings.mean or dataset.pixels.mean, std=settings.std or dataset.pixels.std)
    return replace(recipe, synthesis=filled)


def _base_images(dataset: ImageDataset, recipe: Recipe, plan: Plan, init_path: Path | None) -> torch.Tensor:
    """uint8 (C, k, 3, H, W) on the CPU: k random training images of every class, or those of --init-path."""
    if init_path is not None and not (init_path / "tensor_0.pt").is_file() and has_folders(init_path):
        return read_image_set(init_path, dataset.classes, plan.size[0], plan.k)
    if init_path is not None:
        return _given_images(init_path, plan, recipe.synthesis)
    generator = task_generator(recipe.synthesis.seed, 0, 0, "base images")
    return dataset.train.at(draw_of_each_class(dataset, plan.k, generator)).cpu()  # (C, k, 3, H, W)


def _given_images(folder: Path, plan: Plan, settings: SynthesisSettings) -> torch.Tensor:
    expected = (plan.classes, 3, *plan.size)
    columns = []
    for j in range(plan.k):
        path = folder / f"tensor_{j}.pt"
        if not path.is_file():
            raise InferFastError(f"{path} does not exist: --init-path needs tensor_0.pt to tensor_{plan.k - 1}.pt.")
        try:
            tensor = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # every way a torch file can be damaged, or hold more than tensors
            raise InferFastError(f"{path} is not a tensor file that can be loaded safely.") from error
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != expected:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InferFastError(f"{path} holds {found}, expected a tensor {expected}.")
        columns.append(tensor if tensor.dtype == torch.uint8 else pixels_of(settings).to_bytes(tensor))
    return torch.stack(columns, dim=1)  # (C, k, 3, H, W)


def _card(
    distilled: DistilledSet,
    dataset: ImageDataset,
    recipe: Recipe,
    recipe_name: str,
    plan: Plan,
    teachers: list[Teacher],
    results: dict[tuple[int, int, int], TaskResult],
    options: DistillOptions,
    room: Room,
    folder: Path,
    clock: dict[str, float],
) -> dict:
    device = cli.device()
    whole = dataset.train.nbytes
    return {
        "recipe_name": recipe_name,
        "recipe": asdict(recipe),
        "dataset": {
            "name": dataset.name,
            "classes": dataset.classes,
            "mean": dataset.pixels.mean,
            "std": dataset.pixels.std,
            "size": dataset.size,
            "training_images": len(dataset.train),
            "test_images": len(dataset.test),
            "fingerprint": dataset.fingerprint,
            "data_path": None if options.data_path is None else str(options.data_path),
            "val_dir": None if options.val_dir is None else str(options.val_dir),
            "image_size": options.image_size,
        },
        "teachers": [
            {
                "name": t.name,
                "accuracy": t.accuracy,
                "sha256": t.sha256,
                "path": os.path.relpath(t.path, folder),
            }
            for t in teachers
        ],
        "k": plan.k,
        "ipc": plan.ipc,
        "bytes": {
            "images": distilled.image_bytes,
            "budget": plan.budget_bytes,
            "labels": distilled.label_bytes,
            "dataset": whole,
            "ratio": whole / distilled.image_bytes,
        },
        "tasks": [
            {"teacher": plan.teachers[m], "index": j, "first_loss": losses[0], "last_loss": losses[-1]}
            for (m, j, _), losses in sorted((task, result.losses) for task, result in results.items())
        ],
        "how": {**options.how.resolved(device), "lanes": room.lanes, "chunks": room.chunks},
        "versions": {
            "infer_fast": infer_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "seconds": clock,
        "table": None,
        "results": [],
    }


def _recipe(args: list[str]) -> tuple[str, Recipe, list[str]]:
    """The recipe that is named, or the one that the flags of the published scripts stand for.

    Without a name, --dataset chooses its own INFER recipe if it has one; and since those scripts have no budget but the
    last task, an --ipc-end beyond the recipe's ipc sets it, where --ipc does not.
    """
    name, recipe, flags = cli.take_recipe(args)
    dataset = cli.value_of(args, "--dataset")
    if flags is args and dataset is not None:
        name = f"{canonical_name(dataset).removesuffix('-imagenet')}-infer-ipc10"
        name, recipe = (name, RECIPES[name]) if name in RECIPES else ("digits", recipe)
    last = cli.value_of(args, "--ipc-end")
    if flags is args and last is not None and last.isdigit() and cli.value_of(args, "--ipc") is None:
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
        "python -m infer_fast.distill [RECIPE]",
        f"Recipe {name}: from a dataset to a distilled set and the table that judges it.",
    )
    distill(options, name)


if __name__ == "__main__":
    sys.exit(cli.run(_main))
