"""Training a network on batches that are already on the device, and measuring it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from infer_fast.errors import InferFastError
from infer_fast.models.copies import in_layout
from infer_fast.models.engine import Replayed
from infer_fast.models.execution import AUTO, Execution, at_precision
from infer_fast.models.layout import layout_of
from infer_fast.models.weights import faulty


@dataclass(frozen=True)
class Schedule:
    """The optimiser and its schedule: `updates` steps, the rate changed once per `updates_per_epoch`.

    kind: cosine or linear (to 0), step (times gamma every step_size epochs) or exponential (times gamma every epoch).
    warm_up: epochs before that, in which the rate rises linearly from warm_up_from times lr to lr, or stays there
    (warm_up_kind constant).
    """

    optimizer: str
    lr: float
    weight_decay: float
    momentum: float
    updates: int
    updates_per_epoch: int
    warm_up: int = 0
    warm_up_from: float = 0.01
    warm_up_kind: str = "linear"
    kind: str = "cosine"
    step_size: int = 30
    gamma: float = 0.1

    def rate(self, epoch: int) -> float:
        """The learning rate of `epoch`, counted from 0."""
        if epoch < self.warm_up:
            risen = epoch / self.warm_up if self.warm_up_kind == "linear" else 0.0
            return self.lr * (self.warm_up_from + (1 - self.warm_up_from) * risen)
        after = epoch - self.warm_up
        if self.kind == "step":
            return self.lr * self.gamma ** (after // self.step_size)
        if self.kind == "exponential":
            return self.lr * self.gamma**after
        epochs = max(1, -(-self.updates // self.updates_per_epoch) - self.warm_up)
        if self.kind == "linear":
            return self.lr * (1 - after / epochs)
        return self.lr * (1 + math.cos(math.pi * after / epochs)) / 2


def soft_loss(temperature: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """KL(softmax(target/T) || softmax(logits/T)), batch mean, without the factor T^2 (SRe2L, arXiv 2306.13092)."""

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        log_student = F.log_softmax(logits / temperature, dim=1)
        log_teacher = F.log_softmax(targets / temperature, dim=1)
        return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)

    return loss


def hard_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against class probabilities (B, C), batch mean."""
    return F.cross_entropy(logits, targets)


