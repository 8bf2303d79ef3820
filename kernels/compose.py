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
    base_ptr, base_index_ptr, values_ptr, scale_ptr, offset_ptr, compensator_index_ptr, shift_ptr, flip_ptr, item,
    channel, y, x, inside, height, width,
    COMPENSATED: tl.constexpr, SHIFTED: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """Pixels (y, x) of one channel of batch item `item` in [0,1], cropped and flipped, black outside the image.

    the pointers, height, width, flags   as _compose's
    item           number, int64         position in the batch
    channel        number                0..2
    y, x, inside   int32, int32, bool (BLOCK,)   the output's pixels, and which of them exist
    """
    if FLIPPED:
        x = tl.where(tl.load(flip_ptr + item) != 0, width - 1 - x, x)
    if SHIFTED:
        # Limited to the image's size first: a larger shift is black all the same, and can't overflow.
        dy = tl.load(shift_ptr + 2 * item)
        dx = tl.load(shift_ptr + 2 * item + 1)
        y = y + tl.minimum(tl.maximum(dy, -height), height).to(tl.int32)
        x = x + tl.minimum(tl.maximum(dx, -width), width).to(tl.int32)
        inside = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = y * width + x
    plane = height * width
    source = tl.load(base_index_ptr + item)
    pixel = tl.load(base_ptr + (source * 3 + channel) * plane + at, mask=inside, other=0).to(tl.float32) / 255.0
    if COMPENSATED:
        k = tl.load(compensator_index_ptr + item)
        added = inside & (k + at * 0 >= 0)
        known = tl.maximum(k, 0)
        step = tl.load(values_ptr + (known * 3 + channel) * plane + at, mask=added, other=0).to(tl.float32)
        dense = step * tl.load(scale_ptr + known * 3 + channel) + tl.load(offset_ptr + known * 3 + channel)
        pixel = tl.where(added, tl.minimum(tl.maximum(pixel + dense, 0.0), 1.0), pixel)
    return pixel


@triton.jit
def _compose(
    base_ptr, base_index_ptr, values_ptr, scale_ptr, offset_ptr, compensator_index_ptr, shift_ptr, flip_ptr, lam_ptr,
    partner_ptr, statistics_ptr, out_ptr, height, width, item_stride, channel_stride, row_stride, column_stride,
    COMPENSATED: tl.constexpr, SHIFTED: tl.constexpr, FLIPPED: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some pixels of one channel of one image of the batch.

        pixel = clamp(base/255 + offset + scale * value, 0, 1),  out = (mix(flip(crop(pixel))) - mean) / std

    (INFER's instances, arXiv 2408.06927; mix is MixUp, arXiv 1710.09412.) Grid: (B; 3; blocks of pixels).

    base_ptr               pointer, uint8 (N, 3, H, W)   stored images
    base_index_ptr         pointer, int64 (B,)           the image of each item
    values_ptr             pointer, uint8 (K, 3, H, W)   compensators, read with COMPENSATED as the next three are
    scale_ptr, offset_ptr  pointers, float32 (K, 3)
    compensator_index_ptr  pointer, int64 (B,)           the compensator of each item, -1 for none
    shift_ptr              pointer, int64 (B, 2)         rows and columns of the crop, read with SHIFTED
    flip_ptr               pointer, uint8 (B,)           whether to mirror left and right, read with FLIPPED
    lam_ptr                pointer, float32 (B,)         weight of the item itself, read with MIXED
    partner_ptr            pointer, int64 (B,)           the item it is mixed with, read with MIXED
    statistics_ptr         pointer, float32 (2, 3)       mean, then std
    out_ptr                pointer, float32, bfloat16 or float16 (B, 3, H, W)   out, of any strides
    height, width          numbers                       H, W
    *_stride               numbers                       out's, in elements
    BLOCK                  pixels of one program
    """
    item = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < height * width
    y = at // width
    x = at % width
    pixel = _pixels(
        base_ptr, base_index_ptr, values_ptr, scale_ptr, offset_ptr, compensator_index_ptr, shift_ptr, flip_ptr, item,
        channel, y, x, inside, height, width, COMPENSATED, SHIFTED, FLIPPED,
    )  # fmt: skip
    if MIXED:
        other = tl.load(partner_ptr + item)
        weight = tl.load(lam_ptr + item)
        second = _pixels(
            base_ptr, base_index_ptr, values_ptr, scale_ptr, offset_ptr, compensator_index_ptr, shift_ptr, flip_ptr,
            other, channel, y, x, inside, height, width, COMPENSATED, SHIFTED, FLIPPED,
        )  # fmt: skip
        pixel = weight * pixel + (1 - weight) * second
    normalised = (pixel - tl.load(statistics_ptr + channel)) / tl.load(statistics_ptr + 3 + channel)
    place = item * item_stride + channel * channel_stride + y * row_stride + x * column_stride
    tl.store(out_ptr + place, normalised.to(out_ptr.dtype.element_ty), mask=inside)


def compose(
    base: torch.Tensor,
    base_index: torch.Tensor,
    compensators: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    compensator_index: torch.Tensor | None,
    shift: torch.Tensor | None,
    flip: torch.Tensor | None,
    lam: torch.Tensor | None,
    partner: torch.Tensor | None,
    statistics: torch.Tensor,
    out: torch.Tensor,
) -> None:
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
