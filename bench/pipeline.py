"""The whole way from trained teachers to a judged student: synthesis, labels, training, test accuracy.

    python -m bench.pipeline --quick
    python -m bench.pipeline --output bench/results/pipeline-cpu.json

The published way solves one task at a time, writes instances as JPEG files, labels them, and trains from the files
with a DataLoader; ours keeps everything in device memory. Same teachers (freshly initialised: only time is measured
here), same tasks, iterations, epochs and student. The columns are seconds of each stage.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import measure, published
from bench.train import PIXELS, TEMPERATURE, pictures
from infer_fast.data.augment import Augmentation, Sampling
from infer_fast.data.distilled import DistilledSet, quantise
from infer_fast.data.loader import feed
from infer_fast.data.sets import resident_distilled
from infer_fast.models import build
from infer_fast.models.teacher import Teacher
from infer_fast.models.train import Schedule, Training, fit, predict, soft_loss
from infer_fast.recipes import base_images_per_class
from infer_fast.settings import SynthesisSettings
from infer_fast.students.labels import averaged_logits
from infer_fast.synthesis import draw_views
from infer_fast.synthesis.solver import Solver


@dataclass(frozen=True)
class Case:
    """Classes, ipc, teachers, student; iterations of each task and epochs of the student."""

    classes: int
    ipc: int
    teachers: tuple[str, ...]
    student: str
    iterations: int
    epochs: int
    size: int = 32
    batch_size: int = 64
    tests: int = 1000


QUICK = [Case(10, 4, ("convnet", "convnet-silu"), "convnet128", 5, 2)]
CPU = [
    Case(10, 10, ("convnet", "convnet-residual", "convnet-separable", "convnet-silu"), "convnet128", 50, 20),
    Case(100, 10, ("convnet", "convnet-silu"), "convnet128", 20, 3),
]
GPU = [
    Case(10, 10, ("resnet18", "mobilenetv2"), "resnet18", 100, 20),
    Case(100, 10, ("resnet18", "mobilenetv2", "efficientnet_b0", "shufflenet_g2"), "resnet18", 100, 10),
]


def main() -> None:
    options = measure.arguments(__doc__.splitlines()[0])
    rows: list[dict] = []
    for case in QUICK if options.quick else GPU if torch.cuda.is_available() else CPU:
        totals: dict[str, float] = {}
        for way, seconds_of in {"published": whole_published, "ours": whole_ours}.items():
            stages = seconds_of(case)
            measure.free()
            totals[way] = sum(stages.values())
            rows.append(
                {
                    "case": f"{case.classes} classes, ipc {case.ipc}, {len(case.teachers)} teachers",
                    "way": way,
                    **{f"{stage} s": seconds for stage, seconds in stages.items()},
                    "total s": totals[way],
                    "published / this": totals["published"] / totals[way],
                }
            )
            measure.write(options.output, rows)
    print(measure.machine())
    print(measure.table(rows))


class Clock:
    """Seconds of stages that follow each other."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.began = time.perf_counter()

    def stop(self, stage: str) -> None:
        measure.synchronise()
        now = time.perf_counter()
        self.stages[stage], self.began = now - self.began, now


def material(case: Case) -> tuple[list[Teacher], torch.Tensor, torch.Tensor, int]:
    """Teachers, base images uint8 (C, k, 3, H, W), test images, and k."""
    size = (case.size, case.size)
    networks = [build(name, case.classes, size, seed=0).eval().to(measure.device()) for name in case.teachers]
    # freshly initialised, and in no file
    teachers = [Teacher(name, net, 0.0, Path(), "") for name, net in zip(case.teachers, networks, strict=True)]
    k = base_images_per_class(case.ipc, len(teachers), case.classes)
    base = pictures(case.classes * k, case.size).view(case.classes, k, 3, *size)
    return teachers, base, PIXELS.normalise(pictures(case.tests, case.size)).to(measure.device()), k


def whole_ours(case: Case) -> dict[str, float]:
    """Seconds of synthesis, labels, and training with a test, ours."""
    teachers, base, tests, k = material(case)
    device, clock = measure.device(), Clock()
    settings = SynthesisSettings(iterations=case.iterations, lr=0.05, batch_size=case.classes)
    images = PIXELS.normalise(base).transpose(0, 1).contiguous().to(device)  # (k, C, 3, H, W)
    views = draw_views(0, 0, list(range(k)), iterations=case.iterations, jitter=settings.jitter)
    dense = torch.stack([Solver(t.network, settings=settings).solve(images, views).cpu() for t in teachers])
    clock.stop("synthesis")
    shape = (case.classes, k, 1 + len(teachers), case.classes)
    names = tuple(str(c) for c in range(case.classes))
    blank = DistilledSet(base, quantise(dense, PIXELS.std), torch.zeros(shape, dtype=torch.float16), PIXELS, names)
    logits = averaged_logits(teachers, lambda p: blank.instances(p).to(device), len(blank))
    distilled = replace(blank, logits=logits.half().cpu().view(shape))
    clock.stop("labels")
    resident = resident_distilled(distilled, soft=True).to(device)
    per_epoch = -(-len(distilled) // case.batch_size)
    augmentation, generator = Augmentation(4, True, "mixup"), torch.Generator().manual_seed(0)
    stream, make = feed("auto", resident, Sampling(case.batch_size, case.epochs * per_epoch, augmentation, generator))
    student = build(case.student, case.classes, (case.size, case.size), seed=0).to(device)
    schedule = Schedule("adamw", 1e-3, 0.01, 0.9, case.epochs * per_epoch, per_epoch)
    fit(student, Training(stream, soft_loss(TEMPERATURE), make), schedule)
    predict(student, lambda p: tests[p], len(tests))
    clock.stop("training")
    return clock.stages


def whole_published(case: Case) -> dict[str, float]:
    """Seconds of the same stages, the published way."""
    teachers, base, tests, k = material(case)
    device, clock = measure.device(), Clock()
    settings = SynthesisSettings(iterations=case.iterations, lr=0.05, batch_size=case.classes)
    images = PIXELS.normalise(base).transpose(0, 1).contiguous().to(device)
    views = draw_views(0, 0, list(range(k)), iterations=case.iterations, jitter=settings.jitter)
    instances = [images.cpu()]
    for teacher in teachers:
        solved = [published.solve(teacher.network, images[j], settings, views.lane(j)) for j in range(k)]
        instances.append((images + torch.stack(solved)[:, None]).cpu())
    clock.stop("synthesis")
    whole = torch.stack(instances, dim=2).transpose(0, 1).flatten(0, 2)  # (C * k * (M+1), 3, H, W), class by class
    labels = torch.arange(case.classes).repeat_interleave(len(whole) // case.classes)
    with tempfile.TemporaryDirectory() as folder:
        published.write_jpegs(PIXELS.to_bytes(whole), labels, Path(folder))
        logits = published.label(whole, [t.network for t in teachers], device)
        clock.stop("labels")
        loader = published.Loader(Path(folder), case.size, case.batch_size, *PIXELS, resized=False)
        student = build(case.student, case.classes, (case.size, case.size), seed=0).to(device)
        train = published.Trainer(student, TEMPERATURE)
        for _ in range(case.epochs):
            for batch, targets in loader.epoch(logits, device):
                train.step(batch, targets)
        published.label(tests, [student.eval()], device)
        loader.close()
    clock.stop("training")
    return clock.stages


if __name__ == "__main__":
    main()
