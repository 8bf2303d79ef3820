"""perturb_: one step of directed weight adjustment, theta += rho * g / (||g||_2 + 1e-12).

The norm runs over all parameters together (DWA, arXiv 2409.17612, eq. 7).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from infer_fast.errors import InferFastError
from infer_fast.ops.backend import choose, native

TINY = 1e-12
DTYPES = {"native": (torch.float32,)}


def reference(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], rho: float) -> None:
    """Plain PyTorch, any floating dtype, in place on `params`; the norm never leaves the device."""
    wide = torch.promote_types(params[0].dtype, torch.float32)
    squares = torch.stack([g.to(wide).square().sum() for g in grads])
    factor = rho / (squares.sum().sqrt() + TINY)
    for param, grad in zip(params, grads, strict=True):
        param.add_((grad.to(wide) * factor).to(param.dtype))


@torch.library.custom_op(
    "infer_fast::perturb_",
    mutates_args=("params",),
    schema="(Tensor(a!)[] params, Tensor[] grads, float rho) -> ()",
    device_types="cpu",
)
def _perturb(params, grads, rho):
    """The native backend: float32, contiguous."""
    grads = [g.float().contiguous() for g in grads]
    native().perturb(
        [p.data_ptr() for p in params],
        [g.data_ptr() for g in grads],
        [p.numel() for p in params],
        rho,
        torch.get_num_threads(),
    )


@_perturb.register_fake
def _(params, grads, rho):
    return None


@torch.no_grad()
def perturb_(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], rho: float, *, backend: str | None = None
) -> None:
    """theta += rho * g / (||g||_2 + 1e-12) in place, the norm over the whole list.

    params, grads: as many tensors each, pairwise of one shape; an empty list does nothing.
    Raises InferFastError when they don't pair up, or a forced backend can't serve.
    """
    if [p.shape for p in params] != [g.shape for g in grads]:
        raise InferFastError(f"perturb_: {len(params)} parameters and {len(grads)} gradients don't pair up in shape.")
    if not params:
        return
    if choose("perturb_", params[0], backend, DTYPES) == "native" and all(_fits_native(p) for p in params):
        _perturb(list(params), list(grads), rho)
    else:
        reference(params, grads, rho)


def _fits_native(param: torch.Tensor) -> bool:
    return param.dtype == torch.float32 and param.is_contiguous()
