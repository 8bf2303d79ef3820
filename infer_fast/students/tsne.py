"""What students see: t-SNE (van der Maaten and Hinton 2008) of their features of test images, side by side.

Used by python -m infer_fast.validate --tsne.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from infer_fast.data.images import ImageDataset
from infer_fast.extras import require
from infer_fast.files import write_bytes
from infer_fast.models.train import features
from infer_fast.progress import stage
from infer_fast.students.candidates import Evaluation, candidates
from infer_fast.students.training import train_student

CLASSES, EACH = 10, 60  # at most so many classes, and test images of each
PERPLEXITY = 30.0


def picture(evaluation: Evaluation, path: Path) -> Path:
    """Trains a student on the distilled set and one on random real images of its bytes, and draws what both see."""
    settings = replace(evaluation.settings, labels=("static",))
    evaluation = replace(evaluation, settings=settings, compare="random")
    pair, networks = candidates(evaluation), {}
    with stage("t-SNE", sum(c.updates for c in pair), "updates") as running:
        for candidate in pair:
            source = candidate.source(evaluation.seed)
            network, along = train_student(
                candidate, source, evaluation, settings.networks[0], evaluation.seed, running
            )
            networks[f"trained on {candidate.trained_on}, {candidate.labels}: {along[-1][0]:.1f} %"] = network
    return draw(networks, evaluation.dataset, path, evaluation.seed)


def draw(networks: Mapping[str, nn.Module], dataset: ImageDataset, path: Path, seed: int = 0) -> Path:
    """One panel for each named network: the first classes' test images in two dimensions, as a PNG at `path`."""
    require("matplotlib", "The t-SNE picture")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from sklearn.manifold import TSNE

    shown = range(min(CLASSES, len(dataset.classes)))
    positions = torch.cat([torch.nonzero(dataset.test.labels == c).flatten()[:EACH] for c in shown])
    count, images = len(positions), dataset.pixels.normalise(dataset.test.at(positions))
    labels = dataset.test.labels[positions].cpu().numpy()
    perplexity = min(PERPLEXITY, (len(positions) - 1) / 3)
    figure, axes = plt.subplots(1, len(networks), figsize=(5.5 * len(networks), 5), squeeze=False)
    for axis, (name, network) in zip(axes[0], networks.items(), strict=True):
        points = TSNE(perplexity=perplexity, random_state=seed % 2**32, init="pca").fit_transform(
            features(network, lambda p: images[p], count)
        )
        for c in shown:
            axis.scatter(*points[labels == c].T, s=9, label=dataset.classes[c])
        axis.set_title(name, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0][-1].legend(fontsize=7, loc="best")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    write_bytes(path, buffer.getvalue())
    return path
