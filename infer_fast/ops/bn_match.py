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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from infer_fast.errors import InferFastError
from infer_fast.ops.backend import buffer, choose, native

DTYPES = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
}
KINDS = {name: position for position, name in enumerate(ACTIVATIONS)}  # what kernels and native code call them


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
    return Statistics(mean, var)


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


def _run_forward(
    x, residual, weight, bias, running_mean, running_var, whole_mean, whole_var, eps, activation, lanes, r_var, backend
):
    """(y, penalty (lanes,), mean - running_mean (lanes, C), biased var (lanes, C), mask uint8): native or triton.

    All of x's own; whole_mean and whole_var only take the place of mean and var in backward.
    """
    parameters = (weight, bias, running_mean, running_var, eps)
    outputs = _empty_outputs(x, residual, *parameters[:-1], None, None, eps, activation, lanes, r_var, backend)
    if backend == "triton":
        from infer_fast.kernels import bn_match as kernels

        kernels.forward(x, residual, *parameters, KINDS[activation], lanes, r_var, outputs)
        return outputs
    y, penalty, mean, var, mask = outputs
    tensors = (x, residual, weight, bias, running_mean, running_var, mean, var, _mask_or_none(mask), y, penalty)
    native().bn_match_forward(*_native_arguments(tensors, x, eps, r_var, lanes, activation))
    return outputs


def _empty_outputs(
    x, residual, weight, bias, running_mean, running_var, whole_mean, whole_var, eps, activation, lanes, r_var, backend
):
    c = x.shape[1]
    mask = _mask_bytes(x, lanes, backend) if residual is not None and activation in ("relu", "relu6") else 0
    statistics = [x.new_empty(s, dtype=torch.float32) for s in ((lanes,), (lanes, c), (lanes, c))]
    return torch.empty_like(x), *statistics, x.new_empty(mask, dtype=torch.uint8)


def _run_backward(
    grad_y, grad_penalty, x, residual, weight, bias, running_mean, running_var, mean, var, mask, eps, activation, lanes,
    r_var, backend, has_residual,
):  # fmt: skip
    """The gradients of x and (empty without one) of the residual: native or triton."""
    grad_y, grad_penalty = grad_y.to(x.dtype).contiguous(memory_format=_memory_format(x)), grad_penalty.contiguous()
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x) if has_residual else x.new_empty(0)
    outputs = grad_x, grad_residual if has_residual else None
    parameters = (x, residual, weight, bias, running_mean, running_var, mean, var)
    if backend == "triton":
        from infer_fast.kernels import bn_match as kernels

        kind = KINDS[activation]
        kernels.backward(grad_y, grad_penalty, *parameters, mask, eps, kind, lanes, r_var, outputs)
        return grad_x, grad_residual
    tensors = (*parameters, _mask_or_none(mask), grad_y, grad_penalty, *outputs)
    native().bn_match_backward(*_native_arguments(tensors, x, eps, r_var, lanes, activation))
    return grad_x, grad_residual


def _empty_gradients(
    grad_y, grad_penalty, x, residual, weight, bias, running_mean, running_var, mean, var, mask, eps, activation, lanes,
    r_var, backend, has_residual,
):  # fmt: skip
    return torch.empty_like(x), torch.empty_like(x) if has_residual else x.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, running_mean, running_var, whole_mean, whole_var, eps, *rest = inputs
    activation, lanes, r_var, backend = rest
    _, _, own_mean, own_var, mask = output
    mean, var = (own_mean, own_var) if whole_mean is None else (whole_mean, whole_var)
    kept = residual if activation == "silu" else None  # relu's derivative is in the mask, none's is 1
    ctx.save_for_backward(x, kept, weight, bias, running_mean, running_var, mean, var, mask)
    ctx.rest = (eps, activation, lanes, r_var, backend, residual is not None)
    ctx.mark_non_differentiable(own_mean, own_var, mask)
    ctx.set_materialize_grads(False)  # else each backward fills zeros for the three that have no gradient


def _gradients(backward, ctx, grad_y, grad_penalty) -> tuple:
    """What autograd takes for the forward's inputs; a gradient that did not come is zero."""
    saved, (_, _, lanes, *_, has_residual) = ctx.saved_tensors, ctx.rest
    grad_y = torch.zeros_like(saved[0]) if grad_y is None else grad_y
    grad_penalty = saved[0].new_zeros(lanes, dtype=torch.float32) if grad_penalty is None else grad_penalty
    grad_x, grad_residual = backward(grad_y, grad_penalty, *saved, *ctx.rest)
    return grad_x, grad_residual if has_residual else None, *[None] * 11


