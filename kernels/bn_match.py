"""bn_match on CUDA: eval-mode BatchNorm, residual, activation and the statistics penalty.

Forward reads x once: each program takes one channel (or a block of channels, channels_last) of some images of one lane,
writes y and its partial sums of d = x - running_mean and d*d; a second, tiny kernel (two, if they are many) adds them
up to

    mean - running_mean = sum(d)/n,   var = sum(d*d)/n - (sum(d)/n)^2,
    penalty = r_var * ||var - running_var||_2 + ||mean - running_mean||_2.

Backward turns the statistics into two numbers per lane and channel (tiny kernel), then makes one pass:

    dx = act'(z) * dy * scale + a + b * d

See infer_fast.ops.bn_match for the sources of the formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NONE, RELU, RELU6, SILU = 0, 1, 2, 3  # positions in infer_fast.ops.bn_match.ACTIVATIONS
CONFIGS = ((1024, 4), (2048, 4), (4096, 8))  # (elements a program holds at a time, warps) to choose from
PROGRAM_ELEMENTS = (2048, 16384)  # least and most that a program goes through: enough programs, few partial sums
PROGRAMS = 1024  # programs to aim for between those: several for each multiprocessor
MOST_SPLITS = 1024
SPLITS, CHANNELS = 128, 64  # the tile in which partial sums are added up
MOST_WHOLE = 32768  # sums of a lane, at most, that one program adds up


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was imported (kernels then run in Python, on the CPU)."""
    return not isinstance(_finish, triton.runtime.JITFunction)


def _bench(function, quantiles):
    return triton.testing.do_bench(function, warmup=2, rep=10, quantiles=quantiles)


def _autotuned(function):
    """Tuned over CONFIGS once for each layout, block and dtype, and each `bucket`, the tensor's size in powers of four.

    Lanes, layers, activations and residuals share what was found: a network is tuned a handful of times, not per layer.
    """
    configs = [triton.Config({"TILE": tile}, num_warps=warps) for tile, warps in CONFIGS]
    return triton.autotune(configs, key=["bucket", "BLOCK", "ROWS"], do_bench=_bench)(triton.jit(function))


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        z = tl.where(z < 0, 0.0, z)  # NaN stays
    elif ACTIVATION == 2:
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == 3:
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def _derivative(z, ACTIVATION: tl.constexpr):
    """act'(z), at the corners and for NaN as PyTorch has it: 0 where z is exactly 0 or 6, 1 for NaN."""
    if ACTIVATION == 1:
        z = tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == 2:
        z = tl.where((z <= 0) | (z >= 6), 0.0, 1.0)
    elif ACTIVATION == 3:
        s = 1 / (1 + tl.exp(-z))
        z = s * (1 + z * (1 - s))
    else:
        z = tl.full(z.shape, 1.0, tl.float32)
    return z


@triton.jit
def _span(split, splits, count):
    """The split-th of `splits` equal runs of 0..count: (first, last)."""
    each = tl.cdiv(count, splits)
    first = split * each
    return first, tl.minimum(first + each, count)


@triton.jit
def _place(lane, outer, inner, images, channels, plane, channel, ROWS: tl.constexpr):
    """Offsets of a tile: outer are pixels and inner channels for channels_last (ROWS), else images and pixels."""
    if ROWS:
        return (lane.to(tl.int64) * images * plane + outer)[:, None] * channels + inner[None, :]
    return ((lane.to(tl.int64) * images + outer)[:, None] * channels + channel) * plane + inner[None, :]


