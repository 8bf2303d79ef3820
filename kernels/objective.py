"""The objective on CUDA: each row's cross-entropy and each lane's loss in one launch, and their gradients in another.

See infer_fast.ops.objective for the formula.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 1024, 4  # classes taken at a time, warps of one row
ROWS = 128  # rows that the last program of a lane takes at a time
VECTORS = ["targets_ptr", "penalty_ptr", "upstream_ptr", "rows_ptr", "sums_ptr", "arrived_ptr", "loss_ptr"]


@triton.jit(do_not_specialize=["images", "classes"], do_not_specialize_on_alignment=["logits_ptr", *VECTORS])
def _lose(
    logits_ptr, targets_ptr, penalty_ptr, rows_ptr, sums_ptr, arrived_ptr, loss_ptr, images, classes, r_bn,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One row's cross-entropy, log sum_k exp(x_k) - x_target; the last row of a lane adds up, in a fixed order.

    Sums are taken around the largest value so far (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3).
    Grid: (rows of a lane; lanes).

    logits_ptr        pointer, float32, bfloat16 or float16 (L*C, K)
    targets_ptr       pointer, int64 (C,)       a class that there is not makes the loss NaN
    penalty_ptr       pointer, float32 (L,)
    rows_ptr          pointer, float32 (L*C,)   scratch: each row's cross-entropy
    sums_ptr          pointer, float32 (L*C,)   out: log sum_k exp(x_k)
    arrived_ptr       pointer, int32 (L,)       0 before and after: rows of a lane that are done
    loss_ptr          pointer, float32 (L,)     out
    images, classes   numbers, int32            C, K
    r_bn              number, float32           weight of the penalty
    BLOCK, ROWS       classes, and rows, taken at a time
    """
    image, lane = tl.program_id(0), tl.program_id(1)
    row = lane.to(tl.int64) * images + image
    row_ptr = logits_ptr + row * classes
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for begin in range(0, classes, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + k, mask=k < classes, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x))
        around = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - around) + tl.sum(tl.exp(x - around))  # NaN stays
        largest = above
    whole = tl.where(largest == float("-inf"), 0.0, largest) + tl.log(total)
    target = tl.load(targets_ptr + image)
    own = tl.load(row_ptr + target, mask=(target >= 0) & (target < classes), other=float("nan")).to(tl.float32)
    tl.store(sums_ptr + row, whole)
    tl.store(rows_ptr + row, whole - own)
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(arrived_ptr + lane, 1, sem="acq_rel") == images - 1:
        parts = tl.zeros((ROWS,), tl.float32)
        for begin in range(0, images, ROWS):
            at = begin + tl.arange(0, ROWS)
            lane_ptr = rows_ptr + lane.to(tl.int64) * images
            parts += tl.load(lane_ptr + at, mask=at < images, other=0.0, cache_modifier=".cg")
        tl.store(loss_ptr + lane, tl.sum(parts) / images + r_bn * tl.load(penalty_ptr + lane))
        tl.store(arrived_ptr + lane, 0)


@triton.jit(
    do_not_specialize=["images", "classes"],
    do_not_specialize_on_alignment=["logits_ptr", "grad_logits_ptr", "grad_penalty_ptr", *VECTORS],
)
def _slope(
    logits_ptr, targets_ptr, sums_ptr, upstream_ptr, grad_logits_ptr, grad_penalty_ptr, images, classes, r_bn,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row's gradient, upstream * (softmax(x) - onehot(target)) / C, and its lane's of the penalty.

    Grid: (rows of a lane; lanes).

    upstream_ptr       pointer, float32 (L,)              of the losses
    grad_logits_ptr    pointer, as logits_ptr             out
    grad_penalty_ptr   pointer, float32 (L,)              out: r_bn * upstream
    the rest           as _lose's
    """
    image, lane = tl.program_id(0), tl.program_id(1)
    row = lane.to(tl.int64) * images + image
    upstream = tl.load(upstream_ptr + lane)
    whole, target = tl.load(sums_ptr + row), tl.load(targets_ptr + image)
    for begin in range(0, classes, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        at = row * classes + k
        x = tl.load(logits_ptr + at, mask=k < classes, other=0.0).to(tl.float32)
        grad = (tl.exp(x - whole) - tl.where(k == target, 1.0, 0.0)) * (upstream / images)
        tl.store(grad_logits_ptr + at, grad.to(grad_logits_ptr.dtype.element_ty), mask=k < classes)
    if image == 0:
        tl.store(grad_penalty_ptr + lane, r_bn * upstream)


def forward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    penalty: torch.Tensor,
    arrived: torch.Tensor,
    r_bn: float,
    outputs: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Fills outputs = (loss (L,), sums (L*C,)); all contiguous; arrived: int32 zeros (L,), and zeros again after."""
    (rows, classes), lanes = logits.shape, len(penalty)
    loss, sums = outputs
    scratch = torch.empty_like(sums)
    _lose[(rows // lanes, lanes)](
        logits, targets, penalty, scratch, sums, arrived, loss, rows // lanes, classes, float(r_bn),
        BLOCK=BLOCK, ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip


def backward(
    upstream: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    sums: torch.Tensor,
    r_bn: float,
    outputs: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Fills outputs = (grad_logits, like logits; grad_penalty (L,)); all contiguous."""
    (rows, classes), lanes = logits.shape, len(upstream)
    _slope[(rows // lanes, lanes)](
        logits, targets, sums, upstream, *outputs, rows // lanes, classes, float(r_bn), BLOCK=BLOCK, num_warps=WARPS
    )
