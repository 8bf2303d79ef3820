"""bn_match: eval-mode BatchNorm, the residual added to it, the activation after it, and the statistics penalty.

    y = act(weight * (x - running_mean) / sqrt(running_var + eps) + bias + residual)
    penalty = r_var * ||var - running_var||_2 + ||mean - running_mean||_2

mean and (biased) var are those of the op's input x over (batch, height, width) of one lane; the norms run over the
channels and are not squared (INFER, arXiv 2408.06927, eq. 5; DWA, arXiv 2409.17612, section 3 for r_var).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from infer_fast.errors import InferFastError
from infer_fast.ops.backend import choose

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu6": lambda z: z.clamp(0, 6),
    "silu": F.silu,
}


def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    lanes: int = 1,
    r_var: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch, differentiable by autograd, any floating dtype. Shapes as in bn_match."""
    b, c, h, w = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    shift = running_mean.to(wide).view(1, c, 1, 1)
    centred = x.to(wide) - shift  # sums around running_mean: no cancellation when |mean| >> std
    var, mean = torch.var_mean(centred.reshape(lanes, b // lanes, c, h, w), dim=(1, 3, 4), correction=0)  # (lanes, C)
    penalty = r_var * torch.linalg.vector_norm(var - running_var.to(wide), dim=1)
    penalty = penalty + torch.linalg.vector_norm(mean, dim=1)

    scale = torch.rsqrt(running_var.to(wide) + eps)
    scale = scale if weight is None else scale * weight.to(wide)
    z = centred * scale.view(1, c, 1, 1)
    if bias is not None:
        z = z + bias.to(wide).view(1, c, 1, 1)
    if residual is not None:
        z = z + residual.to(wide)
    return ACTIVATIONS[activation](z).to(x.dtype), penalty


def bn_match(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    lanes: int = 1,
    r_var: float = 1.0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eval-mode BatchNorm (+ residual, + activation) and the penalty that matches x's statistics to the running ones.

    x: (lanes*B, C, H, W), the images of one lane side by side; weight, bias (or None), running_mean, running_var: (C,);
    residual: like x, or None; activation: none, relu, relu6 or silu.
    Returns y, with x's shape and dtype, and penalty, (lanes,) float32 (float64 for float64 input).
    Raises InferFastError for shapes or an activation that don't fit, or a forced backend that can't serve.
    """
    _check(x, running_mean, running_var, residual, activation, lanes)
    choose("bn_match", x, backend, {})
    return reference(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        eps,
        residual=residual,
        activation=activation,
        lanes=lanes,
        r_var=r_var,
    )


def _check(x, running_mean, running_var, residual, activation: str, lanes: int) -> None:
    if x.dim() != 4:
        raise InferFastError(f"bn_match takes x of shape (lanes*B, C, H, W), not {tuple(x.shape)}.")
    if lanes < 1 or x.shape[0] % lanes:
        raise InferFastError(f"bn_match: {x.shape[0]} images can't be split into {lanes} equal lanes.")
    if running_mean.shape != (x.shape[1],) or running_var.shape != (x.shape[1],):
        raise InferFastError(
            f"bn_match: x has {x.shape[1]} channels, running_mean {tuple(running_mean.shape)}, "
            f"running_var {tuple(running_var.shape)}."
        )
    if residual is not None and residual.shape != x.shape:
        raise InferFastError(f"bn_match: residual is {tuple(residual.shape)} where x is {tuple(x.shape)}.")
    if activation not in ACTIVATIONS:
        raise InferFastError(f"bn_match: activation {activation!r} is none of {', '.join(ACTIVATIONS)}.")
