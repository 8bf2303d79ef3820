"""bn_match on CUDA: eval-mode BatchNorm, residual, activation and the statistics penalty.

Forward reads x once: each program takes one channel (or a block of channels, channels_last) of some images of one lane,
writes y and its partial sums of d = x - running_mean and d*d; a second, tiny kernel (two, if they are many) adds them
up to statistics and penalty. Backward turns the statistics into two numbers per lane and channel (tiny kernel), then
makes one pass. The tiny kernels are in bn_match_statistics, what the two passes are made of in bn_match_tiles.

See infer_fast.ops.bn_match for the sources of the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from infer_fast.kernels.bn_match_statistics import add_up, penalty_coefficients
from infer_fast.kernels.bn_match_tiles import (
    NONE,
    activate,
    channels_of,
    derivative,
    load_bits,
    load_parameters,
    place_tile,
    span,
    store_bits,
)

CONFIGS = ((1024, 4), (2048, 4), (4096, 8))  # (elements a program holds at a time, warps) to choose from
PROGRAM_ELEMENTS = (2048, 16384)  # least and most that a program goes through: enough programs, few partial sums
PROGRAMS = 1024  # programs to aim for between those: several for each multiprocessor
MOST_SPLITS = 1024


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was imported (kernels then run in Python, on the CPU)."""
    return not isinstance(activate, triton.runtime.JITFunction)


def _bench(function: Callable[[], None], quantiles: Sequence[float]) -> float | list[float]:
    return triton.testing.do_bench(function, warmup=2, rep=10, quantiles=quantiles)


def _autotuned(function: Callable[..., None]) -> triton.runtime.Autotuner:
    """Tuned over CONFIGS once for each layout, block and dtype, and each `bucket`, the tensor's size in powers of four.

    Lanes, layers, activations and residuals share what was found: a network is tuned a handful of times, not per layer.
    """
    configs = [triton.Config({"TILE": tile}, num_warps=warps) for tile, warps in CONFIGS]
    return triton.autotune(configs, key=["bucket", "BLOCK", "ROWS"], do_bench=_bench)(triton.jit(function))


