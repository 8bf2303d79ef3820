"""Training a network on batches that are already on the device, and measuring it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from infer_fast.errors import InferFastError

PRECISIONS = ("auto", "float32", "tf32", "bfloat16")


def choose_precision(device: torch.device, precision: str) -> str:
    """What `precision` means on `device`: auto is bfloat16 on CUDA and float32 elsewhere.

    Raises InferFastError for an unknown precision, or TF32 where no tensor core rounds to it.
    """
    if precision not in PRECISIONS:
        raise InferFastError(f"{precision!r} is not a precision: choose one of {', '.join(PRECISIONS)}.")
    if precision == "tf32" and device.type != "cuda":
        raise InferFastError(f"tf32 is a mode of CUDA devices, this run is on {device.type}: choose float32.")
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return precision


@contextmanager
def at_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Passes inside it run in float32, in tf32 (convolutions and matrix products), or in bfloat16 autocast."""
    chosen = choose_precision(device, precision)
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [f.allow_tf32 for f in flags]
    for f in flags:
        f.allow_tf32 = chosen == "tf32"
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=chosen == "bfloat16"):
            yield
    finally:
        for f, value in zip(flags, before, strict=True):
            f.allow_tf32 = value


@dataclass(frozen=True)
class Schedule:
    """The optimiser and its schedule: `updates` steps, cosine to 0, stepped once per `updates_per_epoch`."""

    optimizer: str
    lr: float
    weight_decay: float
    momentum: float
    updates: int
    updates_per_epoch: int


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


def fit(
    network: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    schedule: Schedule,
    *,
    precision: str = "auto",
    on_update: Callable[[int], None] | None = None,
) -> nn.Module:
    """Trains `network` in place on (images, targets) and leaves it in eval mode, weights float32 and channels_last.

    precision: of the forward and backward pass, auto is bfloat16 on CUDA and float32 elsewhere.
    on_update(done) is called after every update. Raises InferFastError when the weights became NaN or infinite.
    """
    network.to(memory_format=torch.channels_last)
    device = next(network.parameters()).device
    optimizer = _optimizer(network, schedule)
    epochs = max(1, -(-schedule.updates // schedule.updates_per_epoch))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    network.train()
    for done, (images, targets) in enumerate(batches, start=1):
        optimizer.zero_grad(set_to_none=True)
        with at_precision(device, precision):
            logits = network(images.contiguous(memory_format=torch.channels_last))
        loss(logits.float(), targets).backward()
        optimizer.step()
        if done % schedule.updates_per_epoch == 0:
            cosine.step()
        if on_update is not None:
            network.eval()
            on_update(done)
            network.train()
    if not all(p.isfinite().all() for p in network.parameters()):
        raise InferFastError(
            f"Training of {type(network).__name__} diverged (weights are NaN or infinite): lower its learning rate "
            f"(now {schedule.lr})."
        )
    return network.eval()


@torch.no_grad()
def predict(
    network: nn.Module, images: Callable[[torch.Tensor], torch.Tensor], count: int, batch_size: int = 512
) -> torch.Tensor:
    """Logits float32 (count, C) of eval-mode `network` on images(positions) for positions 0..count-1, in batches."""
    network.eval()
    logits = []
    for positions in torch.arange(count).split(batch_size):
        batch = images(positions).contiguous(memory_format=torch.channels_last)
        logits.append(network(batch).float())
    return torch.cat(logits)


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy in percent."""
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def _optimizer(network: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)
    return torch.optim.SGD(
        network.parameters(),
        lr=schedule.lr,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
        fused=True,
    )
