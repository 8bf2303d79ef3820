"""Training a student: images per second of the loader alone, of the step alone, and of both.

    python -m bench.train --quick
    python -m bench.train --output bench/results/train-cpu.json

The published way is a DataLoader with 2 workers over JPEG files (random crop with padding, or RandomResizedCrop at
224x224, and flip), MixUp and the soft labels of static files, then an eager float32 step. Ours: each loader of
infer_fast.data.loader, and the training step as infer_fast.models.train.fit runs it. All figures are of whole epochs at
the steady pace; what the epochs before took longer than that (start of workers, first steps, capture of graphs) has a
column of its own. Each way is freed before the next one is made.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
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
from infer_fast.models.engine import WARM_UP
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
    """All epochs through one of our loaders, as Training takes it: batch by batch, and what makes tensors of each."""

    batches: Iterable[tuple]
    make: Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Watch:
    """Times the last epoch of a loop from within the batches that drive it; those before are its set-up."""

    updates: int
    """batches of an epoch"""
    warm: int
    """epochs before the one that counts"""
    set_up: float = 0.0
    """seconds of those, beyond what they take at the steady pace"""
    epoch: float = 0.0
    """seconds of the epoch that counts"""

    @property
    def epochs(self) -> int:
        return self.warm + 1

    def over(self, batches: Iterable[tuple]) -> Iterator[tuple]:
        """The batches of all epochs; the device is waited for before and after the last one."""
        began = marked = time.perf_counter()
        for done, batch in enumerate(batches, start=1):
            yield batch
            if done == self.warm * self.updates:  # before the next one is asked for
                measure.synchronise()
                marked = time.perf_counter()
        measure.synchronise()
        self.epoch = time.perf_counter() - marked
        self.set_up = marked - began - self.warm * self.epoch


def watched(
    ways: Mapping[str, Callable[[Watch], None]], rounds: int, updates: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of each way's epoch, and of its set-up; in turn, each freed before the next one.

    On a GPU a step of each shape is captured the time after its WARM_UP-th, and the last batch of an epoch has a shape
    of its own: so many epochs are set-up.
    """
    warm = WARM_UP + 1 if torch.cuda.is_available() else 1
    watches: dict[str, list[Watch]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            watches[name].append(Watch(updates, warm))
            way(watches[name][-1])
            measure.free()
    epoch = {name: statistics.median(w.epoch for w in each) for name, each in watches.items()}
    return epoch, {name: statistics.median(w.set_up for w in each) for name, each in watches.items()}


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

    def ours(name: str, epochs: int) -> Fed:
        generator = torch.Generator().manual_seed(0)
        if name.endswith("files"):
            return from_files(name, case, source, logits.to(device), generator, epochs)
        return Fed(*feed(name, resident, Sampling(case.batch_size, epochs * updates, augmentation, generator)))

    def load_published(watch: Watch) -> None:
        for _ in watch.over(loader.epochs(watch.epochs, logits, device)):
            pass

    def load(name: str, watch: Watch) -> None:
        fed = ours(name, watch.epochs)
        for batch in watch.over(fed.batches):
            fed.make(*batch)

    def train(name: str, watch: Watch) -> None:
        train_ours(case, ours(name, watch.epochs), watch)

    names = ["fused", "torch", "dali"] + ["dali files", "torch files"] * (case.size > 64)
    if not installed("nvidia.dali"):
        names = [name for name in names if not name.startswith("dali")]
    alone, _ = watched(
        {"published": load_published, **{name: partial(load, name) for name in names}}, case.rounds, updates
    )
    step, _ = watched(steps(case, logits, device), case.rounds, updates)
    train_theirs = partial(train_published, case, loader, logits, device)
    both, set_up = watched(
        {"published": train_theirs, **{name: partial(train, name) for name in names}}, case.rounds, updates
    )
    loader.close()
    return [
        {
            "case": f"{count} images {case.size}x{case.size}, {case.student}, batch {case.batch_size}",
            "loader": name,
            "loader images/s": count / alone[name],
            "step images/s": updates * case.batch_size / step["published" if name == "published" else "ours"],
            "both images/s": count / both[name],
            "set-up s": set_up[name],
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


def from_files(
    name: str, case: Case, source: FileSet, logits: torch.Tensor, generator: torch.Generator, epochs: int
) -> Fed:
    """Epochs of the JPEG files through DALI or through threads, with each image's class's logits."""
    epoch = dali.file_batches if name.startswith("dali") else threads.file_batches
    streams = (epoch(source, batch_size=case.batch_size, generator=generator) for _ in range(epochs))
    return Fed(chain.from_iterable(streams), lambda images, labels: (images, logits[labels]))


def steps(case: Case, logits: torch.Tensor, device: torch.device) -> dict[str, Callable[[Watch], None]]:
    """Steps on one batch that is there already, the published way and ours."""
    images = torch.randn(case.batch_size, 3, case.size, case.size, device=device)
    targets = logits[: case.batch_size].to(device)
    if len(targets) < case.batch_size:
        targets = targets.repeat(case.batch_size // len(targets) + 1, 1)[: case.batch_size]

    def batches(watch: Watch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(images, targets)] * (watch.epochs * watch.updates)

    return {
        "published": lambda watch: step_published(case, batches(watch), device, watch),
        "ours": lambda watch: train_ours(case, Fed(batches(watch), as_given), watch),
    }


def train_published(
    case: Case, loader: published.Loader, logits: torch.Tensor, device: torch.device, watch: Watch
) -> None:
    step_published(case, loader.epochs(watch.epochs, logits, device), device, watch)


def step_published(case: Case, batches: Iterable[tuple], device: torch.device, watch: Watch) -> None:
    train = published.Trainer(build(case.student, case.classes, (case.size, case.size), seed=0).to(device), TEMPERATURE)
    for images, targets in watch.over(batches):
        train.step(images, targets)


def train_ours(case: Case, fed: Fed, watch: Watch) -> None:
    student = build(case.student, case.classes, (case.size, case.size), seed=0).to(measure.device())
    schedule = Schedule("adamw", 1e-3, 0.01, 0.9, watch.epochs * watch.updates, watch.updates)
    batches = watch.over(fed.batches)
    fit(student, Training(batches, soft_loss(TEMPERATURE), fed.make), schedule, Execution("fast"))


if __name__ == "__main__":
    main()
