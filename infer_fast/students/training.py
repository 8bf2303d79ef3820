"""One student: trained on a candidate, measured along the way."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import nn

from infer_fast.data.augment import Sampling, augmentation_of
from infer_fast.data.fkd import replay
from infer_fast.data.loader import check_loader, choose_loader, feed
from infer_fast.data.sets import FileSet, ResidentSet
from infer_fast.keys import key_of, surroundings
from infer_fast.models import build
from infer_fast.models.execution import Execution
from infer_fast.models.train import Schedule, Training, accuracy, fit, hard_loss, predict, soft_loss
from infer_fast.progress import Stage
from infer_fast.settings import StudentSettings
from infer_fast.students.candidates import Candidate, Evaluation
from infer_fast.students.results import Measured, ResultStore

MEASUREMENTS = 5  # accuracies taken along a student's training, the last one at its end
SCHEDULES = {"cosineannealinglr": "cosine", "steplr": "step", "exponentiallr": "exponential"}
REPLAYED_BY = {"auto": None, "fused": None, "torch": "reference"}  # compose's backend for stored crops


def check_students(settings: StudentSettings, classes: int, size: tuple[int, int]) -> None:
    """Raises InferFastError for a network or a loader that can't be had here: before the work."""
    check_loader(settings.loader)
    with torch.device("meta"):
        for name in settings.networks:
            build(name, classes, size)


def measured_student(
    candidate: Candidate, evaluation: Evaluation, network: str, seed: int, results: ResultStore, running: Stage
) -> Measured:
    """How good a student got, from the store if it is there."""
    source = candidate.source(seed)
    key = student_key(candidate, source, evaluation, network, seed)
    result = results.get(key)
    if result is not None:
        running.advance(candidate.updates)
        return result
    _, along = train_student(candidate, source, evaluation, network, seed, running)
    result = Measured(len(source), along[-1][0], max(top1 for top1, _ in along), along[-1][1])
    results.put(key, result)
    return result


def train_student(
    candidate: Candidate,
    source: ResidentSet | FileSet,
    evaluation: Evaluation,
    name: str,
    seed: int,
    running: Stage,
) -> tuple[nn.Module, list[tuple[float, float]]]:
    """A trained student, and its top-1 and top-5 test accuracies in percent along the way, the last ones at its end."""
    settings, dataset, updates = evaluation.settings, evaluation.dataset, candidate.updates
    network = build(name, len(dataset.classes), dataset.size, seed=seed).to(dataset.device)
    moments = {-(-updates * part // MEASUREMENTS) for part in range(1, MEASUREMENTS + 1)}
    along = []

    def measure(done: int) -> None:
        running.advance()
        if done in moments:
            test = dataset.test
            logits = predict(network, lambda p: dataset.pixels.normalise(test.at(p)), len(test))
            along.append((accuracy(logits, test.labels), accuracy(logits, test.labels, top=5)))

    if candidate.replayed is not None:
        assert isinstance(source, ResidentSet)  # crops are stored for distilled sets alone
        stream, make = replay(candidate.replayed, source, updates, REPLAYED_BY[settings.loader])
    else:
        generator = torch.Generator().manual_seed(seed)
        sampling = Sampling(settings.batch_size, updates, augmentation_of(settings), generator)
        stream, make = feed(settings.loader, source, sampling, workers=settings.workers)
    loss = soft_loss(settings.temperature) if source.soft else hard_loss
    schedule = schedule_of(settings, updates, evaluation.updates_per_epoch)
    execution = Execution(settings.precision, settings.engine)
    fit(network, Training(stream, loss, make, candidate.label), schedule, execution, measure)
    return network, along


def schedule_of(settings: StudentSettings, updates: int, per_epoch: int) -> Schedule:
    """The optimiser and schedule that the settings ask for: a momentum asks for SGD."""
    chosen = settings.optimizer
    if chosen == "auto":
        chosen = "adamw" if settings.momentum is None else "sgd"
    kind = SCHEDULES[settings.lr_scheduler]
    return Schedule(
        chosen,
        settings.lr,
        settings.weight_decay,
        0.9 if settings.momentum is None else settings.momentum,
        updates,
        per_epoch,
        warm_up=settings.lr_warmup_epochs,
        warm_up_from=settings.lr_warmup_decay,
        warm_up_kind=settings.lr_warmup_method,
        kind="linear" if kind == "cosine" and not settings.cos else kind,
        step_size=settings.lr_step_size,
        gamma=settings.lr_gamma,
    )


def student_key(
    candidate: Candidate, source: ResidentSet | FileSet, evaluation: Evaluation, network: str, seed: int
) -> str:
    """All that a student's accuracy depends on, as a hash: what it learns from, how, and what it is measured on.

    Of the settings, epochs count by what they make: updates, and how many of them are an epoch of the schedule.
    """
    settings, dataset, tensors = evaluation.settings, evaluation.dataset, []
    if isinstance(source, ResidentSet):  # else the dataset's fingerprint says it all
        tensors = [source.base, source.base_index, source.targets, source.compensator_index]
        tensors += source.compensators or ()
    training = {k: v for k, v in asdict(settings).items() if k not in ("networks", "labels", "epochs")}
    parts = {
        "network": network,
        "training": training | {"loader": choose_loader(settings.loader, source)},
        "updates": candidate.updates,
        "updates per epoch": evaluation.updates_per_epoch,
        "seed": seed,
        "labels": candidate.labels,
        "teachers": candidate.teachers,
        "stored labels": None if candidate.replayed is None else candidate.replayed.name,
        "classes": source.classes,
        "normalisation": [source.pixels, dataset.pixels],
        "dataset": dataset.fingerprint,
        "surroundings": surroundings(dataset.device),
    }
    return key_of(parts, tensors)[:24]
