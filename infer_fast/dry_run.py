"""What a run will do, weigh and take, before it does any of it: the plan, the estimate, the list of recipes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from infer_fast.data.augment import augmentation_of
from infer_fast.data.distilled import DistilledSet
from infer_fast.data.fkd import epoch_bytes
from infer_fast.data.images import ImageDataset
from infer_fast.models import MatchedTeacher, build
from infer_fast.models.teacher import Teacher
from infer_fast.recipes import DATASETS, RECIPES
from infer_fast.settings import Recipe, StoreSettings, StudentSettings
from infer_fast.students.candidates import DISTILLED, epochs_of, kinds
from infer_fast.synthesis.memory import Room
from infer_fast.synthesis.plan import Plan, make_plan

PROBE = 8  # images that are timed


def describe(plan: Plan, dataset: ImageDataset, store: StoreSettings, room: Room, seconds: dict[str, float]) -> str:
    """The plan in words: tasks, bytes against the budget, estimated time."""
    whole = dataset.train.nbytes
    what = "optimised images" if plan.optimise == "images" else f"{plan.compensators} compensators"
    if plan.added != plan.size:
        what += f" of {plan.added[1]}x{plan.added[0]}"
    lanes = max((len(b.indices) for b in plan.batches), default=0)
    chunked = [f"{name}: {n} images in one pass" for name, n in zip(plan.teachers, room.chunks, strict=True) if n]
    chunks = f" ({', '.join(chunked)})" if chunked else ""
    tasks = f"{plan.tasks} tasks of {plan.iterations} iterations, in {len(plan.batches)} batches of up to {lanes} lanes"
    tasks = tasks + chunks if plan.tasks else "none: no compensators"
    spent = ", ".join(f"{name} {value / 60:.1f} min" for name, value in seconds.items())
    about, weight = "", _raw_weight(plan, whole)
    if store.budget == "bytes":
        about = "about "  # what fits is seen when it is coded
        weight = [
            f"file       a budget of {plan.budget_bytes:,} bytes for images ({store.codec}), labels "
            f"({store.label_bits}) and headers ({whole / plan.budget_bytes:.1f} times smaller than the training split)"
        ]
    lines = [
        f"dataset    {dataset.name}: {len(dataset.train):,} training and {len(dataset.test):,} test images "
        f"of {plan.size[0]}x{plan.size[1]}, {plan.classes} classes",
        f"teachers   {', '.join(plan.teachers)}",
        f"tasks      {tasks}",
        f"stored     k = {about}{plan.k} base images per class, {what}: {plan.stored_images:,} images for "
        f"{plan.instances:,} instances",
        *weight,
        f"estimate   {spent} on {dataset.device.type}",
    ]
    return "\n".join(lines)


def _raw_weight(plan: Plan, whole: int) -> list[str]:
    """Lines of images and of labels, stored raw, against the budget."""
    share = 100 * plan.image_bytes / plan.budget_bytes
    return [
        f"images     {plan.image_bytes:,} bytes of a budget of {plan.budget_bytes:,} ({share:.1f} %; "
        f"{whole / plan.image_bytes:.1f} times smaller than the training split)",
        f"labels     {plan.label_bytes:,} bytes of soft labels",
    ]


def estimate(plan: Plan, recipe: Recipe, dataset: ImageDataset) -> dict[str, float]:
    """Seconds each stage will take, from one small timed batch per network, scaled by the number of images."""
    device = dataset.device
    images = torch.randn(PROBE, 3, *plan.size, device=device)
    squeezing = synthesis = labelling = 0.0  # labelling: of one image by all teachers
    for position, name in enumerate(plan.teachers):
        network = build(name, plan.classes, plan.size, seed=0).to(device)
        if recipe.arch_weights is None:
            squeezing += _training_seconds(network, images) * recipe.squeeze.epochs * len(dataset.train)
        matched = MatchedTeacher(network)
        matched.check(images)
        matching = _timed(partial(_backward, matched, images.clone().requires_grad_(True)), device)
        batches = [b for b in plan.batches if b.teacher == position]
        synthesis += matching * plan.iterations * sum(len(b.indices) * (b.last_class - b.first_class) for b in batches)
        network.eval()
        with torch.no_grad():
            labelling += _timed(partial(network, images), device)
    validation = 0.0
    for name in recipe.student.networks:
        network = build(name, plan.classes, plan.size, seed=0).to(device)
        validation += _validation_seconds(plan, recipe, _training_seconds(network, images), labelling)
    return {"squeeze": squeezing, "synthesis": synthesis, "validate": validation}


def _validation_seconds(plan: Plan, recipe: Recipe, training: float, labelling: float) -> float:
    """Of one network's rows; training, labelling: seconds of an image."""
    student, total = recipe.student, 0.0
    for kind in kinds(recipe.compare, student.labels, recipe.store.budget == "bytes"):
        images = epochs_of(kind, student, len(plan.teachers)) * plan.instances
        total += recipe.seeds * images * training
        if kind == (DISTILLED, "fkd"):
            total += images * labelling  # stored once, replayed for every seed
        elif kind.labels in ("dynamic", "fkd"):
            total += recipe.seeds * images * labelling
    return total


def _training_seconds(network: nn.Module, images: torch.Tensor) -> float:
    return _timed(partial(_backward, network, images), images.device)


def _backward(network: nn.Module, images: torch.Tensor) -> None:
    outputs = network(images)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.stack([output.sum() for output in outputs]).sum().backward()


def _timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one of PROBE images; the first run pays for set-up."""
    step()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / PROBE


def byte_table(distilled: DistilledSet, teachers: Sequence[Teacher], student: StudentSettings, whole: int) -> str:
    """What a distilled set weighs, part by part, in bytes and as a share of the training images (`whole`; 0: unknown).

    Dynamic labels weigh what the teachers weigh. FKD (arXiv 2112.01528) stores the logits, crops, flips and mixes of
    every epoch of `student`.
    """
    stored = epoch_bytes(len(distilled), student.batch_size, len(distilled.classes), augmentation_of(student))
    added = distilled.compensator_bytes
    parts = {
        "base images" if added else "images": distilled.image_bytes - added,
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
        k, weight = f"{plan.k:4}", f"{plan.image_bytes:14,} {plan.label_bytes:13,}"
        if recipe.store.budget == "bytes":  # which a codec fills: how many there are is seen then
            k, weight = f"{'-':>4}", f"{plan.budget_bytes:14,} {'with them':>13}"
        rows.append(
            f"{name:24} {recipe.dataset:14} {len(plan.teachers):8} {plan.tasks:6} {plan.iterations:10} {k} "
            f"{weight} {images * plan.iterations / 1e15:10.3g}"
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
