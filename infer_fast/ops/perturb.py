"""perturb_: one step of directed weight adjustment, theta += rho * g / (||g||_2 + 1e-12).

The norm runs over all parameters together (DWA, arXiv 2409.17612, eq. 7).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from infer_fast.errors import InferFastError
from infer_fast.ops.backend import buffer, choose, compiled

TINY = 1e-12
DTYPES = {"native": (torch.float32,), "triton": (torch.float32, torch.bfloat16, torch.float16)}


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
    schema="(Tensor(a!)[] params, Tensor[] grads, float rho, str backend) -> ()",
)
def _perturb(params: list[torch.Tensor], grads: list[torch.Tensor], rho: float, backend: str) -> None:
    """The native and triton backends: parameters of one dtype, each of a dense layout that its gradient is given."""
    grads = [
        g.to(p.dtype).contiguous(memory_format=_layout(p) or torch.contiguous_format)
        for p, g in zip(params, grads, strict=True)
    ]
    if backend == "triton":
        from infer_fast.kernels import perturb as kernels

        kernels.perturb(params, grads, rho)
        return
    compiled().perturb(
        [buffer(p) for p in params],
        [buffer(g) for g in grads],
        rho,
        torch.get_num_threads(),
    )


def _layout(param: torch.Tensor) -> torch.memory_format | None:
    """The layout in which the parameter fills its memory, or None if it does not."""
    formats = (torch.contiguous_format, *((torch.channels_last,) if param.dim() == 4 else ()))
    return next((f for f in formats if param.is_contiguous(memory_format=f)), None)


@_perturb.register_fake
def _(params: list[torch.Tensor], grads: list[torch.Tensor], rho: float, backend: str) -> None:
    return None


@torch.no_grad()
def perturb_(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], rho: float, *, backend: str | None = None
) -> None:
    """theta += rho * g / (||g||_2 + 1e-12) in place, the norm over the whole list.

    params, grads: as many tensors each, pairwise of one shape; an empty list does nothing.
    Parameters of mixed dtypes, or neither contiguous nor channels_last, take the reference. Raises InferFastError when
    they don't pair up, or a forced backend can't serve.
    """
    if [p.shape for p in params] != [g.shape for g in grads]:
        raise InferFastError(f"perturb_: {len(params)} parameters and {len(grads)} gradients don't pair up in shape.")
    if not params:
        return
    chosen = choose("perturb_", params[0], backend, DTYPES)
    alike = all(_layout(p) and p.dtype == params[0].dtype and p.device == params[0].device for p in params)
    if chosen == "reference" or not alike:
        reference(params, grads, rho)
    else:
        _perturb(list(params), list(grads), rho, chosen)
