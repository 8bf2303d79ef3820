"""Which training images are kept as base images: random ones, or those that stand for the others of their class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from infer_fast.data.images import ImageDataset, draw_of_each_class
from infer_fast.errors import InferFastError
from infer_fast.models.teacher import Teacher
from infer_fast.models.train import features

ROUNDS = 15  # of k-means
CLOSEST = 64  # images that are looked at for one that no other centre has


def chooser(
    dataset: ImageDataset, how: str, teachers: Sequence[Teacher], generator: torch.Generator
) -> Callable[[int], torch.Tensor]:
    """choose(k): positions int64 (C, k) of k training images of each class, on the CPU.

    how: random, or medoids of k-means in the teachers' features. Raises InferFastError when a class has fewer.
    """
    if how == "random":
        state = generator.get_state()
        return lambda k: draw_of_each_class(dataset, k, torch.Generator().set_state(state))
    points = features_of(dataset, teachers)
    labels, seed = dataset.train.labels.cpu(), int(torch.randint(0, 2**62, (1,), generator=generator))

    def choose(k: int) -> torch.Tensor:
        rows = []
        for label, name in enumerate(dataset.classes):
            own = (labels == label).nonzero().flatten()
            if len(own) < k:
                raise InferFastError(f"Class {name!r} has {len(own)} training images, fewer than {k}: lower --ipc.")
            rows.append(own[medoids(points[own], k, torch.Generator().manual_seed(seed + label))])
        return torch.stack(rows)

    return choose


def features_of(dataset: ImageDataset, teachers: Sequence[Teacher]) -> torch.Tensor:
    """What every teacher's last linear layer is given, side by side, each in units of its deviation: float32 (N, F).

    Raises InferFastError for a teacher without a linear layer.
    """
    found = []
    for teacher in teachers:
        own = features(teacher.network, lambda p: dataset.pixels.normalise(dataset.train.at(p)), len(dataset.train))
        found.append(own / own.std().clamp(min=1e-12))
    return torch.cat(found, dim=1)


def medoids(points: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """Positions int64 (k,) of the points (N, F) closest to the k centres of k-means, all different.

    Lloyd's iterations from k random points; a centre that loses all its points stays where it is.
    """
    centres = points[torch.randperm(len(points), generator=generator)[:k]].clone()
    for _ in range(ROUNDS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    distances = torch.cdist(centres, points)
    taken: dict[int, None] = {}
    for row in distances:
        order = row.topk(min(CLOSEST, len(points)), largest=False).indices.tolist()
        free = next((position for position in order if position not in taken), None)
        if free is None:
            free = next(position for position in row.argsort().tolist() if position not in taken)
        taken[free] = None
    return torch.tensor(list(taken))
