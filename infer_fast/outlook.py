"""What a run will do, weigh and take, before it does any of it: the plan, the estimate, the list of recipes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from infer_fast import cli
from infer_fast.data.augment import augmentation_of
from infer_fast.data.distilled import DistilledSet
from infer_fast.data.fkd import epoch_bytes
from infer_fast.data.images import ImageDataset
from infer_fast.models import MatchedTeacher, build
from infer_fast.recipes import DATASETS, RECIPES, Recipe, StudentSettings
from infer_fast.squeeze import Teacher
from infer_fast.synthesis.plan import Plan, make_plan


class Room(NamedTuple):
    """Of each teacher: tasks side by side, and images of a task in one pass (None: all). Kept with the run, so that it
    goes on as it began whatever the free memory is then; made_for: what it depends on."""

    lanes: list[int]
    chunks: list[int | None]
    made_for: list


def describe(plan: Plan, dataset: ImageDataset, room: Room, seconds: dict[str, float]) -> str:
    """The plan in words: tasks, bytes against the budget, estimated time."""
    share = 100 * plan.image_bytes / plan.budget_bytes
    whole = dataset.train.nbytes
    what = f"{plan.compensators} compensators" if plan.compensators else "optimised images"
    lanes = max(len(b.indices) for b in plan.batches)
    chunked = [f"{name}: {n} images in one pass" for name, n in zip(plan.teachers, room.chunks, strict=True) if n]
    chunks = f" ({', '.join(chunked)})" if chunked else ""
    spent = ", ".join(f"{name} {value / 60:.1f} min" for name, value in seconds.items())
    lines = [
        f"dataset    {dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test images "
        f"of {plan.size[0]}x{plan.size[1]}, {plan.classes} classes",
        f"teachers   {', '.join(plan.teachers)}",
        f"tasks      {plan.tasks} tasks of {plan.iterations} iterations, in {len(plan.batches)} batches of up to "
        f"{lanes} lanes{chunks}",
        f"stored     k = {plan.k} base images per class, {what}: {plan.stored_images:,} images for "
        f"{plan.instances:,} instances",
        f"images     {plan.image_bytes:,} bytes of a budget of {plan.budget_bytes:,} ({share:.1f} %; "
        f"{whole / plan.image_bytes:.1f} times smaller than the training split)",
        f"labels     {plan.label_bytes:,} bytes of soft labels",
        f"estimate   {spent} on {cli.device().type}",
    ]
    return "\n".join(lines)


def estimate(plan: Plan, recipe: Recipe, dataset: ImageDataset) -> dict[str, float]:
    """Seconds each stage will take, from one small timed batch per network, scaled by the number of images."""
    device = cli.device()
    images = torch.randn(8, 3, *plan.size, device=device)

    def seconds_per_image(step: Callable[[], torch.Tensor]) -> float:
        step().sum().backward()  # the first run pays for set-up
        began = time.perf_counter()
        step().sum().item()
        step().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / len(images) / 1.3  # one forward too many

    squeezing = synthesis = 0.0
    for name in plan.teachers:
        network = build(name, plan.classes, plan.size, seed=0).to(device)
        training = seconds_per_image(lambda network=network: network(images))
        if recipe.arch_weights is None:
            squeezing += training * recipe.squeeze.epochs * len(dataset.train)
        matched = MatchedTeacher(network)
        inputs = images.clone().requires_grad_(True)
        matching = seconds_per_image(lambda matched=matched, inputs=inputs: sum(t.sum() for t in matched(inputs)))
        batches = [b for b in plan.batches if plan.teachers[b.teacher] == name]
        synthesis += matching * plan.iterations * sum(len(b.indices) * (b.last_class - b.first_class) for b in batches)
    students = {"none": 1, "random": 2, "all": 5}[recipe.compare] * recipe.seeds
    validation = 0.0
    for name in recipe.student.networks:
        network = build(name, plan.classes, plan.size, seed=0).to(device)
        training = seconds_per_image(lambda network=network: network(images))
        validation += students * training * recipe.student.epochs * plan.instances
    return {"squeeze": squeezing, "synthesis": synthesis, "validate": validation}


def weights(distilled: DistilledSet, teachers: list[Teacher], student: StudentSettings, whole: int) -> str:
    """What a distilled set weighs, part by part, in bytes and as a share of the training images (`whole`; 0: unknown).

    Dynamic labels weigh what the teachers weigh. FKD (arXiv 2112.01528) stores the logits, crops, flips and mixes of
    every epoch of `student`.
    """
    stored = epoch_bytes(len(distilled), student.batch_size, len(distilled.classes), augmentation_of(student))
    added = 0 if distilled.compensators is None else sum(t.nbytes for t in distilled.compensators)
    parts = {
        "base images" if added else "images": distilled.base.nbytes,
        "compensators, scales and offsets": added,
        "soft labels, static": distilled.label_bytes,
        "soft labels, dynamic (the teachers)": sum(t.weight_bytes for t in teachers),
        f"soft labels of every crop of {student.epochs} epochs (FKD)": student.epochs * stored,
    }
    shares = {name: f"{100 * size / whole:.3g} %" if whole else "-" for name, size in parts.items()}
    rows = [f"| {name} | {size:,} | {shares[name]} |" for name, size in parts.items() if size]
    return "\n".join(["| part | bytes | share of the training images |", "| --- | ---: | ---: |", *rows])


def list_recipes() -> str:
    """Every recipe as a table: tasks, bytes of images and of static labels, and operations of the synthesis.

    Operations are those of the convolutions and matrix products of forward and input-gradient passes, in units of
    10^15; perturbation steps are left out.
    """
    rows = [
        f"{'recipe':24} {'dataset':14} {'teachers':8} {'tasks':>6} {'iterations':>10} {'k':>4} {'image bytes':>14} "
        f"{'label bytes':>13} {'PFLOP':>10}"
    ]
    for name, recipe in RECIPES.items():
        classes, size = DATASETS[recipe.dataset]
        plan = make_plan(recipe, classes, size)
        images = sum(len(b.indices) * (b.last_class - b.first_class) * _flops(plan.teachers[b.teacher], classes, size)
                     for b in plan.batches)  # fmt: skip
        rows.append(
            f"{name:24} {recipe.dataset:14} {len(plan.teachers):8} {plan.tasks:6} {plan.iterations:10} {plan.k:4} "
            f"{plan.image_bytes:14,} {plan.label_bytes:13,} {images * plan.iterations / 1e15:10.3g}"
        )
    return "\n".join(rows)


@lru_cache(maxsize=64)
def _flops(name: str, classes: int, size: tuple[int, int]) -> int:
    """Operations of one image's forward and input-gradient pass: twice the forward's, counted without computing."""
    with torch.device("meta"):
        network = build(name, classes, size).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty(1, 3, *size))
    return 2 * counter.get_total_flops()