def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, y_ptr, mask_ptr, partial_ptr, images,
    channels, plane, splits, eps, bucket,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, MASK: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One pass: y, and each program's sums of d and of d*d.

        d = x - running_mean,  z = d * weight / sqrt(running_var + eps) + bias + residual,  y = act(z)

    (eval-mode BatchNorm, Ioffe and Szegedy 2015; the sums are for INFER's penalty, arXiv 2408.06927, eq. 5.)
    Grid: (channels, or blocks of them with ROWS; splits; lanes).

    x_ptr             pointer, T (L*B, C, H, W)      the op's input, contiguous or (ROWS) channels_last
    residual_ptr      pointer, like x                added before the activation; read with RESIDUAL
    weight_ptr        pointer, float32 (C,)          read with WEIGHT
    bias_ptr          pointer, float32 (C,)          read with BIAS
    running_mean_ptr  pointer, float32 (C,)
    running_var_ptr   pointer, float32 (C,)
    y_ptr             pointer, like x                out
    mask_ptr          pointer, uint8 (mask_bytes,)   out with MASK: one bit of act'(z) for each element
    partial_ptr       pointer, float32 (L, S, 2, C)  out: sums of d and of d*d, of each split
    images            number                         B, images of a lane
    channels, plane   numbers                        C, P = H*W
    splits            number                         S, programs that share a channel of a lane
    eps               number, float32                added to running_var
    bucket            number                         the tensor's size in powers of four, for the autotuner alone
    ACTIVATION        none, relu, relu6 or silu, as bn_match_tiles numbers them
    RESIDUAL, MASK, WEIGHT, BIAS   whether there is one
    ROWS              whether the layout is channels_last
    BLOCK             elements side by side in a tile, a power of two from 8 on
    TILE              elements of a tile

    T: float32, bfloat16 or float16; all is computed in float32.
    """
    OUTER: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    split, lane = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0)
    outers = images * plane if ROWS else images
    c, known = channels_of(channel, channels, BLOCK, ROWS)
    mean, scale, shift = load_parameters(
        weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, eps, c, known, WEIGHT, BIAS
    )
    first, last = span(split, splits, outers)
    total = tl.zeros((OUTER, BLOCK), tl.float32)
    square = tl.zeros((OUTER, BLOCK), tl.float32)
    for start in range(first, last, OUTER):
        outer = start + tl.arange(0, OUTER)
        for begin in range(0, 1 if ROWS else plane, BLOCK):
            side = channel * BLOCK if ROWS else begin
            inner = side + tl.arange(0, BLOCK)
            inside = (outer < last)[:, None] & (inner < (channels if ROWS else plane))[None, :]
            place = place_tile(lane, outer, inner, images, channels, plane, channel, ROWS)
            d = tl.where(inside, tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
            total += d
            square += d * d
            z = d * scale + shift
            if RESIDUAL:
                z += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if MASK:
                store_bits(
                    mask_ptr, z, inside, lane, outer, last, side, images, channels, plane, channel, ACTIVATION, ROWS
                )
            tl.store(y_ptr + place, activate(z, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)
    sums_ptr = partial_ptr + ((lane * splits + split) * 2).to(tl.int64) * channels
    if ROWS:
        tl.store(sums_ptr + c, tl.sum(total, 0)[None, :], mask=known)
        tl.store(sums_ptr + channels + c, tl.sum(square, 0)[None, :], mask=known)
    else:
        tl.store(sums_ptr + channel, tl.sum(total))
        tl.store(sums_ptr + channels + channel, tl.sum(square))


def _backward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, grad_y_ptr, mask_ptr,
    coefficients_ptr, grad_x_ptr, grad_residual_ptr, images, channels, plane, splits, eps, bucket,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, MASK: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One pass: the gradients of x and of the residual.

        g = act'(z) * grad_y,  grad_residual = g,  grad_x = g * weight / sqrt(running_var + eps) + a + b * d

    d and z as in _forward_kernel, recomputed from x; a + b * d is the penalty's share (_coefficients; the derivative of
    INFER's penalty, arXiv 2408.06927, eq. 5). Grid as in _forward_kernel, and so are the arguments but for these:

    residual_ptr       pointer, like x                read with RESIDUAL where act' needs z (silu)
    grad_y_ptr         pointer, like x
    mask_ptr           pointer, uint8 (mask_bytes,)   with MASK: the bits of act'(z), in place of z
    coefficients_ptr   pointer, float32 (L, 2, C)     a, then b
    grad_x_ptr         pointer, like x                out
    grad_residual_ptr  pointer, like x                out with RESIDUAL
    """
    OUTER: tl.constexpr = TILE // BLOCK if TILE > BLOCK else 1
    split, lane = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0)
    outers = images * plane if ROWS else images
    c, known = channels_of(channel, channels, BLOCK, ROWS)
    mean, scale, shift = load_parameters(
        weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, eps, c, known, WEIGHT, BIAS
    )
    a = tl.load(coefficients_ptr + lane * 2 * channels + c, mask=known, other=0.0)
    b = tl.load(coefficients_ptr + (lane * 2 + 1) * channels + c, mask=known, other=0.0)
    first, last = span(split, splits, outers)
    for start in range(first, last, OUTER):
        outer = start + tl.arange(0, OUTER)
        for begin in range(0, 1 if ROWS else plane, BLOCK):
            inner = (channel * BLOCK if ROWS else begin) + tl.arange(0, BLOCK)
            inside = (outer < last)[:, None] & (inner < (channels if ROWS else plane))[None, :]
            place = place_tile(lane, outer, inner, images, channels, plane, channel, ROWS)
            d = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean
            g = tl.load(grad_y_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if MASK:
                bits = load_bits(mask_ptr, inside, lane, outer, inner, images, channels, plane, channel, ROWS)
                g = tl.where(bits != 0, g, 0.0)
            elif ACTIVATION != NONE:
                z = d * scale + shift
                if RESIDUAL:
                    z += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
                g = g * derivative(z, ACTIVATION)
            if RESIDUAL:
                tl.store(grad_residual_ptr + place, g.to(grad_x_ptr.dtype.element_ty), mask=inside)
            dx = g * scale + (a + b * d)
            tl.store(grad_x_ptr + place, dx.to(grad_x_ptr.dtype.element_ty), mask=inside)


_forward = _autotuned(_forward_kernel)
_backward = _autotuned(_backward_kernel)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
    activation: int,
    lanes: int,
    r_var: float,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Fills outputs = (y, penalty (lanes,), mean (lanes, C), var (lanes, C), mask) for x (lanes*B, C, H, W)."""
    y, penalty, mean, var, mask = outputs
    images, channels, plane, rows = _shape(x, lanes)
    grid, splits, block = _grid(images, channels, plane, rows, lanes)
    partial = x.new_empty((lanes, splits, 2, channels), dtype=torch.float32)
    _launch(
        _forward,
        grid,
        (
            x, _or(residual, x), _or(weight, running_mean), _or(bias, running_mean), running_mean, running_var, y, mask,
            partial, images, channels, plane, splits, eps, _bucket(x),
        ),
        ACTIVATION=activation,
        RESIDUAL=residual is not None,
        MASK=mask.numel() > 0,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        ROWS=rows,
        BLOCK=block,
    )  # fmt: skip
    add_up(partial, running_var, mean, var, penalty, float(images * plane), r_var)


def backward(
    grad_y: torch.Tensor,
    grad_penalty: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    mask: torch.Tensor,
    eps: float,
    activation: int,
    lanes: int,
    r_var: float,
    outputs: tuple[torch.Tensor, torch.Tensor | None],
) -> None:
    """Fills outputs = (grad_x, grad_residual or None); grad_y has x's layout; residual is needed for SiLU alone."""
    grad_x, grad_residual = outputs
    images, channels, plane, rows = _shape(x, lanes)
    grid, splits, block = _grid(images, channels, plane, rows, lanes)
    coefficients = penalty_coefficients(mean, var, running_var, grad_penalty, float(images * plane), r_var)
    _launch(
        _backward,
        grid,
        (
            x, _or(residual, x), _or(weight, running_mean), _or(bias, running_mean), running_mean, running_var, grad_y,
            mask, coefficients, grad_x, _or(grad_residual, grad_x), images, channels, plane, splits, eps, _bucket(x),
        ),
        ACTIVATION=activation,
        RESIDUAL=grad_residual is not None,
        MASK=mask.numel() > 0,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        ROWS=rows,
        BLOCK=block,
    )  # fmt: skip


def mask_bytes(x: torch.Tensor) -> int:
    """Bytes of x's mask: a bit per element; each plane (or channels_last pixel) starts at a byte of its own."""
    images, channels, plane, rows = _shape(x, 1)
    return images * plane * -(-channels // 8) if rows else images * channels * -(-plane // 8)


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


def _launch(
    kernel: triton.runtime.Autotuner, grid: tuple[int, int, int], arguments: tuple[object, ...], **meta: int | bool
) -> None:
    if _interpreted():
        kernel.fn[grid](*arguments, **meta, TILE=max(1024, meta["BLOCK"]))
    else:
        kernel[grid](*arguments, **meta)


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    return stand_in if tensor is None else tensor