def as_given(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The batches are whole already."""
    return images, targets


@dataclass(frozen=True)
class Training:
    """What a network is trained on.

    batches: tuples of device tensors (or None) of which make(*batch) makes images (B, 3, H, W) and targets (B, C), as
    part of the step; loss: of logits and targets; label(images), if given, makes the targets instead: dynamic soft
    labels.
    """

    batches: Iterable[tuple]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    make: Callable[..., tuple[torch.Tensor, torch.Tensor]] = as_given
    label: Callable[[torch.Tensor], torch.Tensor] | None = None


def fit(
    network: nn.Module,
    training: Training,
    schedule: Schedule,
    execution: Execution = AUTO,
    on_update: Callable[[int], None] | None = None,
) -> nn.Module:
    """Trains `network` in place and leaves it in eval mode, weights float32, in the layout that suits it.

    A batch of one image is left out, where it is an epoch's last, of a network whose BatchNorm can't take it (see
    takes_one): one shuffled image an epoch, as with drop_last elsewhere. on_update(done) is called after every update.
    Nothing waits for the device between updates.
    Raises InferFastError when the weights became NaN or infinite, or when every batch is one image that BatchNorm can't
    take.
    """
    network.train()
    layout = torch.contiguous_format  # until there are images to tell it by
    device = next(network.parameters()).device
    how = execution.on(device)
    optimizer = _optimizer(network, schedule, captured=how.engine.startswith("graph"))
    if how.engine in ("compile", "graph-compile"):
        network.compile()

    def step(*batch: torch.Tensor | None) -> None:
        images, targets = training.make(*batch)
        images = images.contiguous(memory_format=layout)
        if training.label is not None:
            targets = training.label(images)
        optimizer.zero_grad(set_to_none=True)
        with at_precision(device, how.precision):
            logits = network(images)
        training.loss(logits.float(), targets).backward()
        optimizer.step()

    run = Replayed(step, any_engine=how.any_engine) if how.engine.startswith("graph") else step
    learns_of_one: bool | None = None  # not known before there is such a batch
    for done, batch in enumerate(training.batches, start=1):
        if done == 1:
            layout = layout_of(network, training.make(*batch)[0])
            in_layout(network, layout)
        if (done - 1) % schedule.updates_per_epoch == 0:
            _set_rate(optimizer, schedule.rate((done - 1) // schedule.updates_per_epoch))
        if len(batch[0]) == 1 and learns_of_one is None:
            learns_of_one = _learns_of_one(network, training, batch, done)
        if len(batch[0]) > 1 or learns_of_one:
            run(*batch)
        if on_update is not None:
            on_update(done)
            if not network.training:
                network.train()
    fault = faulty(network.state_dict())
    if fault is not None:
        raise InferFastError(
            f"Training of {type(network).__name__} diverged ({fault}): {_blame(training, batch, schedule)}."
        )
    network.eval()  # as a statement: not everybody's train() returns the network
    return network


def takes_one(network: nn.Module, images: torch.Tensor) -> bool:
    """Whether `network` can be trained on a batch of one of `images` (B, 3, H, W).

    BatchNorm can't where it sees 1x1 pixels of one image: one value has no variance. The pass is made on the meta
    device, so nothing is computed and the network stays as it is.
    """
    imagined = copy.deepcopy(network).to("meta").train()
    try:
        with torch.no_grad():
            imagined(torch.empty(1, *images.shape[1:], device="meta"))
    except Exception as error:  # of any other kind: the training itself will meet it, and say it better
        return "more than 1 value per channel" not in str(error)
    return True


def _learns_of_one(network: nn.Module, training: Training, batch: tuple, done: int) -> bool:
    """Whether a batch of one image can be trained on. Raises InferFastError where it can't and is the first of all: the
    first batch is never the shortest."""
    images, _ = training.make(*batch)
    one = takes_one(network, images)
    if not one and done == 1:
        raise InferFastError(
            f"{type(network).__name__} normalises over the images of a batch, and here a batch is one image: raise the "
            "batch size to 2 or more."
        )
    return one


def _blame(training: Training, batch: tuple, schedule: Schedule) -> str:
    """What made a training diverge, by its last batch, and what to do about it."""
    images, targets = training.make(*batch)
    if training.label is not None:
        targets = training.label(images)
    if not images.isfinite().all():
        return "its images hold NaN or infinity"
    if not targets.isfinite().all():
        return "its labels hold NaN or infinity, so look at the teachers"
    return f"lower its learning rate (now {schedule.lr:g}) or its weight decay (now {schedule.weight_decay:g})"


@torch.no_grad()
def predict(
    network: nn.Module, images: Callable[[torch.Tensor], torch.Tensor], count: int, batch_size: int = 512
) -> torch.Tensor:
    """Logits float32 (count, C) of eval-mode `network` on images(positions) for positions 0..count-1, in batches.

    In float32, whatever precision it was trained in: labels and accuracies are read off them.
    """
    network.eval()
    logits, layout = [], None
    for positions in torch.arange(count).split(batch_size):
        batch = images(positions)
        layout = layout or layout_of(network, batch)
        batch = batch.contiguous(memory_format=layout)
        with at_precision(batch.device, "float32"):
            logits.append(network(batch).float())
    return torch.cat(logits)


def features(network: nn.Module, images: Callable[[torch.Tensor], torch.Tensor], count: int) -> torch.Tensor:
    """What the last linear layer of `network` is given for images(positions), positions 0..count-1: float32 (count, D).

    On the CPU. Raises InferFastError for a network without a linear layer.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InferFastError(f"{type(network).__name__} has no linear layer, whose input would be its features.")
    seen: list[torch.Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float().cpu()))
    try:
        predict(network, images, count)
    finally:
        handle.remove()
    return torch.cat(seen)[-count:].flatten(1)  # the first ones are those that the layout was chosen by


def accuracy(logits: torch.Tensor, labels: torch.Tensor, top: int = 1) -> float:
    """Top-k accuracy in percent (100 where there are no more than k classes)."""
    best = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return 100 * (best == labels.view(-1, 1)).any(dim=1).double().mean().item()


def _optimizer(network: nn.Module, schedule: Schedule, *, captured: bool) -> torch.optim.Optimizer:
    """captured: the learning rate is a device tensor, so that a CUDA graph reads this epoch's."""
    device = next(network.parameters()).device
    lr = torch.tensor(schedule.lr, device=device) if captured else schedule.lr
    params, decay = network.parameters(), schedule.weight_decay
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=decay, fused=True, capturable=captured)
    return torch.optim.SGD(params, lr=lr, momentum=schedule.momentum, weight_decay=decay, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
