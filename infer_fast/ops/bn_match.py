"""bn_match: eval-mode BatchNorm, the residual added to it, the activation after it, and the statistics penalty.

    y = act(weight * (x - running_mean) / sqrt(running_var + eps) + bias + residual)
    penalty = r_var * ||var - running_var||_2 + ||mean - running_mean||_2

mean and (biased) var are those of the op's input x over (batch, height, width) of one lane; the norms run over the
channels and are not squared (INFER, arXiv 2408.06927, eq. 5; DWA, arXiv 2409.17612, section 3 for r_var).

A batch that does not fit is passed in chunks, twice: once for the statistics of the whole (`bn_match_statistics`,
`pooled`), once for the gradients (`bn_match` with whole=): the penalty depends on x through mean and var alone, so each
chunk's share of its gradient follows from the whole's mean and var and from the chunk itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from infer_fast.errors import InferFastError
from infer_fast.ops.backend import choose
from infer_fast.ops.bn_match_operator import apply_operator, apply_operator_twice, dense_format, is_channels_last

DTYPES = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
}


class Statistics(NamedTuple):
    """Of one layer's input, for each lane and channel: mean - running_mean and the biased variance, each (lanes, C)."""

    mean: torch.Tensor
    var: torch.Tensor


def pooled(parts: Sequence[Statistics], counts: Sequence[int]) -> Statistics:
    """The statistics of chunks taken together, `counts` images in each (Chan et al. 1979: no cancellation)."""
    total = sum(counts)
    shares = [n / total for n in counts]
    mean = sum(share * part.mean for share, part in zip(shares, parts, strict=True))
    var = sum(share * (p.var + (p.mean - mean).square()) for share, p in zip(shares, parts, strict=True))
    return Statistics(mean, var)  # type: ignore[arg-type]  # sum() of no chunks is 0, which nobody asks for


def penalty_of(statistics: Statistics, running_var: torch.Tensor, r_var: float) -> torch.Tensor:
    """r_var * ||var - running_var||_2 + ||mean - running_mean||_2 of each lane, (lanes,)."""
    difference = statistics.var - running_var.to(statistics.var.dtype)
    return r_var * torch.linalg.vector_norm(difference, dim=1) + torch.linalg.vector_norm(statistics.mean, dim=1)


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
    whole: Statistics | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    """Plain PyTorch, differentiable by autograd, any floating dtype: y, penalty and x's own statistics.

    Shapes as in bn_match.
    """
    b, c, h, w = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    shift = running_mean.to(wide).view(1, c, 1, 1)
    centred = x.to(wide) - shift  # sums around running_mean: no cancellation when |mean| >> std
    var, mean = torch.var_mean(centred.reshape(lanes, b // lanes, c, h, w), dim=(1, 3, 4), correction=0)  # (lanes, C)
    own = Statistics(mean, var)
    penalty = penalty_of(own if whole is None else _as_chunk_of(whole, own), running_var, r_var)

    scale = torch.rsqrt(running_var.to(wide) + eps)
    scale = scale if weight is None else scale * weight.to(wide)
    z = centred * scale.view(1, c, 1, 1)
    if bias is not None:
        z = z + bias.to(wide).view(1, c, 1, 1)
    if residual is not None:
        z = z + residual.to(wide)
    return ACTIVATIONS[activation](z).to(x.dtype), penalty, own


def _as_chunk_of(whole: Statistics, chunk: Statistics) -> Statistics:
    """The whole's values, with the gradient they would have if the chunk's images were all there is."""
    square = chunk.var + chunk.mean.square()  # E[d^2]: var = E[d^2] - E[d]^2, linearised around the whole's mean
    var = square - 2 * whole.mean * chunk.mean
    return Statistics(whole.mean + chunk.mean - chunk.mean.detach(), whole.var + var - var.detach())


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
    whole: Statistics | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eval-mode BatchNorm (+ residual, + activation) and the penalty that matches x's statistics to the running ones.

    x: (lanes*B, C, H, W), the images of one lane side by side; weight, bias (or None), running_mean, running_var: (C,);
    residual: like x, or None; activation: none, relu, relu6 or silu. Gradients flow to x and residual; only the
    reference backend has those of weight and bias.
    whole: the statistics of a larger batch that x is a chunk of; the penalty is then the whole's, and its gradient is
    scaled as if x were all of it (multiply the penalty by the chunk's share of the images to get the chunk's part).
    Returns y, with x's shape, dtype and layout, and penalty, (lanes,) float32 (float64 for float64 input).
    Raises InferFastError for shapes or an activation that don't fit, or a forced backend that can't serve.
    """
    y, _, penalty, _ = _match(
        x, weight, bias, running_mean, running_var, eps, residual, activation, lanes, r_var, whole, False, backend
    )
    return y, penalty


def bn_match_twice(
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
    whole: Statistics | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bn_match's y, y once more, and the penalty. Arguments and errors as bn_match's.

    For a y that two operations take, one each: triton's backward adds their gradients while it reads them, which else
    is a pass over memory of autograd's own. The other backends have their sum made first, so nothing changes there.
    The two share their memory, so neither must be changed in place.
    """
    y, y2, penalty, _ = _match(
        x, weight, bias, running_mean, running_var, eps, residual, activation, lanes, r_var, whole, True, backend
    )
    return y, y2, penalty


def bn_match_statistics(
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
    backend: str | None = None,
) -> tuple[torch.Tensor, Statistics]:
    """bn_match's y, and x's own statistics in place of the penalty. Arguments and errors as bn_match's."""
    y, _, _, own = _match(
        x, weight, bias, running_mean, running_var, eps, residual, activation, lanes, 1.0, None, False, backend
    )
    return y, own


def _match(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    activation: str,
    lanes: int,
    r_var: float,
    whole: Statistics | None,
    twice: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Statistics]:
    """y, y once more if that is wanted (else the same tensor), penalty and x's own statistics."""
    _check(x, running_mean, running_var, residual, activation, lanes)
    chosen = choose("bn_match", x, backend, DTYPES)
    trained = any(t is not None and t.requires_grad for t in (weight, bias))
    if chosen == "reference" or x.numel() == 0 or (trained and torch.is_grad_enabled()):
        y, penalty, own = reference(
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
            whole=whole,
        )
        return y, y, penalty, own
    x = x if x.is_contiguous() or is_channels_last(x) else x.contiguous()
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=dense_format(x))
    vectors = [_float32(v) for v in (weight, bias, running_mean, running_var)]
    both = (None, None) if whole is None else whole
    inputs = (x, residual, *vectors, *both, eps, activation, lanes, r_var, chosen)
    y2, outputs = apply_operator_twice(*inputs) if twice else (None, apply_operator(*inputs))
    y, penalty, mean, var, *_ = outputs
    if whole is not None:
        value = penalty_of(whole, running_var, r_var)
        penalty = penalty + (value - penalty).detach()
    return y, y if y2 is None else y2, penalty, Statistics(mean, var)


def _float32(vector: torch.Tensor | None) -> torch.Tensor | None:
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous() and not vector.requires_grad):
        return vector
    return vector.detach().float().contiguous()


def _check(
    x: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    residual: torch.Tensor | None,
    activation: str,
    lanes: int,
) -> None:
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
