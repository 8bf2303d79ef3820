"""scale_shift on CUDA: an eval-mode BatchNorm, the residual added to it and the activation after it in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from infer_fast.kernels.bn_match_tiles import activate

BLOCK, WARPS = 256, 4  # vectors and warps of one program: two accesses of 16 bytes a thread and tensor


@triton.jit(do_not_specialize=["channels", "size", "plane", "chunks"])
def _scale_shift(
    x_ptr, residual_ptr, scale_ptr, shift_ptr, y_ptr, channels, size, plane, chunks,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = act(x * scale + shift + residual) of one chunk of an image.

    Grid: chunks of an image times images.

    x_ptr         pointer, T (B, C, H, W)    the op's input, contiguous or (ROWS) channels_last
    residual_ptr  pointer, like x            read with RESIDUAL
    scale_ptr     pointer, float32 (C,)
    shift_ptr     pointer, float32 (C,)
    y_ptr         pointer, like x            out
    channels      number, int32              C
    size          number, int32              elements of an image, in vectors
    plane         number, int32              elements of a channel, H*W
    chunks        number, int32              of an image
    ACTIVATION    none, relu, relu6 or silu, as bn_match_tiles numbers them
    RESIDUAL      whether there is one
    ROWS          whether the layout is channels_last
    VECTOR        elements of a vector; images and pixels (ROWS) or channels are aligned to it
    BLOCK         vectors of one program, a power of two

    T: float32, bfloat16 or float16; all is computed in float32.
    """
    program = tl.program_id(0)
    at = program % chunks * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, VECTOR)[None, :]
    exists = (at < size)[:, None]
    place = ((program // chunks).to(tl.int64) * size + at)[:, None] * VECTOR + inner
    c = (at % (channels // VECTOR))[:, None] * VECTOR + inner if ROWS else (at // (plane // VECTOR))[:, None]
    z = tl.load(x_ptr + place, mask=exists, other=0.0).to(tl.float32)
    z = z * tl.load(scale_ptr + c, mask=exists, other=0.0) + tl.load(shift_ptr + c, mask=exists, other=0.0)
    if RESIDUAL:
        z += tl.load(residual_ptr + place, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, activate(z, ACTIVATION).to(y_ptr.dtype.element_ty), mask=exists)


def scale_shift(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None,
    activation: int,
    y: torch.Tensor,
) -> None:
    """Fills y from x and residual, (B, C, H, W), of one dense layout, and scale and shift, float32 (C,)."""
    images, channels, height, width = x.shape
    plane = height * width
    rows = not x.is_contiguous() or plane == 1  # single pixels are both
    vector = 16 // x.itemsize
    vector = vector if (channels if rows else plane) % vector == 0 else 1
    size = channels * plane // vector
    chunks = triton.cdiv(size, BLOCK)
    _scale_shift[(images * chunks,)](
        x, x if residual is None else residual, scale, shift, y, channels, size, plane, chunks,
        ACTIVATION=activation, RESIDUAL=residual is not None, ROWS=rows, VECTOR=vector, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
