"""Training a student: images per second of the loader alone, of the step alone, and of both.

    python -m bench.train --quick
    python -m bench.train --output bench/results/train-cpu.json

The published way is a DataLoader with 2 workers over JPEG files (random crop with padding, or RandomResizedCrop at
224x224, and flip), MixUp and the soft labels of static files, then an eager float32 step. Ours: each loader of
infer_fast.data.loader, and the training step as infer_fast.models.train.fit runs it. One epoch of a set of ipc 10.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from bench import measure, published
from infer_fast.data import dali, threads
from infer_fast.data.augment import Augmentation, Sampling
from infer_fast.data.decode import image_files
from infer_fast.data.images import FileSplit, Split
from infer_fast.data.loader import feed
from infer_fast.data.pixels import Pixels
from infer_fast.data.sets import FileSet, resident_split
from infer_fast.extras import installed
from infer_fast.models import build
from infer_fast.models.execution import Execution
from infer_fast.models.train import Schedule, Training, as_given, fit, soft_loss

PIXELS = Pixels((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
TEMPERATURE = 30.0


@dataclass(frozen=True)
class Case:
    """A set of `classes` x `ipc` images of size x size, a student, batches of batch_size."""

    student: str
    classes: int
    ipc: int
    size: int
    batch_size: int
    rounds: int


QUICK = [Case("convnet128", 10, 10, 32, 64, 1)]
CPU = [
    Case("convnet128", 10, 50, 32, 64, 5),
    Case("convnet128", 100, 50, 32, 64, 3),
    Case("resnet18", 10, 10, 224, 64, 1),
]
GPU = [
    Case("convnet128", 100, 50, 32, 64, 5),
    Case("resnet18", 100, 50, 32, 64, 5),
    Case("resnet18", 100, 10, 224, 128, 3),
]


class Fed(NamedTuple):
    """One epoch through one of our loaders, as Training takes it: batch by batch, and what makes tensors of a batch."""

    batches: Iterable[tuple]
    make: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0])
    rows: list[dict] = []
    for case in QUICK if options.quick else GPU if torch.cuda.is_available() else CPU:
        with tempfile.TemporaryDirectory() as folder:
            for row in case_rows(case, Path(folder)):
                rows.append(row)
                measure.write(options.output, rows)
    print(f"images per second, {measure.machine()}")
    print(measure.table(rows))


def case_rows(case: Case, folder: Path) -> list[dict]:
    """The published way and each loader, loader alone, step alone and both, in turn."""
    device, count = measure.device(), case.classes * case.ipc
    images = pictures(count, case.size)
    labels = torch.arange(case.classes).repeat_interleave(case.ipc)
    logits = torch.randn(count, case.classes)
    published.write_jpegs(images, labels, folder)
    loader = published.Loader(folder, case.size, case.batch_size, *PIXELS, resized=case.size > 64)
    resident = resident_split(Split(images, labels), case.classes, PIXELS, logits).to(device)
    augmentation = Augmentation(padding=4, flip=True, mix="mixup", resized=case.size > 64)
    updates = -(-count // case.batch_size)
    files = image_files(folder)
    place = {name: label for label, name in enumerate(sorted({f.parent.name for f in files}))}
    split = FileSplit(tuple(files), torch.tensor([place[f.parent.name] for f in files]), (case.size, case.size))
    source = FileSet(split.to(device), case.classes, PIXELS)

    def ours(name: str) -> Fed:
        generator = torch.Generator().manual_seed(0)
        if name.endswith("files"):
            return from_files(name, case, source, logits.to(device), generator)
        return Fed(*feed(name, resident, Sampling(case.batch_size, updates, augmentation, generator)))

    def load_published() -> None:
        for _ in loader.epoch(logits, device):
            pass

    def load(name: str) -> None:
        fed = ours(name)
        for batch in fed.batches:
            fed.make(*batch)

    def train(name: str) -> None:
        train_ours(case, ours(name), updates)

    names = ["fused", "torch", "dali"] + ["dali files", "torch files"] * (case.size > 64)
    if not installed("nvidia.dali"):
        names = [name for name in names if not name.startswith("dali")]
    loading: dict[str, Callable[[], None]] = {
        "published": load_published,
        **{name: partial(load, name) for name in names},
    }
    alone = measure.milliseconds_in_turn(loading, case.rounds)
    stepping = steps(case, logits, device, updates)
    step = measure.milliseconds_in_turn(stepping, case.rounds)
    train_theirs = partial(train_published, case, loader, logits, device)
    training: dict[str, Callable[[], None]] = {
        "published": train_theirs,
        **{name: partial(train, name) for name in names},
    }
    both = measure.milliseconds_in_turn(training, case.rounds)
    loader.close()
    return [
        {
            "case": f"{count} images {case.size}x{case.size}, {case.student}, batch {case.batch_size}",
            "loader": name,
            "loader images/s": 1e3 * count / alone[name],
            "step images/s": 1e3 * updates * case.batch_size / step["published" if name == "published" else "ours"],
            "both images/s": 1e3 * count / both[name],
            "loader / published": alone["published"] / alone[name],
            "both / published": both["published"] / both[name],
        }
        for name in ("published", *names)
    ]


def pictures(count: int, size: int) -> torch.Tensor:
    """Smooth random images, which JPEG decodes at the speed of photographs: uint8 (count, 3, size, size)."""
    coarse = torch.rand(count, 3, max(2, size // 8), max(2, size // 8))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (255 * (smooth + 0.05 * torch.randn(count, 3, size, size)).clamp(0, 1)).to(torch.uint8)


def from_files(name: str, case: Case, source: FileSet, logits: torch.Tensor, generator: torch.Generator) -> Fed:
    """One epoch of the JPEG files through DALI or through threads, with each image's class's logits."""
    epoch = dali.file_batches if name.startswith("dali") else threads.file_batches
    stream = epoch(source, batch_size=case.batch_size, generator=generator)
    return Fed(stream, lambda images, labels: (images, logits[labels]))


def steps(case: Case, logits: torch.Tensor, device: torch.device, updates: int) -> dict[str, Callable[[], object]]:
    """`updates` steps on one batch that is there already, the published way and ours."""
    images = torch.randn(case.batch_size, 3, case.size, case.size, device=device)
    targets = logits[: case.batch_size].to(device)
    if len(targets) < case.batch_size:
        targets = targets.repeat(case.batch_size // len(targets) + 1, 1)[: case.batch_size]
    student = build(case.student, case.classes, (case.size, case.size), seed=0).to(device)
    train = published.Trainer(student, TEMPERATURE)
    return {
        "published": lambda: [train.step(images, targets) for _ in range(updates)],
        "ours": lambda: train_ours(case, Fed([(images, targets)] * updates, as_given), updates),
    }


def train_published(case: Case, loader: published.Loader, logits: torch.Tensor, device: torch.device) -> None:
    train = published.Trainer(build(case.student, case.classes, (case.size, case.size), seed=0).to(device), TEMPERATURE)
    for images, targets in loader.epoch(logits, device):
        train.step(images, targets)


def train_ours(case: Case, fed: Fed, updates: int) -> None:
    student = build(case.student, case.classes, (case.size, case.size), seed=0).to(measure.device())
    schedule = Schedule("adamw", 1e-3, 0.01, 0.9, updates, updates)
    fit(student, Training(fed.batches, soft_loss(TEMPERATURE), fed.make), schedule, Execution("fast"))


if __name__ == "__main__":
    main()