_forward = torch.library.custom_op(
    "infer_fast::bn_match",
    _run_forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
    "Tensor? whole_mean, Tensor? whole_var, float eps, str activation, int lanes, float r_var, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_forward.register_fake(_empty_outputs)

_backward = torch.library.custom_op(
    "infer_fast::bn_match_backward",
    _run_backward,
    mutates_args=(),
    schema="(Tensor grad_y, Tensor grad_penalty, Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, Tensor mask, float eps, str activation, "
    "int lanes, float r_var, str backend, bool has_residual) -> (Tensor, Tensor)",
)
_backward.register_fake(_empty_gradients)


def _operator_autograd(ctx, grad_y, grad_penalty, *_):
    return _gradients(_backward, ctx, grad_y, grad_penalty)


_forward.register_autograd(_operator_autograd, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same node without the dispatcher: in eager mode its Python layers would cost more than a small layer does."""

    @staticmethod
    def forward(ctx, *inputs):
        outputs = _run_forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx, grad_y, grad_penalty, *_):
        return _gradients(_run_backward, ctx, grad_y, grad_penalty)


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
    y, penalty, _ = _match(
        x, weight, bias, running_mean, running_var, eps, residual, activation, lanes, r_var, whole, backend
    )
    return y, penalty


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
    y, _, own = _match(x, weight, bias, running_mean, running_var, eps, residual, activation, lanes, 1.0, None, backend)
    return y, own


def _match(
    x, weight, bias, running_mean, running_var, eps, residual, activation, lanes, r_var, whole, backend
) -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    _check(x, running_mean, running_var, residual, activation, lanes)
    chosen = choose("bn_match", x, backend, DTYPES)
    trained = any(t is not None and t.requires_grad for t in (weight, bias))
    if chosen == "reference" or x.numel() == 0 or (trained and torch.is_grad_enabled()):
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
            whole=whole,
        )
    x = x if x.is_contiguous() or _is_channels_last(x) else x.contiguous()
    if residual is not None:
        residual = residual.to(x.dtype).contiguous(memory_format=_memory_format(x))
    vectors = [_float32(v) for v in (weight, bias, running_mean, running_var)]
    eager = type(x) is torch.Tensor and not torch.compiler.is_compiling()
    apply = _Eager.apply if eager else _forward
    both = (None, None) if whole is None else whole
    y, penalty, mean, var, _ = apply(x, residual, *vectors, *both, eps, activation, lanes, r_var, chosen)
    if whole is not None:
        value = penalty_of(whole, running_var, r_var)
        penalty = penalty + (value - penalty).detach()
    return y, penalty, Statistics(mean, var)


def _float32(vector: torch.Tensor | None) -> torch.Tensor | None:
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous() and not vector.requires_grad):
        return vector
    return vector.detach().float().contiguous()


def _mask_or_none(mask: torch.Tensor) -> torch.Tensor | None:
    return mask if mask.numel() else None


def _native_arguments(tensors, x, eps, r_var, lanes, activation) -> tuple:
    """What the native functions take: buffers, then numbers."""
    b, c, h, w = x.shape
    return (
        [buffer(t) for t in tensors],
        eps,
        r_var,
        lanes,
        b // lanes,
        c,
        h * w,
        x.dtype == torch.bfloat16,
        _is_channels_last(x),
        KINDS[activation],
        torch.get_num_threads(),
    )


def _is_channels_last(x: torch.Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if _is_channels_last(x) else torch.contiguous_format


def _mask_bytes(x: torch.Tensor, lanes: int, backend: str) -> int:
    """One bit per element. What begins at a byte of its own: a plane, or a channels_last pixel (triton); a large plane,
    an image of small planes, or a channels_last lane (native)."""
    b, c, h, w = x.shape
    channels_last = _is_channels_last(x)
    if backend == "triton":
        return b * h * w * -(-c // 8) if channels_last else b * c * -(-h * w // 8)
    if channels_last:
        return lanes * -(-(b // lanes) * c * h * w // 8)
    return b * -(-c * h * w // 8) if h * w <= native().BN_MATCH_SMALL_PLANE else b * c * -(-h * w // 8)


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
