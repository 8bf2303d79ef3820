"""lane_loss: what each lane is to make small, its mean cross-entropy and its weighted penalty.

    loss_l = 1/C * sum_i (log sum_k exp(x_lik) - x_li,target_i) + r_bn * penalty_l

(INFER, arXiv 2408.06927, eq. 6.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from infer_fast.errors import InferFastError
from infer_fast.ops.backend import choose

# Natively it is PyTorch too: logits are small beside a pass.
DTYPES = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def reference(logits: torch.Tensor, targets: torch.Tensor, penalty: torch.Tensor, r_bn: float) -> torch.Tensor:
    """Plain PyTorch, differentiable, any floating dtype; at least float32 (L,). Arguments as lane_loss's."""
    lanes = len(penalty)
    wide = torch.promote_types(logits.dtype, torch.float32)
    each = F.cross_entropy(logits.to(wide), targets.repeat(lanes), reduction="none")
    return each.view(lanes, -1).mean(dim=1) + r_bn * penalty


@torch.library.custom_op(
    "infer_fast::lane_loss",
    mutates_args=("arrived",),
    schema="(Tensor logits, Tensor targets, Tensor penalty, Tensor(a!) arrived, float r_bn) -> (Tensor, Tensor)",
)
def _lose(
    logits: torch.Tensor, targets: torch.Tensor, penalty: torch.Tensor, arrived: torch.Tensor, r_bn: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The triton backend: losses (L,) and log sum_k exp(x_k) of each row, (L*C,), both float32."""
    from infer_fast.kernels import objective as kernels

    outputs = _empty_losses(logits, targets, penalty, arrived, r_bn)
    kernels.forward(logits, targets, penalty, arrived, r_bn, outputs)
    return outputs


@_lose.register_fake
def _empty_losses(
    logits: torch.Tensor, targets: torch.Tensor, penalty: torch.Tensor, arrived: torch.Tensor, r_bn: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(penalty), logits.new_empty(len(logits), dtype=torch.float32)


@torch.library.custom_op("infer_fast::lane_loss_backward", mutates_args=())
def _slope(
    upstream: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, sums: torch.Tensor, r_bn: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The triton backend: the gradients of logits and of the penalty."""
    from infer_fast.kernels import objective as kernels

    outputs = _empty_slopes(upstream, logits, targets, sums, r_bn)
    kernels.backward(upstream, logits, targets, sums, r_bn, outputs)
    return outputs


@_slope.register_fake
def _empty_slopes(
    upstream: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, sums: torch.Tensor, r_bn: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(logits), torch.empty_like(upstream)


class _LaneLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        penalty: torch.Tensor,
        r_bn: float,
        arrived: torch.Tensor,
    ) -> torch.Tensor:
        logits, targets = logits.contiguous(), targets.contiguous()
        loss, sums = _lose(logits, targets, penalty.contiguous(), arrived, r_bn)
        ctx.save_for_backward(logits, targets, sums)
        ctx.r_bn = r_bn
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_logits, grad_penalty = _slope(upstream.contiguous(), *ctx.saved_tensors, ctx.r_bn)
        return grad_logits, None, grad_penalty, None, None


def lane_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    penalty: torch.Tensor,
    r_bn: float,
    arrived: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Each lane's loss, at least float32, (L,); a logit that is not finite gives a loss that is not.

    logits: (L*C, classes), the images of one lane side by side; targets: int64 (C,), 0 to classes - 1; penalty: float32
    (L,); arrived: int32 zeros (L,) on the device, which are zeros again after. Gradients flow to logits and penalty.
    Raises InferFastError for shapes that don't fit, or a forced backend that can't serve.
    """
    if logits.dim() != 2 or len(logits) != len(targets) * len(penalty) or arrived.shape != penalty.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (logits, targets, penalty, arrived))
        raise InferFastError(
            f"lane_loss takes logits (L*C, classes), targets (C,), penalty and arrived (L,), not {shapes}."
        )
    chosen = choose("lane_loss", logits, backend, DTYPES)
    if chosen != "triton" or logits.numel() == 0 or penalty.dtype != torch.float32:
        return reference(logits, targets, penalty, r_bn)
    return _LaneLoss.apply(logits, targets, penalty, r_bn, arrived)
