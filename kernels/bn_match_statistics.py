"""What happens between bn_match's passes: partial sums to statistics and penalty, statistics to the penalty's slope.

Letters in the argument tables are those of bn_match_tiles; S: parts, the sums of one channel of a lane.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEIGHT, WIDTH = 64, 32  # the tile of parts and channels in which a share is added up
SHARE = 128  # parts of one share
LAST_HEIGHT, LAST_WIDTH = 8, 256  # the tile of shares and channels in which the last program of a lane adds up
WARPS = 8


@triton.jit
def _sum_of(sums_ptr, first, last, parts, c, known, channels, HEIGHT: tl.constexpr, CACHED: tl.constexpr):
    """(sums of d, sums of d*d) of channels c over parts first..last, in a fixed order.

    sums_ptr              pointer, float32 (2, parts, C)   of one lane
    first, last, parts    numbers
    c, known              int32, bool (columns,)           channels, and which of them exist
    channels              number                           C
    HEIGHT                parts that are loaded at a time
    CACHED                where loads may be answered from: not "" where another program wrote what is read
    """
    total = tl.zeros((HEIGHT, c.shape[0]), tl.float32)
    square = tl.zeros((HEIGHT, c.shape[0]), tl.float32)
    for begin in range(first, last, HEIGHT):
        part = begin + tl.arange(0, HEIGHT)
        inside = (part < last)[:, None] & known[None, :]
        at_ptr = sums_ptr + part.to(tl.int64)[:, None] * channels + c[None, :]
        total += tl.load(at_ptr, mask=inside, other=0.0, cache_modifier=CACHED)
        square += tl.load(at_ptr + parts.to(tl.int64) * channels, mask=inside, other=0.0, cache_modifier=CACHED)
    return tl.sum(total, 0), tl.sum(square, 0)


@triton.jit
def _conclude(
    sums_ptr, running_var_ptr, mean_ptr, var_ptr, norms_ptr, penalty_ptr, channels, shares, count, r_var,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One lane's statistics, norms and penalty from the sums of its shares, which other programs wrote.

    The pointers are _finish's, at the lane's own place; so are the numbers, and HEIGHT and WIDTH are its LAST_*.
    """
    mean_norm = tl.zeros((WIDTH,), tl.float32)
    var_norm = tl.zeros((WIDTH,), tl.float32)
    for begin in range(0, channels, WIDTH):
        c = begin + tl.arange(0, WIDTH)
        known = c < channels
        total, square = _sum_of(sums_ptr, 0, shares, shares, c, known, channels, HEIGHT, ".cg")
        m = total / count
        v = square / count - m * m
        v = tl.where(v < 0, 0.0, v)  # rounding; NaN stays
        tl.store(mean_ptr + c, m, mask=known)
        tl.store(var_ptr + c, v, mask=known)
        difference = tl.where(known, v - tl.load(running_var_ptr + c, mask=known, other=0.0), 0.0)
        mean_norm += m * m
        var_norm += difference * difference
    m_norm, v_norm = tl.sqrt_rn(tl.sum(mean_norm)), tl.sqrt_rn(tl.sum(var_norm))
    tl.store(norms_ptr, m_norm)
    tl.store(norms_ptr + 1, v_norm)
    tl.store(penalty_ptr, r_var * v_norm + m_norm)


