"""Iterations of the published sizes are captured without a hazard; nothing is computed, so that they take seconds."""

from __future__ import annotations

from dataclasses import replace

import torch

from infer_fast.models import build
from infer_fast.recipes import IMAGENET_TEACHERS, INFER_TEACHERS, RECIPES
from infer_fast.synthesis.solver import Solver
from infer_fast.synthesis.views import draw_views
from tests.stand_in.record import idle


def captured(recipe: str, teacher: str, classes: int, size: int, *, lanes: int, images: int) -> None:
    """An iteration of a recipe's teacher on `lanes` tasks of `images` images."""
    settings = replace(RECIPES[recipe].synthesis, iterations=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    views = draw_views(0, 0, list(range(lanes)), iterations=4, jitter=settings.jitter, size=(size, size))
    with idle() as record:
        device = torch.device("cuda")
        network = build(teacher, classes, (size, size), seed=0).eval().to(device)
        base = torch.empty(lanes, images, 3, size, size, device=device)
        loop = Solver(network, settings=settings).prepare(
            base, views.to(device), torch.arange(images, device=device) % classes
        )
        assert loop.engine == "graph"
    assert record.captured_launches["_forward"] == record.captured_launches["_backward"] > 0


def check_cifar100():
    for teacher in INFER_TEACHERS:
        captured("cifar100-infer-ipc10", teacher, 100, 32, lanes=9, images=100)


def check_tiny_imagenet():
    for teacher in INFER_TEACHERS:
        captured("tiny-infer-ipc10", teacher, 200, 64, lanes=1, images=200)


def check_imagenet():
    for teacher in IMAGENET_TEACHERS:
        captured("imagenet-infer-ipc10", teacher, 1000, 224, lanes=1, images=50)


def check_images():
    captured("cifar100-dwa-ipc10", "resnet18", 100, 32, lanes=1, images=100)
    captured("imagenet-sre2l-ipc10", "resnet18", 1000, 224, lanes=1, images=50)
