"""scale_shift: an eval-mode BatchNorm as two vectors, the residual added to it, and the activation after it.

    y = act(x * scale + shift + residual)
    scale = weight / sqrt(running_var + eps),  shift = bias - running_mean * scale

(Ioffe and Szegedy 2015.) It has no gradient of its own: it is for networks that only label.
"""

from __future__ import annotations

import torch

from infer_fast.errors import InferFastError
from infer_fast.ops.backend import choose
from infer_fast.ops.bn_match import ACTIVATIONS
from infer_fast.ops.bn_match_operator import ACTIVATION_NUMBERS, dense_format

# Natively it is PyTorch too.
DTYPES = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """Plain PyTorch, differentiable, any floating dtype. Arguments as scale_shift's."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide) * scale.to(wide).view(-1, 1, 1) + shift.to(wide).view(-1, 1, 1)
    if residual is not None:
        z = z + residual.to(wide)
    return ACTIVATIONS[activation](z).to(x.dtype)


@torch.library.custom_op(
    "infer_fast::scale_shift",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str activation) -> Tensor",
)
def _scale_shift(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, residual: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """The triton backend; x and residual of one dense layout."""
    from infer_fast.kernels import scale_shift as kernels

    y = torch.empty_like(x)
    kernels.scale_shift(x, scale, shift, residual, ACTIVATION_NUMBERS[activation], y)
    return y


@_scale_shift.register_fake
def _(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, residual: torch.Tensor | None, activation: str
) -> torch.Tensor:
    return torch.empty_like(x)


def scale_shift(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    backend: str | None = None,
) -> torch.Tensor:
    """act(x * scale + shift + residual), with x's shape, dtype and layout.

    x: (B, C, H, W); scale, shift: float32 (C,); residual: x's shape, or None; activation: none, relu, relu6 or silu.
    Where a gradient is wanted, the reference serves. Raises InferFastError for shapes that don't fit, or a forced
    backend that can't serve.
    """
    if x.dim() != 4 or not scale.shape == shift.shape == (x.shape[1],):
        raise InferFastError(
            f"scale_shift takes x (B, C, H, W) and C scales and shifts, not {tuple(x.shape)}, {tuple(scale.shape)} and "
            f"{tuple(shift.shape)}."
        )
    if residual is not None and residual.shape != x.shape:
        raise InferFastError(f"scale_shift: residual is {tuple(residual.shape)} where x is {tuple(x.shape)}.")
    chosen = choose("scale_shift", x, backend, DTYPES)
    inputs = [t for t in (x, scale, shift, residual) if t is not None]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if chosen != "triton" or wanted or x.numel() == 0 or scale.dtype != torch.float32 or shift.dtype != torch.float32:
        return reference(x, scale, shift, residual, activation)
    layout = dense_format(x)
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=layout)
    return _scale_shift(
        x.contiguous(memory_format=layout), scale.contiguous(), shift.contiguous(), residual, activation
    )
