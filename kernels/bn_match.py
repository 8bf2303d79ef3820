"""bn_match on CUDA: eval-mode BatchNorm, residual, activation and the statistics penalty.

Forward reads x once: each program takes one channel (or a block of channels, channels_last) of some images of one lane,
writes y and its partial sums of d = x - running_mean and d*d; a second, small launch adds them up to statistics, norms
and penalty. Backward is one pass, each program of which begins with the penalty's slope from those. The small kernel is
in bn_match_statistics, what the two passes are made of in bn_match_tiles, how they are cut into programs in
bn_match_plan.

See infer_fast.ops.bn_match for the sources of the formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from infer_fast.kernels.bn_match_plan import Plan, multiprocessors, plan
from infer_fast.kernels.bn_match_statistics import add_up, slope_of
from infer_fast.kernels.bn_match_tiles import (
    NONE,
    activate,
    channels_of,
    derivative,
    load_bits,
    load_parameters,
    place_bits,
    place_tile,
    rows_of,
    store_bits,
)

# A kernel is compiled anew for each value that Triton specialises on: sizes are not worth it, nor where a vector lies.
SIZES = ["channels", "inners", "size", "steps"]
VECTORS = ["weight_ptr", "bias_ptr", "running_mean_ptr", "running_var_ptr"]
STATISTICS = ["mean_ptr", "var_ptr", "norms_ptr", "grad_penalty_ptr"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=[*VECTORS, "partial_ptr", "arrived_ptr"])
def _forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, y_ptr, mask_ptr, partial_ptr,
    arrived_ptr, channels, inners, size, steps, eps,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, MASK: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One pass: y, and each program's sums of d and of d*d.

        d = x - running_mean,  z = d * weight / sqrt(running_var + eps) + bias + residual,  y = act(z)

    (eval-mode BatchNorm, Ioffe and Szegedy 2015; the sums are for INFER's penalty, arXiv 2408.06927, eq. 5.)
    Grid: (channels, or with ROWS blocks of a row; splits; lanes).

    x_ptr             pointer, T (L*B, C, H, W)      the op's input, contiguous or (ROWS) channels_last
    residual_ptr      pointer, like x                added before the activation; read with RESIDUAL
    weight_ptr        pointer, float32 (C,)          read with WEIGHT
    bias_ptr          pointer, float32 (C,)          read with BIAS
    running_mean_ptr  pointer, float32 (C,)
    running_var_ptr   pointer, float32 (C,)
    y_ptr             pointer, like x                out
    mask_ptr          pointer, uint8 (mask_bytes,)   out with MASK: one bit of act'(z) for each element
    partial_ptr       pointer, float32 (L, 2, S, I)  out: sums of d, then of d*d, of each split and column (C for I
                                                     where contiguous)
    arrived_ptr       pointer, int32 (L,)            out: 0, where add_up begins to count
    channels          number                         C
    inners, size      numbers                        elements of a row and of a lane, in vectors
    steps             number                         tiles of a program
    eps               number, float32                added to running_var
    ACTIVATION        none, relu, relu6 or silu, as bn_match_tiles numbers them
    RESIDUAL, MASK, WEIGHT, BIAS   whether there is one
    ROWS              whether the layout is channels_last
    VECTOR            elements of a vector; x, residual, y and the mask are aligned to it
    BLOCK             elements side by side in a tile, a power of two from 8 on
    TILE              elements of a tile, two rows at least

    T: float32, bfloat16 or float16; all is computed in float32.
    """
    OUTER: tl.constexpr = TILE // BLOCK
    across, split, lane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = channels_of(across, channels, BLOCK, ROWS)
    mean, scale, shift = load_parameters(weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, eps, c, WEIGHT, BIAS)
    start, stride = rows_of(across, lane, channels, inners, size, ROWS)
    total = tl.zeros((OUTER // 2, BLOCK), tl.float32)
    square = tl.zeros((OUTER // 2, BLOCK), tl.float32)
    for step in range(split * steps, (split + 1) * steps):
        outer = step * OUTER + tl.arange(0, OUTER)
        for begin in range(0, 1 if ROWS else inners * VECTOR, BLOCK):
            side = across * BLOCK if ROWS else begin
            inner = side + tl.arange(0, BLOCK)
            place, room = place_tile(start, stride, outer, inner, inners, size, VECTOR)
            inside = inner[None, :] < room[:, None]
            d = tl.where(inside, tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)
            total += tl.sum(tl.reshape(d, (2, OUTER // 2, BLOCK)), 0)  # both halves are the same thread's
            square += tl.sum(tl.reshape(d * d, (2, OUTER // 2, BLOCK)), 0)
            z = d * scale + shift
            if RESIDUAL:
                z += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if MASK:
                bits = place_bits(across, lane, outer, side, channels, inners, size, BLOCK, VECTOR, ROWS)
                store_bits(mask_ptr, bits, z, room, inside, side, ACTIVATION)
            tl.store(y_ptr + place, activate(z, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)
    if (across == 0) & (split == 0):
        tl.store(arrived_ptr + lane, 0)
    splits = tl.num_programs(1)
    columns = inners * VECTOR if ROWS else channels
    sums_ptr = partial_ptr + (lane.to(tl.int64) * 2 * splits + split) * columns
    if ROWS:
        column = across * BLOCK + tl.arange(0, BLOCK)
        tl.store(sums_ptr + column, tl.sum(total, 0))
        tl.store(sums_ptr + splits.to(tl.int64) * columns + column, tl.sum(square, 0))
    else:
        tl.store(sums_ptr + across, tl.sum(total))
        tl.store(sums_ptr + splits.to(tl.int64) * columns + across, tl.sum(square))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=[*VECTORS, *STATISTICS])
def _backward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, grad_y_ptr, grad_y2_ptr, mask_ptr,
    mean_ptr, var_ptr, norms_ptr, grad_penalty_ptr, grad_x_ptr, grad_residual_ptr, channels, inners, size, steps, eps,
    count, r_var,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, SECOND: tl.constexpr, MASK: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One pass: the gradients of x and of the residual.

        g = act'(z) * (grad_y + grad_y2),  grad_residual = g,  grad_x = g * weight / sqrt(running_var + eps) + a + b * d

    d and z as in _forward, recomputed from x; a + b * d is the penalty's share (slope_of; the derivative of INFER's
    penalty, arXiv 2408.06927, eq. 5). Grid as in _forward, and so are the arguments but for these:

    residual_ptr       pointer, like x                read with RESIDUAL where act' needs z (silu)
    grad_y_ptr         pointer, like x
    grad_y2_ptr        pointer, like x                read with SECOND: y was given twice
    mask_ptr           pointer, uint8 (mask_bytes,)   with MASK: the bits of act'(z), in place of z
    mean_ptr, var_ptr  pointers, float32 (L, C)       mean - running_mean and the biased variance
    norms_ptr          pointer, float32 (L, 2)        ||mean - running_mean||, ||var - running_var||
    grad_penalty_ptr   pointer, float32 (L,)
    grad_x_ptr         pointer, like x                out
    grad_residual_ptr  pointer, like x                out with RESIDUAL
    count, r_var       numbers, float32               n = B*P, and the weight of the variances' norm
    """
    OUTER: tl.constexpr = TILE // BLOCK
    across, split, lane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c = channels_of(across, channels, BLOCK, ROWS)
    mean, scale, shift = load_parameters(weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, eps, c, WEIGHT, BIAS)
    a, b = slope_of(
        mean_ptr, var_ptr, norms_ptr, grad_penalty_ptr, running_var_ptr, lane, c, channels, count, r_var
    )  # fmt: skip
    start, stride = rows_of(across, lane, channels, inners, size, ROWS)
    for step in range(split * steps, (split + 1) * steps):
        outer = step * OUTER + tl.arange(0, OUTER)
        for begin in range(0, 1 if ROWS else inners * VECTOR, BLOCK):
            side = across * BLOCK if ROWS else begin
            inner = side + tl.arange(0, BLOCK)
            place, room = place_tile(start, stride, outer, inner, inners, size, VECTOR)
            inside = inner[None, :] < room[:, None]
            if MASK:
                bits = place_bits(across, lane, outer, side, channels, inners, size, BLOCK, VECTOR, ROWS)
                passed = load_bits(mask_ptr, bits, room, side) != 0
            d = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) - mean
            g = tl.load(grad_y_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if SECOND:
                g += tl.load(grad_y2_ptr + place, mask=inside, other=0.0).to(tl.float32)
            if MASK:
                g = tl.where(passed, g, 0.0)
            elif ACTIVATION != NONE:
                z = d * scale + shift
                if RESIDUAL:
                    z += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
                g = g * derivative(z, ACTIVATION)
            if RESIDUAL:
                tl.store(grad_residual_ptr + place, g.to(grad_x_ptr.dtype.element_ty), mask=inside)
            dx = g * scale + (a + b * d)
            tl.store(grad_x_ptr + place, dx.to(grad_x_ptr.dtype.element_ty), mask=inside)


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
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Fills outputs = (y, penalty (lanes,), mean, var (lanes, C), norms (lanes, 2), mask) for x (lanes*B, C, H, W)."""
    y, penalty, mean, var, norms, mask = outputs
    channels, cut = x.shape[1], _plan(x, lanes)
    partial = x.new_empty((lanes, 2, cut.parts, channels), dtype=torch.float32)
    arrived = x.new_empty((lanes,), dtype=torch.int32)
    _forward[cut.grid](
        x, _or(residual, x), _or(weight, running_mean), _or(bias, running_mean), running_mean, running_var, y, mask,
        partial, arrived, *_sizes(channels, cut), float(eps),
        ACTIVATION=activation,
        RESIDUAL=residual is not None,
        MASK=mask.numel() > 0,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        **_constants(x, cut),
    )  # fmt: skip
    add_up(partial, arrived, running_var, (mean, var, norms, penalty), float(cut.size // channels), r_var)


def backward(
    grad_y: torch.Tensor,
    grad_y2: torch.Tensor | None,
    grad_penalty: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    norms: torch.Tensor,
    mask: torch.Tensor,
    eps: float,
    activation: int,
    lanes: int,
    r_var: float,
    outputs: tuple[torch.Tensor, torch.Tensor | None],
) -> None:
    """Fills outputs = (grad_x, grad_residual or None); residual is needed for SiLU alone.

    grad_y, grad_y2: like x, of y and of y given a second time; None where that was not so.
    """
    grad_x, grad_residual = outputs
    channels, cut = x.shape[1], _plan(x, lanes)
    masked = mask.numel() > 0
    _backward[cut.grid](
        x, _or(residual, x), _or(weight, running_mean), _or(bias, running_mean), running_mean, running_var, grad_y,
        _or(grad_y2, grad_y), mask, mean, var, norms, grad_penalty, grad_x, _or(grad_residual, grad_x),
        *_sizes(channels, cut), float(eps), float(cut.size // channels), float(r_var),
        ACTIVATION=int(NONE) if masked else activation,
        RESIDUAL=grad_residual is not None,
        SECOND=grad_y2 is not None,
        MASK=masked,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        **_constants(x, cut),
    )  # fmt: skip


def mask_bytes(x: torch.Tensor, lanes: int) -> int:
    """Bytes of x's mask: a bit per element; each plane (or channels_last lane) starts at a byte of its own."""
    b, c, h, w = x.shape
    return lanes * triton.cdiv(b // lanes * c * h * w, 8) if _rows(x) else b * c * triton.cdiv(h * w, 8)


def _rows(x: torch.Tensor) -> bool:
    """Whether the plan sees pixels of all channels (channels_last, or single pixels), not planes of one."""
    return not x.is_contiguous() or x.shape[2] * x.shape[3] == 1


def _plan(x: torch.Tensor, lanes: int) -> Plan:
    b, c, h, w = x.shape
    return plan(b // lanes, c, h * w, _rows(x), lanes, x.itemsize, multiprocessors(x.device))


def _sizes(channels: int, cut: Plan) -> tuple[int, int, int, int]:
    """What the kernels call SIZES."""
    return channels, cut.inners // cut.vector, cut.size // cut.vector, cut.steps


def _constants(x: torch.Tensor, cut: Plan) -> dict[str, int | bool]:
    return {
        "ROWS": _rows(x), "VECTOR": cut.vector, "BLOCK": cut.block, "TILE": cut.tile, "num_warps": cut.warps,
    }  # fmt: skip


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    return stand_in if tensor is None else tensor