@triton.jit(
    do_not_specialize=["channels", "parts"],
    do_not_specialize_on_alignment=["running_var_ptr", "arrived_ptr", "norms_ptr", "penalty_ptr"],
)
def _finish(
    partial_ptr, sums_ptr, arrived_ptr, running_var_ptr, mean_ptr, var_ptr, norms_ptr, penalty_ptr, channels, parts,
    count, r_var,
    SHARE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    LAST_HEIGHT: tl.constexpr, LAST_WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds up the partial sums of a lane in a fixed order: its statistics, their norms, its penalty.

        mean - running_mean = sum(d)/n,  var = sum(d*d)/n - (sum(d)/n)^2,
        penalty = r_var * ||var - running_var||_2 + ||mean - running_mean||_2

    (INFER, arXiv 2408.06927, eq. 5; r_var: DWA, arXiv 2409.17612.) Each program adds up a share of the parts of some
    channels; the last of a lane to have done so, whichever that is, adds up the shares.
    Grid: (shares; blocks of channels; lanes).

    partial_ptr       pointer, float32 (L, 2, S, C)       sums of d, then of d*d, of each part
    sums_ptr          pointer, float32 (L, 2, shares, C)  scratch: the same of each share
    arrived_ptr       pointer, int32 (L,)                 0 before: programs of a lane that have written their share
    running_var_ptr   pointer, float32 (C,)
    mean_ptr          pointer, float32 (L, C)             out: mean - running_mean
    var_ptr           pointer, float32 (L, C)             out: biased variance
    norms_ptr         pointer, float32 (L, 2)             out: ||mean - running_mean||, ||var - running_var||
    penalty_ptr       pointer, float32 (L,)               out
    channels, parts   numbers                             C, S
    count             number, float32                     n = B*P, elements of a channel of a lane
    r_var             number, float32                     weight of the variances' norm
    SHARE             parts of a share
    HEIGHT, WIDTH     parts and channels that are added up at a time
    LAST_*            the same of shares
    """
    share, block, lane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shares, blocks = tl.num_programs(0), tl.num_programs(1)
    c = block * WIDTH + tl.arange(0, WIDTH)
    first = share * SHARE
    lane_ptr = partial_ptr + lane.to(tl.int64) * 2 * parts * channels
    last = tl.minimum(first + SHARE, parts)
    total, square = _sum_of(lane_ptr, first, last, parts, c, c < channels, channels, HEIGHT, "")
    sums_ptr += lane.to(tl.int64) * 2 * shares * channels
    tl.store(sums_ptr + share * channels + c, total, mask=c < channels)
    tl.store(sums_ptr + (shares + share) * channels + c, square, mask=c < channels)
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(arrived_ptr + lane, 1, sem="acq_rel") == shares * blocks - 1:
        _conclude(
            sums_ptr, running_var_ptr, mean_ptr + lane * channels, var_ptr + lane * channels, norms_ptr + lane * 2,
            penalty_ptr + lane, channels, shares, count, r_var, LAST_HEIGHT, LAST_WIDTH,
        )  # fmt: skip


@triton.jit(do_not_specialize=["channels"])
def _norms(mean_ptr, var_ptr, running_var_ptr, norms_ptr, channels, BLOCK: tl.constexpr):
    """||mean - running_mean|| and ||var - running_var|| of one lane; arguments as _finish's.

    mean_ptr, var_ptr   pointers, float32 (L, C)   of the batch that this one is a chunk of
    norms_ptr           pointer, float32 (L, 2)    out
    BLOCK               channels that are taken at a time
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
    tl.store(norms_ptr + lane * 2, tl.sqrt_rn(tl.sum(mean_norm)))
    tl.store(norms_ptr + lane * 2 + 1, tl.sqrt_rn(tl.sum(var_norm)))


@triton.jit
def slope_of(mean_ptr, var_ptr, norms_ptr, grad_penalty_ptr, running_var_ptr, lane, c, channels, count, r_var):
    """(a, b) of channels c: d penalty / dx = a + b * d, times the penalty's own gradient; a norm of 0 has slope 0.

        b = r_var * (var - running_var) / ||var - running_var||_2 * 2/n
        a = (mean - running_mean) / ||mean - running_mean||_2 / n - b * (mean - running_mean)

    grad_penalty_ptr  pointer, float32 (L,)
    lane, c           number, int32 of any shape   all of c exist
    the rest          as _finish's
    """
    m = tl.load(mean_ptr + lane * channels + c)
    difference = tl.load(var_ptr + lane * channels + c) - tl.load(running_var_ptr + c)
    m_norm, v_norm = tl.load(norms_ptr + lane * 2), tl.load(norms_ptr + lane * 2 + 1)
    upstream = tl.load(grad_penalty_ptr + lane)
    b = tl.where(v_norm == 0, 0.0, upstream * r_var * difference / v_norm * 2 / count)
    level = tl.where(m_norm == 0, 0.0, upstream * m / m_norm / count)
    return level - b * m, b


def add_up(
    partial: torch.Tensor,
    arrived: torch.Tensor,
    running_var: torch.Tensor,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    count: float,
    r_var: float,
) -> None:
    """Fills outputs = (mean, var (lanes, C), norms (lanes, 2), penalty (lanes,)) in one launch.

    partial: the sums (lanes, 2, parts, C); arrived: int32 zeros (lanes,), which are counted up.
    """
    lanes, _, parts, channels = partial.shape
    shares, blocks = triton.cdiv(parts, SHARE), triton.cdiv(channels, WIDTH)
    sums = partial.new_empty((lanes, 2, shares, channels))
    _finish[(shares, blocks, lanes)](
        partial, sums, arrived, running_var, *outputs, channels, parts, count, float(r_var),
        SHARE=SHARE, HEIGHT=HEIGHT, WIDTH=WIDTH, LAST_HEIGHT=LAST_HEIGHT, LAST_WIDTH=LAST_WIDTH, num_warps=WARPS,
    )  # fmt: skip


def fill_norms(mean: torch.Tensor, var: torch.Tensor, running_var: torch.Tensor, norms: torch.Tensor) -> None:
    """Fills norms (lanes, 2) from statistics (lanes, C) that add_up did not make."""
    lanes, channels = mean.shape
    _norms[(lanes,)](mean, var, running_var, norms, channels, BLOCK=LAST_WIDTH)
