"""What the solver is given, looked at before the work; and what is to blame where a loss is not finite."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from infer_fast.errors import InferFastError
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis.views import Views

FAR = 1e4  # normalised pixels are within about 10, whatever the dataset


def check_teacher(teacher: nn.Module) -> None:
    """Raises InferFastError for what is no network in float32. No value is read."""
    kind = type(teacher).__name__
    if not isinstance(teacher, nn.Module):
        raise InferFastError(f"solve takes a teacher that is a torch.nn.Module, not {kind}.")
    for name, tensor in chain(teacher.named_parameters(), teacher.named_buffers()):
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise InferFastError(
                f"{kind}: {name} is {tensor.dtype}, solve takes float32 teachers: call float() on it (precision="
                "'bfloat16' makes its passes faster)."
            )


def check_tasks(base: torch.Tensor, views: Views | None, iterations: int, device: torch.device) -> None:
    """Raises InferFastError unless base is float32 (L, C, 3, H, W) on the teacher's device, none of them 0, and the
    views are those of L lanes over `iterations`."""
    if not isinstance(base, torch.Tensor) or base.dim() != 5 or base.shape[2] != 3 or base.dtype != torch.float32:
        given = f"{base.dtype} {tuple(base.shape)}" if isinstance(base, torch.Tensor) else type(base).__name__
        raise InferFastError(f"solve takes base as float32 (L, C, 3, H, W), not {given}.")
    if not base.numel():
        raise InferFastError(f"solve takes at least one task, image and pixel, not base {tuple(base.shape)}.")
    if base.device != device:
        raise InferFastError(f"base is on {base.device} and the teacher on {device}: bring both to one device.")
    lanes = (iterations, len(base))
    for name, shape in (("shift", (*lanes, 2)), ("crop", (*lanes, 4)), ("flip", lanes)):
        drawn = None if views is None else getattr(views, name)
        if drawn is not None and tuple(drawn.shape) != shape:
            raise InferFastError(f"views.{name} must be (T, L, ...) = {shape}, not {tuple(drawn.shape)}.")


def check_targets(targets: torch.Tensor, images: int) -> int:
    """How many outputs the targets need of a teacher: the largest class and one.

    Raises InferFastError unless they are int64 (images,), from 0.
    """
    if targets.dtype != torch.int64 or tuple(targets.shape) != (images,):
        raise InferFastError(
            f"targets must be int64 ({images},), one class for each image, not {targets.dtype} {tuple(targets.shape)}."
        )
    if int(targets.min()) < 0:
        raise InferFastError(f"targets holds class {int(targets.min())}: classes are counted from 0.")
    return int(targets.max()) + 1


def check_logits(logits: object, images: int, classes: int) -> torch.Tensor:
    """What a teacher gave for `images` images, if those are logits (images, at least `classes`). Reads shapes alone.

    Raises InferFastError for anything else.
    """
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != images:
        given = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise InferFastError(
            f"The teacher gives {given} for {images} images: one tensor of logits (images, classes) was expected."
        )
    check_outputs(logits.shape[1], classes)
    return logits


def check_outputs(outputs: int, classes: int) -> None:
    """Raises InferFastError for a teacher with fewer outputs than the tasks have classes."""
    if outputs < classes:
        raise InferFastError(
            f"The teacher has {outputs} outputs, and the images' classes are 0 to {classes - 1}: give one made "
            "for them, or the images' classes as targets."
        )


def blame(images: torch.Tensor, settings: SynthesisSettings, iteration: int) -> str:
    """Why the loss of a task, images (C, 3, H, W), was not finite first at `iteration`, and what to do about it.

    The teacher's own values are finite: MatchedTeacher.check has seen to that.
    """
    largest = images.abs().max().item()
    if not largest < float("inf"):
        return "its images hold NaN or infinity"
    if largest > FAR:
        return f"its images reach {largest:.3g}, which normalised pixels don't"
    if iteration == 0:
        knobs = ["--rho"] * bool(settings.steps) + ["--r-bn", "--r-var or --first-bn-multiplier"]
        return f"before the first step, so lower {', '.join(knobs)}, or take another teacher"
    return "lower --lr or --r-bn"
