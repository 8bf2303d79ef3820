"""max_pool on CUDA: one launch forward, one backward, and one byte kept for each output.

Both work on pixels of C channels side by side: channels_last as it is, contiguous as B*C images of one channel. Forward
writes where in its window each maximum lies; backward has each input pixel look into the windows that contain it, so
that no two programs add to one place and the order of a sum is always the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 128, 4  # vectors and warps of one program: 16 bytes a thread
SIZES = ["channels", "height", "width", "rows", "columns", "chunks"]


class Window(NamedTuple):
    """A pooling window: sizes, steps and the padding above and to the left, each (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@triton.jit
def _pixels(channels, height, width, chunks, BLOCK: tl.constexpr):
    """(image, int64; row, column and channel, in vectors, int32; which exist) of this program's chunk, each (BLOCK,).

    channels       number   of a pixel, in vectors
    height, width  numbers  pixels of an image
    chunks         number   of an image
    """
    program = tl.program_id(0)
    at = program % chunks * BLOCK + tl.arange(0, BLOCK)
    pixel = at // channels
    return (program // chunks).to(tl.int64), pixel // width, pixel % width, at % channels, pixel < height * width


@triton.jit
def _elements(image, row, column, channel, channels, height, width, VECTOR: tl.constexpr):
    """Offsets of vectors' elements, int64 (BLOCK, VECTOR); arguments as _pixels gives them."""
    start = image * height * width * channels
    return (start + (row * width + column) * channels + channel)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit(do_not_specialize=SIZES)
def _pool(
    x_ptr, y_ptr, position_ptr, channels, height, width, rows, columns, chunks,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, STRIDE_DOWN: tl.constexpr, STRIDE_RIGHT: tl.constexpr,
    PADDING_TOP: tl.constexpr, PADDING_LEFT: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The maximum of each window, and where in the window it lies.

    Of equal values the first in row-major order, of NaNs the last, as torch's CUDA kernel has it. Grid: chunks of an
    image times images.

    x_ptr            pointer, T (B, H, W, C)           the op's input
    y_ptr            pointer, T (B, OH, OW, C)         out
    position_ptr     pointer, uint8 (B, OH, OW, C)     out: row times KERNEL_WIDTH plus column, padding counted
    channels         number, int32                     C, in vectors
    height, width    numbers, int32                    H, W
    rows, columns    numbers, int32                    OH, OW
    chunks           number, int32                     of an image's output
    KERNEL_*, STRIDE_*, PADDING_*                      the window
    VECTOR           elements of a vector; pixels are aligned to it
    BLOCK            vectors of one program, a power of two

    T: float32, bfloat16 or float16; values are compared in float32.
    """
    image, row, column, channel, exists = _pixels(channels, rows, columns, chunks, BLOCK)
    top, left = row * STRIDE_DOWN - PADDING_TOP, column * STRIDE_RIGHT - PADDING_LEFT
    best = tl.full((BLOCK, VECTOR), -float("inf"), tl.float32)
    first = tl.maximum(-top, 0) * KERNEL_WIDTH + tl.maximum(-left, 0)  # pixel of the image: stays where all are -inf
    position = first[:, None] + tl.zeros((BLOCK, VECTOR), tl.int32)
    for down in range(KERNEL_HEIGHT):
        for right in tl.static_range(KERNEL_WIDTH):
            h, w = top + down, left + right
            inside = exists & (h >= 0) & (h < height) & (w >= 0) & (w < width)
            place = _elements(image, h, w, channel, channels, height, width, VECTOR)
            value = tl.load(x_ptr + place, mask=inside[:, None], other=-float("inf")).to(tl.float32)
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            position = tl.where(better, down * KERNEL_WIDTH + right, position)
    place = _elements(image, row, column, channel, channels, rows, columns, VECTOR)
    tl.store(y_ptr + place, best.to(y_ptr.dtype.element_ty), mask=exists[:, None])
    tl.store(position_ptr + place, position.to(tl.uint8), mask=exists[:, None])


@triton.jit(do_not_specialize=SIZES)
def _unpool(
    grad_y_ptr, position_ptr, grad_x_ptr, channels, height, width, rows, columns, chunks,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, STRIDE_DOWN: tl.constexpr, STRIDE_RIGHT: tl.constexpr,
    PADDING_TOP: tl.constexpr, PADDING_LEFT: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each input pixel's gradient: the sum over the windows that chose it, in float32 and in row-major order.

    Arguments and types as _pool's, but for these. Grid: chunks of an image times images.

    grad_y_ptr    pointer, T (B, OH, OW, C)
    position_ptr  pointer, uint8 (B, OH, OW, C)   as _pool writes it
    grad_x_ptr    pointer, T (B, H, W, C)         out
    chunks        number, int32                   of an image's input
    """
    DOWN: tl.constexpr = (KERNEL_HEIGHT + STRIDE_DOWN - 1) // STRIDE_DOWN  # the most windows that one pixel is in
    RIGHT: tl.constexpr = (KERNEL_WIDTH + STRIDE_RIGHT - 1) // STRIDE_RIGHT
    image, h, w, channel, exists = _pixels(channels, height, width, chunks, BLOCK)
    first_row = (h + PADDING_TOP) // STRIDE_DOWN - (DOWN - 1)
    first_column = (w + PADDING_LEFT) // STRIDE_RIGHT - (RIGHT - 1)
    total = tl.zeros((BLOCK, VECTOR), tl.float32)
    for down in range(DOWN):
        for right in tl.static_range(RIGHT):
            row, column = first_row + down, first_column + right
            inner_row, inner_column = h + PADDING_TOP - row * STRIDE_DOWN, w + PADDING_LEFT - column * STRIDE_RIGHT
            inside = exists & (row >= 0) & (row < rows) & (inner_row < KERNEL_HEIGHT)
            inside = inside & (column >= 0) & (column < columns) & (inner_column < KERNEL_WIDTH)
            place = _elements(image, row, column, channel, channels, rows, columns, VECTOR)
            position = tl.load(position_ptr + place, mask=inside[:, None], other=255).to(tl.int32)
            gradient = tl.load(grad_y_ptr + place, mask=inside[:, None], other=0.0).to(tl.float32)
            own = (inner_row * KERNEL_WIDTH + inner_column)[:, None]
            total += tl.where(inside[:, None] & (position == own), gradient, 0.0)
    place = _elements(image, h, w, channel, channels, height, width, VECTOR)
    tl.store(grad_x_ptr + place, total.to(grad_x_ptr.dtype.element_ty), mask=exists[:, None])


def forward(x: torch.Tensor, window: Window, channels_last: bool, outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Fills outputs = (y, position uint8), (B, C, OH, OW), from x (B, C, H, W), all of the layout that is named."""
    y, position = outputs
    _launch(_pool, (x, y, position), (x, y, y), window, channels_last)


def backward(
    grad_y: torch.Tensor, position: torch.Tensor, window: Window, channels_last: bool, grad_x: torch.Tensor
) -> None:
    """Fills grad_x (B, C, H, W) from grad_y and position (B, C, OH, OW), all of the layout that is named."""
    _launch(_unpool, (grad_y, position, grad_x), (grad_x, grad_y, grad_x), window, channels_last)


def _launch(
    kernel: triton.runtime.JITFunction,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    like: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    window: Window,
    channels_last: bool,
) -> None:
    """like: tensors of the shapes of the input, of the output, and of what the programs are cut from."""
    inner, outer, cut = like
    images, channels = inner.shape[:2]
    if not channels_last:
        images, channels = images * channels, 1
    vector = 16 // inner.itemsize
    vector = vector if channels % vector == 0 else 1
    chunks = triton.cdiv(cut.shape[2] * cut.shape[3] * (channels // vector), BLOCK)
    (kernel_height, kernel_width), (down, right), (top, left) = window
    kernel[(images * chunks,)](
        *tensors, channels // vector, *inner.shape[2:], *outer.shape[2:], chunks,
        KERNEL_HEIGHT=kernel_height, KERNEL_WIDTH=kernel_width, STRIDE_DOWN=down, STRIDE_RIGHT=right,
        PADDING_TOP=top, PADDING_LEFT=left, VECTOR=vector, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
