"""max_pool: torch's max_pool2d, which keeps a byte for each output where torch keeps an int64 index.

    y[o] = max of x over o's window;  grad_x[i] = sum of grad_y[o] over the windows o whose maximum is x[i]

Of equal values the first in row-major order is the maximum; NaN is more than any number, and of NaNs the last counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from infer_fast.ops.backend import choose
from infer_fast.ops.bn_match_operator import dense_format, is_channels_last

LARGEST = 15  # rows and columns of a window: its places fit a byte
# Natively it is PyTorch too.
DTYPES = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
Pair = tuple[int, int]


def reference(x: torch.Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool = False) -> torch.Tensor:
    """PyTorch's own, differentiable, any floating dtype. Arguments as max_pool's."""
    return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)


@torch.library.custom_op(
    "infer_fast::max_pool",
    mutates_args=(),
    schema="(Tensor x, int[] kernel, int[] stride, int[] padding, bool ceil_mode) -> (Tensor, Tensor)",
)
def _forward(
    x: torch.Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, each maximum's position in its window, uint8), of x's layout: the triton backend; x dense."""
    from infer_fast.kernels import max_pool as kernels

    outputs = _empty_outputs(x, kernel, stride, padding, ceil_mode)
    kernels.forward(x, _window(kernel, stride, padding), is_channels_last(x), outputs)
    return outputs


@_forward.register_fake
def _empty_outputs(
    x: torch.Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    sides = zip(x.shape[2:], kernel, stride, padding, strict=True)
    size = (*x.shape[:2], *(_pooled_side(*side, ceil_mode) for side in sides))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=dense_format(x))
    return y, torch.empty_like(y, dtype=torch.uint8)


def _pooled_side(side: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Windows along one side, as torch.nn.MaxPool2d counts them: with ceil_mode none begins beyond the image."""
    pooled = (side + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    return pooled - 1 if ceil_mode and (pooled - 1) * stride >= side + padding else pooled


@torch.library.custom_op(
    "infer_fast::max_pool_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor position, int[] kernel, int[] stride, int[] padding, SymInt height, SymInt width, "
    "bool channels_last) -> Tensor",
)
def _backward(
    grad_y: torch.Tensor,
    position: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    height: int,
    width: int,
    channels_last: bool,
) -> torch.Tensor:
    """The gradient of x (B, C, height, width), whose layout is named: one pixel alone would not tell."""
    from infer_fast.kernels import max_pool as kernels

    grad_x = _empty_gradient(grad_y, position, kernel, stride, padding, height, width, channels_last)
    grad_y = grad_y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    kernels.backward(grad_y, position, _window(kernel, stride, padding), channels_last, grad_x)
    return grad_x


@_backward.register_fake
def _empty_gradient(
    grad_y: torch.Tensor,
    position: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    height: int,
    width: int,
    channels_last: bool,
) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size = (*grad_y.shape[:2], height, width)
    return torch.empty(size, dtype=grad_y.dtype, device=grad_y.device, memory_format=layout)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, kernel, stride, padding, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.rest = kernel, stride, padding, *x.shape[2:], is_channels_last(x)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_y: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    return None if grad_y is None else _backward(grad_y, *ctx.saved_tensors, *ctx.rest), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def _window(kernel: list[int], stride: list[int], padding: list[int]) -> Any:
    """The three as pairs, as the kernels take them."""
    from infer_fast.kernels.max_pool import Window

    return Window(*((int(down), int(right)) for down, right in (kernel, stride, padding)))


def _served(x: torch.Tensor, kernel: Pair, padding: Pair) -> bool:
    """Whether the kernels take it; torch's own takes the rest, or says what is wrong with it."""
    if x.dim() != 4 or x.numel() == 0 or max(kernel) > LARGEST:
        return False
    sides = zip(x.shape[2:], kernel, padding, strict=True)
    return all(2 * padded <= size <= side + 2 * padded for side, size, padded in sides)


def max_pool(
    x: torch.Tensor, kernel: Pair, stride: Pair, padding: Pair, *, ceil_mode: bool = False, backend: str | None = None
) -> torch.Tensor:
    """torch.nn.functional.max_pool2d of x (B, C, H, W), with a gradient for x that sums in float32, in a fixed order.

    kernel, stride, padding: (vertical, horizontal), with at most half a kernel of padding; ceil_mode as torch has it.
    The result has x's dtype and layout. Windows of more than 15 rows or columns, other dimensions and empty tensors
    take torch's own. Raises InferFastError for a forced backend that can't serve.
    """
    chosen = choose("max_pool", x, backend, DTYPES)
    if chosen != "triton" or not _served(x, kernel, padding):
        return reference(x, kernel, stride, padding, ceil_mode)
    y, _ = _forward(x.contiguous(memory_format=dense_format(x)), [*kernel], [*stride], [*padding], ceil_mode)
    return y
