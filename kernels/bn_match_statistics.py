"""The small kernels between bn_match's passes: partial sums to statistics and penalty, statistics to coefficients.

Letters in the argument tables are those of bn_match_tiles; S: parts, the sums of one channel of a lane.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLITS, CHANNELS = 128, 64  # the tile in which partial sums are added up
MOST_WHOLE = 32768  # sums of a lane, at most, that one program adds up


@triton.jit
def _finish(
    partial_ptr, running_var_ptr, mean_ptr, var_ptr, norms_ptr, penalty_ptr, channels, splits, count, r_var,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds up the partial sums of one lane in a fixed order: its statistics, and its penalty or parts of that.

        mean - running_mean = sum(d)/n,  var = sum(d*d)/n - (sum(d)/n)^2,
        penalty = r_var * ||var - running_var||_2 + ||mean - running_mean||_2

    (INFER, arXiv 2408.06927, eq. 5; r_var: DWA, arXiv 2409.17612.) One program a lane and block of channels.

    partial_ptr       pointer, float32 (L, 2, S, C)   sums of d, then of d*d, of each part
    running_var_ptr   pointer, float32 (C,)
    mean_ptr          pointer, float32 (L, C)         out: mean - running_mean
    var_ptr           pointer, float32 (L, C)         out: biased variance
    norms_ptr         pointer, float32 (L, blocks, 2) out, unless WHOLE: squared norms of mean and var, for _penalty
    penalty_ptr       pointer, float32 (L,)           out, with WHOLE
    channels, splits  numbers                         C, S
    count             number, float32                 n = B*P, elements of a channel of a lane
    r_var             number, float32                 weight of the variances' norm
    SPLITS, BLOCK     splits and channels that are added up at a time
    WHOLE             whether one program takes all channels of a lane
    """
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
            sums_ptr = partial_ptr + (lane.to(tl.int64) * 2 * splits + split)[:, None] * channels + c[None, :]
            total += tl.sum(tl.load(sums_ptr, mask=inside, other=0.0), 0)
            square += tl.sum(tl.load(sums_ptr + splits * channels, mask=inside, other=0.0), 0)
        m = total / count
        v = square / count - m * m
        v = tl.where(v < 0, 0.0, v)  # rounding; NaN stays
        tl.store(mean_ptr + lane * channels + c, m, mask=known)
        tl.store(var_ptr + lane * channels + c, v, mask=known)
        difference = tl.where(known, v - tl.load(running_var_ptr + c, mask=known, other=0.0), 0.0)
        mean_norm += m * m
        var_norm += difference * difference
    if WHOLE:
        tl.store(penalty_ptr + lane, r_var * tl.sqrt_rn(tl.sum(var_norm)) + tl.sqrt_rn(tl.sum(mean_norm)))
    else:
        norm_ptr = norms_ptr + (lane * tl.num_programs(1) + block) * 2
        tl.store(norm_ptr, tl.sum(mean_norm))
        tl.store(norm_ptr + 1, tl.sum(var_norm))


@triton.jit
def _penalty(norms_ptr, penalty_ptr, blocks, r_var, BLOCK: tl.constexpr):
    """One lane's penalty from the squared norms of its blocks of channels.

    norms_ptr    pointer, float32 (L, blocks, 2)   as _finish writes them
    penalty_ptr  pointer, float32 (L,)             out
    blocks       number                            BLOCK: the same, rounded up to a power of two
    r_var        number, float32
    """
    lane = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    norm_ptr = norms_ptr + (lane * blocks + at) * 2
    mean_norm = tl.sum(tl.load(norm_ptr, mask=at < blocks, other=0.0))
    var_norm = tl.sum(tl.load(norm_ptr + 1, mask=at < blocks, other=0.0))
    tl.store(penalty_ptr + lane, r_var * tl.sqrt_rn(var_norm) + tl.sqrt_rn(mean_norm))


@triton.jit
def _coefficients(
    mean_ptr, var_ptr, running_var_ptr, grad_penalty_ptr, coefficients_ptr, channels, count, r_var, BLOCK: tl.constexpr
):  # fmt: skip
    """a and b of one lane: d penalty / dx = a + b * d, times the penalty's own gradient; a norm of 0 has slope 0.

        b = r_var * (var - running_var) / ||var - running_var||_2 * 2/n
        a = (mean - running_mean) / ||mean - running_mean||_2 / n - b * (mean - running_mean)

    mean_ptr, var_ptr  pointers, float32 (L, C)     as _finish writes them
    running_var_ptr    pointer, float32 (C,)
    grad_penalty_ptr   pointer, float32 (L,)
    coefficients_ptr   pointer, float32 (L, 2, C)   out: a, then b
    channels           number                       C
    count, r_var       numbers, float32             as _finish's
    BLOCK              channels that are taken at a time
    """
    lane = tl.program_id(0)
    mean_norm = tl.zeros((BLOCK,), tl.float32)
    var_norm = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        m = tl.load(mean_ptr + lane * channels + c, mask=c < channels, other=0.0)
        v = tl.load(var_ptr + lane * channels + c, mask=c < channels, other=0.0)
        difference = v - tl.load(running_var_ptr + c, mask=c < channels, other=0.0)
        mean_norm += m * m
        var_norm += difference * difference
    m_norm = tl.sqrt_rn(tl.sum(mean_norm))
    v_norm = tl.sqrt_rn(tl.sum(var_norm))
    upstream = tl.load(grad_penalty_ptr + lane)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        m = tl.load(mean_ptr + lane * channels + c, mask=c < channels, other=0.0)
        v = tl.load(var_ptr + lane * channels + c, mask=c < channels, other=0.0)
        difference = v - tl.load(running_var_ptr + c, mask=c < channels, other=0.0)
        b = tl.where(v_norm == 0, 0.0, upstream * r_var * difference / v_norm * 2 / count)
        level = tl.where(m_norm == 0, 0.0, upstream * m / m_norm / count)
        tl.store(coefficients_ptr + lane * 2 * channels + c, level - b * m, mask=c < channels)
        tl.store(coefficients_ptr + (lane * 2 + 1) * channels + c, b, mask=c < channels)


def add_up(
    partial: torch.Tensor,
    running_var: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    penalty: torch.Tensor,
    count: float,
    r_var: float,
) -> None:
    """Fills mean, var (lanes, C) and penalty (lanes,) from the partial sums (lanes, 2, parts, C).

    One launch, or two where one program a lane would take too long.
    """
    lanes, _, splits, channels = partial.shape
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


def penalty_coefficients(
    mean: torch.Tensor,
    var: torch.Tensor,
    running_var: torch.Tensor,
    grad_penalty: torch.Tensor,
    count: float,
    r_var: float,
) -> torch.Tensor:
    """a and b of d penalty / dx = a + b * d, float32 (lanes, 2, C)."""
    lanes, channels = mean.shape
    coefficients = mean.new_empty((lanes, 2, channels), dtype=torch.float32)
    wide = min(1024, triton.next_power_of_2(channels))
    _coefficients[(lanes,)](mean, var, running_var, grad_penalty, coefficients, channels, count, r_var, BLOCK=wide)
    return coefficients
