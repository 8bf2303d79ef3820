"""adam_: one step of the solver for all lanes, with what belongs to it: schedule, broken lanes, bounds, counter.

    m = beta1 * m + (1 - beta1) * g,  v = beta2 * v + (1 - beta2) * g^2
    x = clamp(x - lr[t - 1] * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon)),  t = counter + 1

(Adam, arXiv 1412.6980, algorithm 1.) A lane whose gradient is not finite takes g = 0, so that it can't disturb anything
it shares memory with.
"""

from __future__ import annotations

import torch

from infer_fast.errors import InferFastError
from infer_fast.ops.backend import choose

BETAS, EPSILON = (0.5, 0.9), 1e-8
# Natively it is PyTorch too: what is optimised is small beside a pass.
DTYPES = {"native": (torch.float32,), "triton": (torch.float32,)}


def reference(
    optimised: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    gradient: torch.Tensor,
    lr: torch.Tensor,
    counter: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Plain PyTorch, any floating dtype, in place; nothing leaves the device. Arguments as adam_'s."""
    finite = gradient.flatten(1).isfinite().all(dim=1).view(-1, *[1] * (gradient.dim() - 1))
    g = torch.where(finite, gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))
    time = (counter + 1).to(optimised.dtype)
    (beta1, beta2), rate = BETAS, lr.index_select(0, counter)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    corrected = (v / (1 - beta2**time)).sqrt_().add_(EPSILON)
    optimised.sub_(m / (1 - beta1**time) * rate / corrected)
    if bounds is not None:
        low, high = (bound.view(-1, 1, 1) for bound in bounds)
        torch.minimum(torch.maximum(optimised, low, out=optimised), high, out=optimised)
    counter += 1


@torch.library.custom_op(
    "infer_fast::adam_",
    mutates_args=("optimised", "m", "v", "counter"),
    schema="(Tensor(a!) optimised, Tensor(b!) m, Tensor(c!) v, Tensor gradient, Tensor lr, Tensor(d!) counter, "
    "Tensor? low, Tensor? high) -> ()",
)
def _adam(
    optimised: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    gradient: torch.Tensor,
    lr: torch.Tensor,
    counter: torch.Tensor,
    low: torch.Tensor | None,
    high: torch.Tensor | None,
) -> None:
    """The triton backend; low and high: (C,), both or neither."""
    from infer_fast.kernels import adam as kernels

    bounds = None if low is None or high is None else (low.contiguous(), high.contiguous())
    kernels.adam(optimised, m, v, gradient.contiguous(), lr.contiguous(), counter, bounds, BETAS, EPSILON)


@_adam.register_fake
def _(
    optimised: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    gradient: torch.Tensor,
    lr: torch.Tensor,
    counter: torch.Tensor,
    low: torch.Tensor | None,
    high: torch.Tensor | None,
) -> None:
    return None


@torch.no_grad()
def adam_(
    optimised: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    gradient: torch.Tensor,
    lr: torch.Tensor,
    counter: torch.Tensor,
    *,
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
    backend: str | None = None,
) -> None:
    """One step in place, with betas 0.5 and 0.9; nothing waits for the device.

    optimised, m, v, gradient: (L, ..., C, H, W), one dtype, lanes first; lr: (T,), each iteration's learning rate;
    counter: int64 (1,), the iterations done, is moved on by one; bounds: the least and the most value of each channel,
    C elements each.
    Tensors that are not contiguous take the reference. Raises InferFastError for shapes that don't fit, or a forced
    backend that can't serve.
    """
    if not optimised.shape == m.shape == v.shape == gradient.shape or optimised.dim() < 4:
        shapes = ", ".join(str(tuple(t.shape)) for t in (optimised, m, v, gradient))
        raise InferFastError(f"adam_ takes optimised, m, v and gradient of one shape (L, ..., C, H, W), not {shapes}.")
    if bounds is not None:
        bounds = bounds[0].reshape(-1), bounds[1].reshape(-1)
        if not len(bounds[0]) == len(bounds[1]) == optimised.shape[-3]:
            raise InferFastError(f"adam_: {len(bounds[0])} bounds where there are {optimised.shape[-3]} channels.")
    chosen = choose("adam_", optimised, backend, DTYPES)
    dense = all(t.is_contiguous() and t.dtype == optimised.dtype for t in (optimised, m, v))
    if chosen != "triton" or not dense or gradient.dtype != optimised.dtype or optimised.numel() == 0:
        reference(optimised, m, v, gradient, lr, counter, bounds)
    else:
        _adam(optimised, m, v, gradient, lr, counter, *(bounds or (None, None)))
