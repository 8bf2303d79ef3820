"""The tiles of bn_match's passes: where their elements and bits lie, and what one element goes through.

A tile has rows `outer` and columns `inner`: pixels and channels where the tensor is channels_last (ROWS), else images
and the pixels of one channel. In the argument tables: L lanes, B images of a lane, C channels, P = H*W (a plane); a
number is int32 unless said otherwise; names in capitals are known when a kernel is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

# As infer_fast.ops.bn_match_operator numbers them.
NONE, RELU, RELU6, SILU = (tl.constexpr(position) for position in range(4))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) of float32 z of any shape; NaN stays NaN."""
    if ACTIVATION == RELU:
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == RELU6:
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == SILU:
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """act'(z), at the corners and for NaN as PyTorch has it: 0 where z is exactly 0 or 6, 1 for NaN."""
    if ACTIVATION == RELU:
        z = tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == RELU6:
        z = tl.where((z <= 0) | (z >= 6), 0.0, 1.0)
    elif ACTIVATION == SILU:
        s = 1 / (1 + tl.exp(-z))
        z = s * (1 + z * (1 - s))
    else:
        z = tl.full(z.shape, 1.0, tl.float32)
    return z


@triton.jit
def span(split, splits, count):
    """The split-th of `splits` equal runs of 0..count: (first, last)."""
    each = tl.cdiv(count, splits)
    first = split * each
    return first, tl.minimum(first + each, count)


@triton.jit
def place_tile(lane, outer, inner, images, channels, plane, channel, ROWS: tl.constexpr):
    """Offsets of a tile's elements from the start of the tensor, int64.

    lane, channel            numbers       the program's; channel counts blocks with ROWS, where it is not used
    outer, inner             int32 (rows,), (columns,)   the tile's rows and columns, within the lane
    images, channels, plane  numbers       B, C, P
    """
    if ROWS:
        return (lane.to(tl.int64) * images * plane + outer)[:, None] * channels + inner[None, :]
    return ((lane.to(tl.int64) * images + outer)[:, None] * channels + channel) * plane + inner[None, :]


@triton.jit
def channels_of(channel, channels, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The program's channels and which of them exist: a row (1, BLOCK) for channels_last, else one number."""
    if ROWS:
        c = channel * BLOCK + tl.arange(0, BLOCK)[None, :]
        known = c < channels
    else:
        c = channel
        known = channel < channels
    return c, known


@triton.jit
def load_parameters(
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, eps, c, known, WEIGHT: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """(mean, scale, shift) of channels c: z = (x - mean) * scale + shift, with scale = weight / sqrt(var + eps).

    *_ptr     pointers, float32 (C,)   as in _forward_kernel; weight and bias are read with WEIGHT and BIAS alone
    eps       number, float32
    c, known  as channels_of gives them
    """
    mean = tl.load(running_mean_ptr + c, mask=known, other=0.0)
    scale = tl.rsqrt(tl.load(running_var_ptr + c, mask=known, other=1.0) + eps)
    if WEIGHT:
        scale = scale * tl.load(weight_ptr + c, mask=known, other=0.0)
    shift = tl.load(bias_ptr + c, mask=known, other=0.0) if BIAS else mean * 0
    return mean, scale, shift


@triton.jit
def _lines(lane, outer, images, channels, plane, channel, ROWS: tl.constexpr):
    """Where the tile's pixels (ROWS) or planes stand among all of the tensor's, int64; arguments as place_tile's."""
    if ROWS:
        return lane.to(tl.int64) * images * plane + outer
    return (lane.to(tl.int64) * images + outer) * channels + channel


@triton.jit
def store_bits(
    mask_ptr, z, inside, lane, outer, last, side, images, channels, plane, channel, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The bits of act'(z), 8 elements to a byte; each plane (or channels_last pixel) starts at a byte of its own.

    mask_ptr   pointer, uint8 (mask_bytes,)
    z, inside  float32, bool (rows, columns)   the activation's input, and which elements exist
    last       number    the program's outer ones end here
    side       number    the tile's first column, a multiple of 8
    the rest   as place_tile's
    """
    OUTER: tl.constexpr = z.shape[0]
    BYTES: tl.constexpr = z.shape[1] // 8
    flags = tl.where(inside, derivative(z, ACTIVATION), 0.0).to(tl.int32)
    bits = tl.reshape(flags, (OUTER, BYTES, 8)) << tl.arange(0, 8)[None, None, :]
    packed = tl.sum(bits, 2)
    width = tl.cdiv(channels if ROWS else plane, 8)
    byte = side // 8 + tl.arange(0, BYTES)
    place = _lines(lane, outer, images, channels, plane, channel, ROWS)[:, None] * width + byte[None, :]
    tl.store(mask_ptr + place, packed.to(tl.uint8), mask=(outer < last)[:, None] & (byte < width)[None, :])


@triton.jit
def load_bits(mask_ptr, inside, lane, outer, inner, images, channels, plane, channel, ROWS: tl.constexpr):
    """What store_bits stored: int32 (rows, columns) of 0 and 1; arguments as store_bits's and place_tile's."""
    width = tl.cdiv(channels if ROWS else plane, 8)
    place = _lines(lane, outer, images, channels, plane, channel, ROWS)[:, None] * width + (inner // 8)[None, :]
    return (tl.load(mask_ptr + place, mask=inside, other=0).to(tl.int32) >> (inner % 8)[None, :]) & 1