@triton.jit
def _channels(channel, channels, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The program's channels and which of them exist: a row (1, BLOCK) for channels_last, else one number."""
    if ROWS:
        c = channel * BLOCK + tl.arange(0, BLOCK)[None, :]
        known = c < channels
    else:
        c = channel
        known = channel < channels
    return c, known


@triton.jit
def _parameters(weight, bias, running_mean, running_var, eps, c, known, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """(mean, scale, bias) of channels c."""
    mean = tl.load(running_mean + c, mask=known, other=0.0)
    scale = tl.rsqrt(tl.load(running_var + c, mask=known, other=1.0) + eps)
    if WEIGHT:
        scale = scale * tl.load(weight + c, mask=known, other=0.0)
    shift = tl.load(bias + c, mask=known, other=0.0) if BIAS else mean * 0
    return mean, scale, shift


def _forward_kernel(
    x, residual, weight, bias, running_mean, running_var, y, mask, partial, images, channels, plane, splits, eps,
    bucket,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, MASK: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    OUTER: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    split, lane = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0)
    outers = images * plane if ROWS else images
    c, known = _channels(channel, channels, BLOCK, ROWS)
    mean, scale, shift = _parameters(weight, bias, running_mean, running_var, eps, c, known, WEIGHT, BIAS)
    first, last = _span(split, splits, outers)
    total = tl.zeros((OUTER, BLOCK), tl.float32)
    square = tl.zeros((OUTER, BLOCK), tl.float32)
    for start in range(first, last, OUTER):
        outer = start + tl.arange(0, OUTER)
        for begin in range(0, 1 if ROWS else plane, BLOCK):
            side = channel * BLOCK if ROWS else begin
            at = side + tl.arange(0, BLOCK)
            inside = (outer < last)[:, None] & (at < (channels if ROWS else plane))[None, :]
            place = _place(lane, outer, at, images, channels, plane, channel, ROWS)
            d = tl.where(inside, tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
            total += d
            square += d * d
            z = d * scale + shift
            if RESIDUAL:
                z += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
            if MASK:
                _store_bits(
                    mask, z, inside, lane, outer, last, side, images, channels, plane, channel, ACTIVATION, ROWS
                )
            tl.store(y + place, _activate(z, ACTIVATION).to(y.dtype.element_ty), mask=inside)
    sums = partial + ((lane * splits + split) * 2).to(tl.int64) * channels
    if ROWS:
        tl.store(sums + c, tl.sum(total, 0)[None, :], mask=known)
        tl.store(sums + channels + c, tl.sum(square, 0)[None, :], mask=known)
    else:
        tl.store(sums + channel, tl.sum(total))
        tl.store(sums + channels + channel, tl.sum(square))


@triton.jit
def _lines(lane, outer, images, channels, plane, channel, ROWS: tl.constexpr):
    """Where the tile's pixels (ROWS) or planes stand among all of the tensor's."""
    if ROWS:
        return lane.to(tl.int64) * images * plane + outer
    return (lane.to(tl.int64) * images + outer) * channels + channel


@triton.jit
def _store_bits(
    mask, z, inside, lane, outer, last, side, images, channels, plane, channel, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The bits of act'(z), 8 elements to a byte; each plane (or channels_last pixel) starts at a byte of its own."""
    OUTER: tl.constexpr = z.shape[0]
    BYTES: tl.constexpr = z.shape[1] // 8
    flags = tl.where(inside, _derivative(z, ACTIVATION), 0.0).to(tl.int32)
    bits = tl.reshape(flags, (OUTER, BYTES, 8)) << tl.arange(0, 8)[None, None, :]
    packed = tl.sum(bits, 2)
    width = tl.cdiv(channels if ROWS else plane, 8)
    byte = side // 8 + tl.arange(0, BYTES)
    place = _lines(lane, outer, images, channels, plane, channel, ROWS)[:, None] * width + byte[None, :]
    tl.store(mask + place, packed.to(tl.uint8), mask=(outer < last)[:, None] & (byte < width)[None, :])


@triton.jit
def _load_bits(mask, inside, lane, outer, at, images, channels, plane, channel, ROWS: tl.constexpr):
    width = tl.cdiv(channels if ROWS else plane, 8)
    place = _lines(lane, outer, images, channels, plane, channel, ROWS)[:, None] * width + (at // 8)[None, :]
    return (tl.load(mask + place, mask=inside, other=0).to(tl.int32) >> (at % 8)[None, :]) & 1


@triton.jit
def _finish(
    partial, running_var, mean, var, norms, penalty, channels, splits, count, r_var,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds up the partial sums of one lane in a fixed order: statistics, and the penalty (WHOLE: one program takes all
    channels) or one block of channels' squared norms, for _penalty to add up."""
    lane, block = tl.program_id(0), tl.program_id(1)
    mean_norm = tl.zeros((BLOCK,), tl.float32)
    var_norm = tl.zeros((BLOCK,), tl.float32)
    for first in range(block * BLOCK, channels if WHOLE else (block + 1) * BLOCK, BLOCK):
        c = first + tl.arange(0, BLOCK)
        known = c < channels
        total = tl.zeros((BLOCK,), tl.float32)
        square = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, splits, SPLITS):
            split = begin + tl.arange(0, SPLITS)
            inside = (split < splits)[:, None] & known[None, :]
            sums = partial + ((lane * splits + split) * 2).to(tl.int64)[:, None] * channels + c[None, :]
            total += tl.sum(tl.load(sums, mask=inside, other=0.0), 0)
            square += tl.sum(tl.load(sums + channels, mask=inside, other=0.0), 0)
        m = total / count
        v = square / count - m * m
        v = tl.where(v < 0, 0.0, v)  # rounding; NaN stays
        tl.store(mean + lane * channels + c, m, mask=known)
        tl.store(var + lane * channels + c, v, mask=known)
        difference = tl.where(known, v - tl.load(running_var + c, mask=known, other=0.0), 0.0)
        mean_norm += m * m
        var_norm += difference * difference
    if WHOLE:
        tl.store(penalty + lane, r_var * tl.sqrt_rn(tl.sum(var_norm)) + tl.sqrt_rn(tl.sum(mean_norm)))
    else:
        place = norms + (lane * tl.num_programs(1) + block) * 2
        tl.store(place, tl.sum(mean_norm))
        tl.store(place + 1, tl.sum(var_norm))


@triton.jit
def _penalty(norms, penalty, blocks, r_var, BLOCK: tl.constexpr):
    """One lane's penalty from the squared norms of its blocks of channels."""
    lane = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    place = norms + (lane * blocks + at) * 2
    mean_norm = tl.sum(tl.load(place, mask=at < blocks, other=0.0))
    var_norm = tl.sum(tl.load(place + 1, mask=at < blocks, other=0.0))
    tl.store(penalty + lane, r_var * tl.sqrt_rn(var_norm) + tl.sqrt_rn(mean_norm))


@triton.jit
def _coefficients(mean, var, running_var, grad_penalty, coefficients, channels, count, r_var, BLOCK: tl.constexpr):
    """a and b of one lane: d penalty / dx = a + b * d, times the penalty's own gradient; a norm of 0 has slope 0."""
    lane = tl.program_id(0)
    mean_norm = tl.zeros((BLOCK,), tl.float32)
    var_norm = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        m = tl.load(mean + lane * channels + c, mask=c < channels, other=0.0)
        v = tl.load(var + lane * channels + c, mask=c < channels, other=0.0)
        difference = v - tl.load(running_var + c, mask=c < channels, other=0.0)
        mean_norm += m * m
        var_norm += difference * difference
    m_norm = tl.sqrt_rn(tl.sum(mean_norm))
    v_norm = tl.sqrt_rn(tl.sum(var_norm))
    upstream = tl.load(grad_penalty + lane)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        m = tl.load(mean + lane * channels + c, mask=c < channels, other=0.0)
        v = tl.load(var + lane * channels + c, mask=c < channels, other=0.0)
        difference = v - tl.load(running_var + c, mask=c < channels, other=0.0)
        b = tl.where(v_norm == 0, 0.0, upstream * r_var * difference / v_norm * 2 / count)
        level = tl.where(m_norm == 0, 0.0, upstream * m / m_norm / count)
        tl.store(coefficients + lane * 2 * channels + c, level - b * m, mask=c < channels)
        tl.store(coefficients + (lane * 2 + 1) * channels + c, b, mask=c < channels)


def _backward_kernel(
    x, residual, weight, bias, running_mean, running_var, grad_y, mask, coefficients, grad_x, grad_residual, images,
    channels, plane, splits, eps, bucket,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, MASK: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    OUTER: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    split, lane = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0)
    outers = images * plane if ROWS else images
    c, known = _channels(channel, channels, BLOCK, ROWS)
    mean, scale, shift = _parameters(weight, bias, running_mean, running_var, eps, c, known, WEIGHT, BIAS)
    a = tl.load(coefficients + lane * 2 * channels + c, mask=known, other=0.0)
    b = tl.load(coefficients + (lane * 2 + 1) * channels + c, mask=known, other=0.0)
    first, last = _span(split, splits, outers)
    for start in range(first, last, OUTER):
        outer = start + tl.arange(0, OUTER)
        for begin in range(0, 1 if ROWS else plane, BLOCK):
            at = (channel * BLOCK if ROWS else begin) + tl.arange(0, BLOCK)
            inside = (outer < last)[:, None] & (at < (channels if ROWS else plane))[None, :]
            place = _place(lane, outer, at, images, channels, plane, channel, ROWS)
            d = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean
            g = tl.load(grad_y + place, mask=inside, other=0.0).to(tl.float32)
            if MASK:
                bits = _load_bits(mask, inside, lane, outer, at, images, channels, plane, channel, ROWS)
                g = tl.where(bits != 0, g, 0.0)
            elif ACTIVATION != 0:
                z = d * scale + shift
                if RESIDUAL:
                    z += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
                g = g * _derivative(z, ACTIVATION)
            if RESIDUAL:
                tl.store(grad_residual + place, g.to(grad_x.dtype.element_ty), mask=inside)
            dx = g * scale + (a + b * d)
            tl.store(grad_x + place, dx.to(grad_x.dtype.element_ty), mask=inside)


_forward = _autotuned(_forward_kernel)
_backward = _autotuned(_backward_kernel)


def forward(x, residual, weight, bias, running_mean, running_var, eps, activation, lanes, r_var, outputs) -> None:
    """Fills outputs = (y, penalty (lanes,), mean (lanes, C), var (lanes, C), mask) for x (lanes*B, C, H, W)."""
    y, penalty, mean, var, mask = outputs
    images, channels, plane, rows = _shape(x, lanes)
    grid, splits, block = _grid(images, channels, plane, rows, lanes)
    partial = x.new_empty((lanes, splits, 2, channels), dtype=torch.float32)
    _launch(
        _forward,
        grid,
        (x, _or(residual, x), _or(weight, running_mean), _or(bias, running_mean), running_mean, running_var, y, mask)
        + (partial, images, channels, plane, splits, eps, _bucket(x)),
        ACTIVATION=activation,
        RESIDUAL=residual is not None,
        MASK=mask.numel() > 0,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        ROWS=rows,
        BLOCK=block,
    )
    _add_up(partial, running_var, mean, var, penalty, float(images * plane), r_var)


def _add_up(partial, running_var, mean, var, penalty, count: float, r_var: float) -> None:
    """Statistics and penalty from the partial sums: one launch, or two where one program a lane would take too long."""
    lanes, splits, _, channels = partial.shape
    whole = splits * channels <= MOST_WHOLE
    height = min(SPLITS, triton.next_power_of_2(splits))
    width = min(SPLITS * CHANNELS // height, triton.next_power_of_2(channels)) if whole else CHANNELS
    blocks = 1 if whole else triton.cdiv(channels, width)
    norms = partial.new_empty((lanes, blocks, 2))
    _finish[(lanes, blocks)](
        partial, running_var, mean, var, norms, penalty, channels, splits, count, r_var,
        SPLITS=height, BLOCK=width, WHOLE=whole, num_warps=8,
    )  # fmt: skip
    if not whole:
        _penalty[(lanes,)](norms, penalty, blocks, r_var, BLOCK=triton.next_power_of_2(blocks))


def backward(
    grad_y, grad_penalty, x, residual, weight, bias, running_mean, running_var, mean, var, mask, eps, activation, lanes,
    r_var, outputs,
) -> None:  # fmt: skip
    """Fills outputs = (grad_x, grad_residual or None); grad_y has x's layout; residual is needed for SiLU alone."""
    grad_x, grad_residual = outputs
    images, channels, plane, rows = _shape(x, lanes)
    grid, splits, block = _grid(images, channels, plane, rows, lanes)
    coefficients = x.new_empty((lanes, 2, channels), dtype=torch.float32)
    wide = min(1024, triton.next_power_of_2(channels))
    count = float(images * plane)
    _coefficients[(lanes,)](mean, var, running_var, grad_penalty, coefficients, channels, count, r_var, BLOCK=wide)
    _launch(
        _backward,
        grid,
        (
            x,
            _or(residual, x),
            _or(weight, running_mean),
            _or(bias, running_mean),
            running_mean,
            running_var,
            grad_y,
            mask,
        )
        + (coefficients, grad_x, _or(grad_residual, grad_x), images, channels, plane, splits, eps, _bucket(x)),
        ACTIVATION=activation,
        RESIDUAL=grad_residual is not None,
        MASK=mask.numel() > 0,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        ROWS=rows,
        BLOCK=block,
    )


def _shape(x: torch.Tensor, lanes: int) -> tuple[int, int, int, bool]:
    """(images of a lane, channels, plane, channels_last)."""
    b, c, h, w = x.shape
    return b // lanes, c, h * w, not x.is_contiguous()


def _grid(images: int, channels: int, plane: int, rows: bool, lanes: int) -> tuple[tuple[int, int, int], int, int]:
    """(grid, splits, block): block elements lie side by side, and each program takes one of the splits."""
    inner, outers = (channels, images * plane) if rows else (plane, images)
    block = max(8, min(256 if rows else 1024, triton.next_power_of_2(inner)))
    across = triton.cdiv(channels, block) if rows else channels
    least, most = PROGRAM_ELEMENTS
    elements = min(most, max(least, lanes * images * channels * plane // PROGRAMS))
    each = max(1, elements // (block if rows else plane))  # outers of one program
    splits = max(1, min(MOST_SPLITS, triton.cdiv(outers, each)))
    return (across, splits, lanes), splits, block


def _bucket(x: torch.Tensor) -> int:
    """The size in powers of four: problems of one bucket are tuned together (dtypes apart, as Triton does)."""
    return x.numel().bit_length() // 2


def _launch(kernel, grid, arguments, **meta) -> None:
    if _interpreted():
        kernel.fn[grid](*arguments, **meta, TILE=max(1024, meta["BLOCK"]))
    else:
        kernel[grid](*arguments, **meta)


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    return stand_in if tensor is None else tensor
