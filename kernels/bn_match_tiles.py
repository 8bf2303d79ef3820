"""The tiles of bn_match's passes: where their elements and bits lie, and what one element goes through.

A tile has rows `outer` and columns `inner` of a lane, whose elements lie in rows of I (bn_match_plan says how). In the
argument tables: L lanes, B images of a lane, C channels, P = H*W (a plane), I elements of a row; a vector is VECTOR
elements; a number is int32 unless said otherwise; names in capitals are known when a kernel is compiled.
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
def rows_of(across, lane, channels, inners, size, ROWS: tl.constexpr):
    """(start, stride): where the program's first row begins, and how far it is to the next, in vectors, int64.

    across, lane  numbers   the program's column of tiles (ROWS) or channel, and its lane
    channels      number    C
    inners, size  numbers   elements of a row and of a lane, in vectors
    ROWS          whether the layout is channels_last: all of a lane's rows are the program's, else one in C
    """
    start = lane.to(tl.int64) * size
    stride = inners.to(tl.int64)
    if not ROWS:
        start += across.to(tl.int64) * inners
        stride *= channels
    return start, stride


@triton.jit
def place_tile(start, stride, outer, inner, inners, size, VECTOR: tl.constexpr):
    """Offsets of a tile's elements, int64, and how many of each row exist, int32 (rows,): a multiple of VECTOR.

    start, stride  numbers, int64             as rows_of gives them
    outer, inner   int32 (rows,), (columns,)  the tile's rows and columns
    inners, size   numbers                    as rows_of's
    """
    row = outer.to(tl.int64) * stride
    room = tl.minimum(tl.maximum(size - row, 0), inners).to(tl.int32) * VECTOR
    return (start + row)[:, None] * VECTOR + inner[None, :], room


@triton.jit
def channels_of(across, channels, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The program's channels: a row (1, BLOCK), one for each column, for channels_last, else one number."""
    c = (across * BLOCK + tl.arange(0, BLOCK))[None, :] % channels if ROWS else across
    return c  # one return: Triton wants all of one type


@triton.jit
def load_parameters(
    weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, eps, c, WEIGHT: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """(mean, scale, shift) of channels c: z = (x - mean) * scale + shift, with scale = weight / sqrt(var + eps).

    *_ptr   pointers, float32 (C,)   as in _forward; weight and bias are read with WEIGHT and BIAS alone
    eps     number, float32
    c       as channels_of gives it
    """
    mean = tl.load(running_mean_ptr + c)
    scale = tl.rsqrt(tl.load(running_var_ptr + c) + eps)
    if WEIGHT:
        scale = scale * tl.load(weight_ptr + c)
    shift = tl.load(bias_ptr + c) if BIAS else mean * 0
    return mean, scale, shift


@triton.jit
def place_bits(across, lane, outer, side, channels, inners, size, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
               ROWS: tl.constexpr):  # fmt: skip
    """Where the bits of act'(z) of a tile lie, 8 elements to a byte: int64 (rows, BLOCK // 8).

    Each row (contiguous) or lane (channels_last) starts at a byte of its own.

    outer  int32 (rows,)   the tile's rows
    side   number          its first column, a multiple of 8
    the rest as rows_of's
    """
    if ROWS:
        stride = inners.to(tl.int64) * VECTOR // 8
        start = lane * tl.cdiv(size.to(tl.int64) * VECTOR, 8)
    else:
        width = tl.cdiv(inners * VECTOR, 8).to(tl.int64)
        stride = channels * width
        start = (lane * (size // inners) + across) * width
    return start + (outer * stride)[:, None] + (side // 8 + tl.arange(0, BLOCK // 8))[None, :]


@triton.jit
def store_bits(mask_ptr, place, z, room, inside, side, ACTIVATION: tl.constexpr):
    """Stores the bits of act'(z).

    mask_ptr   pointer, uint8 (mask_bytes,)
    place      int64 (rows, columns // 8)      as place_bits gives it
    z, inside  float32, bool (rows, columns)   the activation's input, and which elements exist
    room       int32 (rows,)                   how many elements of each row exist
    side       number                          the tile's first column
    """
    OUTER: tl.constexpr = z.shape[0]
    BYTES: tl.constexpr = z.shape[1] // 8
    flags = tl.where(inside, derivative(z, ACTIVATION), 0.0).to(tl.int32)
    packed = tl.sum(tl.reshape(flags, (OUTER, BYTES, 8)) << tl.arange(0, 8)[None, None, :], 2)
    first = side + 8 * tl.arange(0, BYTES)
    tl.store(mask_ptr + place, packed.to(tl.uint8), mask=first[None, :] < room[:, None])


@triton.jit
def load_bits(mask_ptr, place, room, side):
    """What store_bits stored: int32 (rows, columns) of 0 and 1; arguments as store_bits's."""
    OUTER: tl.constexpr = place.shape[0]
    BYTES: tl.constexpr = place.shape[1]
    first = side + 8 * tl.arange(0, BYTES)
    packed = tl.load(mask_ptr + place, mask=first[None, :] < room[:, None], other=0).to(tl.int32)
    return tl.reshape((packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (OUTER, BYTES * 8))
