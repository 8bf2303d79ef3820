"""view: one iteration's views of a task's images, in the form that a teacher takes, and their gradient.

    seen[l, i] = shift_l(flip_l(resize(crop_l(base[l, i] + added[l]))))

The draws of all iterations lie on the device, and a device counter says which iteration it is. A view is linear, so the
gradient of what is added is summed over a lane's images first, and goes back through the view of one.
"""

from __future__ import annotations

from typing import Any

import torch

from infer_fast.errors import InferFastError
from infer_fast.ops.backend import choose

# Elsewhere views are made of PyTorch's own operators: see infer_fast.synthesis.views.
DTYPES = {"native": (torch.float32,), "triton": (torch.float32,)}


@torch.library.custom_op("infer_fast::view", mutates_args=())
def _view(
    base: torch.Tensor,
    added: torch.Tensor | None,
    shift: torch.Tensor,
    crop: torch.Tensor | None,
    flip: torch.Tensor | None,
    counter: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    from infer_fast.kernels import view as kernels

    out = _empty_view(base, added, shift, crop, flip, counter, dtype)
    kernels.view(base, added, shift, crop, flip, counter, out)
    return out


@_view.register_fake
def _empty_view(
    base: torch.Tensor,
    added: torch.Tensor | None,
    shift: torch.Tensor,
    crop: torch.Tensor | None,
    flip: torch.Tensor | None,
    counter: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    lanes, images, *image = base.shape
    shape = (lanes * images, *image)
    return torch.empty(shape, dtype=dtype, device=base.device, memory_format=torch.channels_last)


@torch.library.custom_op("infer_fast::view_backward", mutates_args=())
def _view_backward(
    grad: torch.Tensor,
    shift: torch.Tensor,
    crop: torch.Tensor | None,
    flip: torch.Tensor | None,
    counter: torch.Tensor,
    sums: int,
) -> torch.Tensor:
    from infer_fast.kernels import view as kernels

    out = _empty_backward(grad, shift, crop, flip, counter, sums)
    if crop is None or flip is None:
        kernels.sum_back(grad, shift, counter, out)
        return out
    summed = torch.empty_like(out)
    kernels.sum_back(grad, None, counter, summed)
    kernels.uncropped(summed, shift, crop, flip, counter, out)
    return out


@_view_backward.register_fake
def _empty_backward(
    grad: torch.Tensor,
    shift: torch.Tensor,
    crop: torch.Tensor | None,
    flip: torch.Tensor | None,
    counter: torch.Tensor,
    sums: int,
) -> torch.Tensor:
    return torch.empty((sums, *grad.shape[1:]), dtype=torch.float32, device=grad.device)


class _View(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        added: torch.Tensor | None,
        shift: torch.Tensor,
        crop: torch.Tensor | None,
        flip: torch.Tensor | None,
        counter: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(shift, crop, flip, counter)
        ctx.shapes = base.shape, None if added is None else added.shape
        return _view(base, added, shift, crop, flip, counter, dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (lanes, images, *image), added = ctx.shapes
        grad = grad.contiguous(memory_format=torch.channels_last)
        sums = lanes if added is not None else lanes * images
        back = _view_backward(grad, *ctx.saved_tensors, sums)
        own = (None, back.view(added)) if added is not None else (back.view(lanes, images, *image), None)
        return *own, None, None, None, None, None


def serves(base: torch.Tensor, added: torch.Tensor | None, crop: torch.Tensor | None, backend: str | None) -> bool:
    """Whether view() can be called; a crop's gradient of images that nothing is added to is left to PyTorch.

    Raises InferFastError for a forced backend that can't serve.
    """
    return choose("view", base, backend, DTYPES) == "triton" and (crop is None or added is not None)


def view(
    base: torch.Tensor,
    added: torch.Tensor | None,
    shift: torch.Tensor,
    crop: torch.Tensor | None,
    flip: torch.Tensor | None,
    counter: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The views of iteration `counter` of base + added: (L*C, 3, H, W), channels_last, in `dtype`.

    base: float32 (L, C, 3, H, W); added: float32 (L, 1, 3, H, W), or None; shift: int64 (T, L, 2), circular, rows down
    and columns right; crop: int64 (T, L, 4), top, left, height and width, resized back bilinearly, and flip: bool
    (T, L), or None; counter: int64 (1,). Differentiable in `added`, and without it in `base`.
    Raises InferFastError for shapes that don't fit.
    """
    lanes, _, channels, *size = base.shape
    if channels != 3 or (added is not None and tuple(added.shape) != (lanes, 1, channels, *size)):
        shapes = tuple(base.shape), None if added is None else tuple(added.shape)
        raise InferFastError(f"view takes base (L, C, 3, H, W) and added (L, 1, 3, H, W), not {shapes}.")
    if shift.shape[1:] != (lanes, 2) or (crop is None) != (flip is None):
        raise InferFastError(f"view takes draws of {lanes} lanes, and flips with crops: shift is {tuple(shift.shape)}.")
    if not base[0].is_contiguous():
        base = base.contiguous()
    added = None if added is None else added.contiguous()
    return _View.apply(base, added, shift, crop, flip, counter, dtype)
