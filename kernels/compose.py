"""compose on CUDA: a training batch from stored bytes in one launch.

    pixel = clamp(base/255 + offset + scale * compensator, 0, 1)
    batch = (mix(flip(crop(pixel))) - mean) / std

One program makes some pixels of one channel of one image; see infer_fast.ops.compose for the arguments.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _pixels(
    base, base_index, values, scale, offset, compensator_index, shift, flip, item, channel, y, x, inside, height, width,
    COMPENSATED: tl.constexpr, SHIFTED: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """Pixels (y, x) of one channel of batch item `item` in [0,1], cropped and flipped, black outside the image."""
    if FLIPPED:
        x = tl.where(tl.load(flip + item) != 0, width - 1 - x, x)
    if SHIFTED:
        # Limited to the image's size first: a larger shift is black all the same, and can't overflow.
        dy = tl.load(shift + 2 * item)
        dx = tl.load(shift + 2 * item + 1)
        y = y + tl.minimum(tl.maximum(dy, -height), height).to(tl.int32)
        x = x + tl.minimum(tl.maximum(dx, -width), width).to(tl.int32)
        inside = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = y * width + x
    plane = height * width
    source = tl.load(base_index + item)
    pixel = tl.load(base + (source * 3 + channel) * plane + at, mask=inside, other=0).to(tl.float32) / 255.0
    if COMPENSATED:
        k = tl.load(compensator_index + item)
        added = inside & (k + at * 0 >= 0)
        known = tl.maximum(k, 0)
        step = tl.load(values + (known * 3 + channel) * plane + at, mask=added, other=0).to(tl.float32)
        dense = step * tl.load(scale + known * 3 + channel) + tl.load(offset + known * 3 + channel)
        pixel = tl.where(added, tl.minimum(tl.maximum(pixel + dense, 0.0), 1.0), pixel)
    return pixel


@triton.jit
def _compose(
    base, base_index, values, scale, offset, compensator_index, shift, flip, lam, partner, statistics, out, height,
    width, item_stride, channel_stride, row_stride, column_stride,
    COMPENSATED: tl.constexpr, SHIFTED: tl.constexpr, FLIPPED: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < height * width
    y = at // width
    x = at % width
    pixel = _pixels(
        base, base_index, values, scale, offset, compensator_index, shift, flip, item, channel, y, x, inside, height,
        width, COMPENSATED, SHIFTED, FLIPPED,
    )  # fmt: skip
    if MIXED:
        other = tl.load(partner + item)
        weight = tl.load(lam + item)
        second = _pixels(
            base, base_index, values, scale, offset, compensator_index, shift, flip, other, channel, y, x, inside,
            height, width, COMPENSATED, SHIFTED, FLIPPED,
        )  # fmt: skip
        pixel = weight * pixel + (1 - weight) * second
    normalised = (pixel - tl.load(statistics + channel)) / tl.load(statistics + 3 + channel)
    place = item * item_stride + channel * channel_stride + y * row_stride + x * column_stride
    tl.store(out + place, normalised.to(out.dtype.element_ty), mask=inside)


def compose(base, base_index, compensators, compensator_index, shift, flip, lam, partner, statistics, out) -> None:
    """Fills out (B, 3, H, W), of any layout; statistics float32 (2, 3) holds mean and std; None where not given."""
    height, width = base.shape[2:]
    values, scale, offset = compensators if compensators is not None else (base, statistics, statistics)
    grid = (len(base_index), 3, triton.cdiv(height * width, BLOCK))
    _compose[grid](
        base,
        base_index,
        values,
        scale,
        offset,
        base_index if compensator_index is None else compensator_index,
        base_index if shift is None else shift,
        base_index if flip is None else flip.view(torch.uint8),
        statistics if lam is None else lam,
        base_index if partner is None else partner,
        statistics,
        out,
        height,
        width,
        *out.stride(),
        COMPENSATED=compensators is not None,
        SHIFTED=shift is not None,
        FLIPPED=flip is not None,
        MIXED=lam is not None,
        BLOCK=BLOCK,
    )
