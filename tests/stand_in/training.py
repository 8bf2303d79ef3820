"""fit() with its steps captured (infer_fast.models.engine.Replayed) gives what eager PyTorch gives on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch

from infer_fast.data.augment import Augmentation, Sampling
from infer_fast.data.pixels import Pixels
from infer_fast.data.resident import Composer, batches
from infer_fast.data.sets import ResidentSet
from infer_fast.models import build
from infer_fast.models.execution import Execution
from infer_fast.models.teacher import Teacher
from infer_fast.models.train import Schedule, Training, fit, hard_loss, soft_loss
from infer_fast.ops import Quantised
from infer_fast.students.labels import dynamic_labels
from tests.stand_in.emulation import emulated, value

CLASSES, BASES, COMPENSATORS, SIZE, BATCH, EPOCHS = 3, 11, 2, 16, 4, 6
UPDATES = EPOCHS * -(-BASES // BATCH)  # two whole batches and a short one of 3 for each epoch
ADAMW = Schedule("adamw", 1e-3, 0.01, 0.9, UPDATES, UPDATES // EPOCHS)
SGD = replace(ADAMW, optimizer="sgd", lr=0.05, weight_decay=5e-4)
PADDED = Augmentation(padding=2, flip=True)


def instances(*, soft: bool, compensated: bool) -> ResidentSet:
    dense = Quantised(
        torch.randint(0, 256, (COMPENSATORS, 3, SIZE, SIZE), dtype=torch.uint8),
        torch.rand(COMPENSATORS, 3).half() / 1000,
        torch.rand(COMPENSATORS, 3).half() / 10,
    )
    return ResidentSet(
        torch.randint(0, 256, (BASES, 3, SIZE, SIZE), dtype=torch.uint8),
        torch.arange(BASES),
        dense if compensated else None,
        torch.arange(BASES) % (COMPENSATORS + 1) - 1 if compensated else None,
        torch.randn(BASES, CLASSES) if soft else torch.randint(0, CLASSES, (BASES,)),
        CLASSES,
        Pixels((0.5,) * 3, (0.25,) * 3),
    )


def weights(
    resident: ResidentSet,
    network: torch.nn.Module,
    schedule: Schedule,
    augmentation: Augmentation,
    execution: Execution,
    teachers: list[Teacher],
) -> torch.Tensor:
    """All of a trained network's parameters and statistics, on its device."""
    sampling = Sampling(BATCH, schedule.updates, augmentation, torch.Generator().manual_seed(3))
    loss = soft_loss(4.0) if resident.soft else hard_loss
    label = dynamic_labels(teachers, execution.precision, (SIZE, SIZE)) if teachers else None
    training = Training(batches(resident, sampling), loss, Composer(resident, execution.forced_backend), label)
    fit(network, training, schedule, execution)
    return torch.cat([t.detach().float().flatten() for t in network.state_dict().values()])


def compare(
    schedule: Schedule, augmentation: Augmentation = PADDED, *, soft: bool = True, compensated: bool = True,
    dynamic: bool = False, name: str = "convnet",
) -> None:  # fmt: skip
    """A network trained by the engine and backend that auto chooses, and by neither."""
    resident, network = instances(soft=soft, compensated=compensated), build(name, CLASSES, (SIZE, SIZE), seed=1)
    teachers = [
        Teacher(n, build(n, CLASSES, (SIZE, SIZE), seed=2).eval(), 0.0, Path(), "")
        for n in (("convnet", "convnet-silu") if dynamic else ())
    ]
    plain = Execution("float32", "eager", "reference")
    start = torch.cat([t.detach().float().flatten() for t in network.state_dict().values()])
    want = weights(resident, copy.deepcopy(network), schedule, augmentation, plain, teachers)
    with emulated() as record:
        there = [replace(t, network=copy.deepcopy(t.network).cuda()) for t in teachers]
        device = torch.device("cuda")
        own = copy.deepcopy(network).cuda()
        got = value(weights(resident.to(device), own, schedule, augmentation, Execution("float32"), there))
    assert record.captured_launches["_compose"] == 2, "a graph for whole batches and one for short ones"
    difference = float((got - want).norm() / (want - start).norm())
    assert difference <= 1e-3, f"differs by {difference:.2g} of the way it went"


def check_adamw_with_mixup():
    compare(ADAMW, replace(PADDED, mix="mixup"))


def check_sgd_with_cutmix():
    compare(SGD, replace(PADDED, mix="cutmix"))


def check_sgd_on_real_images_with_warm_up():
    compare(replace(SGD, warm_up=2), soft=False, compensated=False)


def check_resized_crops_with_mixup():
    compare(ADAMW, Augmentation(flip=True, mix="mixup", resized=True))


def check_dynamic_labels():
    compare(ADAMW, replace(PADDED, mix="mixup"), dynamic=True)


def check_resnet18():
    compare(SGD, name="resnet18")
