"""bn_match's registered operator, which the native and triton backends serve; see infer_fast.ops.bn_match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from infer_fast.ops.backend import buffer, compiled

ACTIVATION_NUMBERS = {"none": 0, "relu": 1, "relu6": 2, "silu": 3}  # what kernels and native code call them
# y, penalty, mean, var, norms, mask
Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _run_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    whole_mean: torch.Tensor | None,
    whole_var: torch.Tensor | None,
    eps: float,
    activation: str,
    lanes: int,
    r_var: float,
    backend: str,
) -> Outputs:
    """(y, penalty (lanes,), mean - running_mean, biased var (lanes, C), norms, mask uint8): native or triton.

    All of x's own; whole_mean and whole_var only take the place of mean and var in backward. norms is what triton's
    backward wants of those, (lanes, 2): ||mean - running_mean|| and ||var - running_var||; empty from native.
    """
    parameters = (weight, bias, running_mean, running_var, eps)
    outputs = _empty_outputs(x, residual, *parameters[:-1], None, None, eps, activation, lanes, r_var, backend)
    if backend == "triton":
        from infer_fast.kernels import bn_match as kernels
        from infer_fast.kernels.bn_match_statistics import fill_norms

        kernels.forward(x, residual, *parameters, ACTIVATION_NUMBERS[activation], lanes, r_var, outputs)
        if whole_mean is not None and whole_var is not None:
            fill_norms(whole_mean, whole_var, running_var, outputs[4])
        return outputs
    y, penalty, mean, var, _, mask = outputs
    tensors = (x, residual, weight, bias, running_mean, running_var, mean, var, _mask_or_none(mask), y, penalty)
    compiled().bn_match_forward(*_native_arguments(tensors, x, eps, r_var, lanes, activation))
    return outputs


def _empty_outputs(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    whole_mean: torch.Tensor | None,
    whole_var: torch.Tensor | None,
    eps: float,
    activation: str,
    lanes: int,
    r_var: float,
    backend: str,
) -> Outputs:
    """What _run_forward fills; by itself, its fake."""
    c = x.shape[1]
    mask = _mask_bytes(x, lanes, backend) if residual is not None and activation in ("relu", "relu6") else 0
    sizes = (lanes,), (lanes, c), (lanes, c), (lanes, 2) if backend == "triton" else (0,)
    penalty, mean, var, norms = (x.new_empty(size, dtype=torch.float32) for size in sizes)
    return torch.empty_like(x), penalty, mean, var, norms, x.new_empty(mask, dtype=torch.uint8)


def _run_backward(
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
    activation: str,
    lanes: int,
    r_var: float,
    backend: str,
    has_residual: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and (empty without one) of the residual: native or triton.

    grad_y2: that of y given a second time, or None. triton adds it while it reads; native is given the sum.
    """
    if grad_y2 is not None and backend == "native":
        grad_y, grad_y2 = grad_y + grad_y2, None
    grad_y, grad_penalty = _dense(grad_y, x), grad_penalty.contiguous()
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x) if has_residual else x.new_empty(0)
    outputs = grad_x, grad_residual if has_residual else None
    parameters = (x, residual, weight, bias, running_mean, running_var, mean, var)
    if backend == "triton":
        from infer_fast.kernels import bn_match as kernels

        kind = ACTIVATION_NUMBERS[activation]
        grads = (grad_y, None if grad_y2 is None else _dense(grad_y2, x), grad_penalty)
        kernels.backward(*grads, *parameters, norms, mask, eps, kind, lanes, r_var, outputs)
        return grad_x, grad_residual
    tensors = (*parameters, _mask_or_none(mask), grad_y, grad_penalty, *outputs)
    compiled().bn_match_backward(*_native_arguments(tensors, x, eps, r_var, lanes, activation))
    return grad_x, grad_residual


def _empty_gradients(
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
    activation: str,
    lanes: int,
    r_var: float,
    backend: str,
    has_residual: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """_run_backward's fake."""
    return torch.empty_like(x), torch.empty_like(x) if has_residual else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, residual, weight, bias, running_mean, running_var, whole_mean, whole_var, eps, *rest = inputs
    activation, lanes, r_var, backend = rest
    _, _, own_mean, own_var, norms, mask = output
    mean, var = (own_mean, own_var) if whole_mean is None else (whole_mean, whole_var)
    kept = residual if activation == "silu" else None  # relu's derivative is in the mask, none's is 1
    ctx.save_for_backward(x, kept, weight, bias, running_mean, running_var, mean, var, norms, mask)
    ctx.rest = (eps, activation, lanes, r_var, backend, residual is not None)
    ctx.mark_non_differentiable(own_mean, own_var, norms, mask)
    ctx.set_materialize_grads(False)  # else each backward fills zeros for the four that have no gradient


def _gradients(
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ctx: Any,
    grad_y: torch.Tensor | None,
    grad_penalty: torch.Tensor | None,
    grad_y2: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """What autograd takes for the forward's inputs; a gradient that did not come is zero."""
    saved, (_, _, lanes, *_, has_residual) = ctx.saved_tensors, ctx.rest
    if grad_y is None:
        grad_y, grad_y2 = torch.zeros_like(saved[0]) if grad_y2 is None else grad_y2, None
    grad_penalty = saved[0].new_zeros(lanes, dtype=torch.float32) if grad_penalty is None else grad_penalty
    grad_x, grad_residual = backward(grad_y, grad_y2, grad_penalty, *saved, *ctx.rest)
    return grad_x, grad_residual if has_residual else None, *[None] * 11


_forward = torch.library.custom_op(
    "infer_fast::bn_match",
    _run_forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
    "Tensor? whole_mean, Tensor? whole_var, float eps, str activation, int lanes, float r_var, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_forward.register_fake(_empty_outputs)

_backward = torch.library.custom_op(
    "infer_fast::bn_match_backward",
    _run_backward,
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_y2, Tensor grad_penalty, Tensor x, Tensor? residual, Tensor? weight, "
    "Tensor? bias, Tensor running_mean, Tensor running_var, Tensor mean, Tensor var, Tensor norms, Tensor mask, "
    "float eps, str activation, int lanes, float r_var, str backend, bool has_residual) -> (Tensor, Tensor)",
)
_backward.register_fake(_empty_gradients)


def _operator_autograd(
    ctx: Any, grad_y: torch.Tensor | None, grad_penalty: torch.Tensor | None, *_: None
) -> tuple[torch.Tensor | None, ...]:
    return _gradients(_backward, ctx, grad_y, grad_penalty)


_forward.register_autograd(_operator_autograd, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same node without the dispatcher: in eager mode its Python layers would cost more than a small layer does."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Outputs:
        outputs = _run_forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, grad_y: torch.Tensor | None, grad_penalty: torch.Tensor | None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        _check_once()
        return _gradients(_run_backward, ctx, grad_y, grad_penalty)


class _Twice(torch.autograd.Function):
    """The same node that gives y once more, as a view: its two gradients come apart, and one backward takes both.

    An operator must not return a view of its output, so the node is around it; in eager mode, in its place.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
        ctx.plain = _eager(inputs[0])
        outputs = (_run_forward if ctx.plain else _forward)(*inputs)
        _setup_context(ctx, inputs, outputs)
        return *outputs, outputs[0].view_as(outputs[0])

    @staticmethod
    def backward(
        ctx: Any, grad_y: torch.Tensor | None, grad_penalty: torch.Tensor | None, *rest: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if ctx.plain:
            _check_once()
        return _gradients(_run_backward if ctx.plain else _backward, ctx, grad_y, grad_penalty, rest[-1])


def _check_once() -> None:
    """Raises RuntimeError in a backward that is to be differentiated again: the kernels' results would be constants."""
    if torch.is_grad_enabled():
        raise RuntimeError("bn_match has no second derivative but in the backend reference")


def _eager(x: torch.Tensor) -> bool:
    return type(x) is torch.Tensor and not torch.compiler.is_compiling()


def apply_operator(x: torch.Tensor, *rest: Any) -> Outputs:
    """The operator; in eager mode without the dispatcher. Arguments as _run_forward's."""
    return _Eager.apply(x, *rest) if _eager(x) else _forward(x, *rest)


def apply_operator_twice(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, Outputs]:
    """(y once more, what apply_operator gives): the same memory, but each y has a gradient of its own."""
    *outputs, y2 = _Twice.apply(x, *rest)
    return y2, tuple(outputs)


def _dense(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """grad in x's dtype and layout."""
    return grad.to(x.dtype).contiguous(memory_format=dense_format(x))


def _mask_or_none(mask: torch.Tensor) -> torch.Tensor | None:
    return mask if mask.numel() else None


def _native_arguments(
    tensors: Sequence[torch.Tensor | None], x: torch.Tensor, eps: float, r_var: float, lanes: int, activation: str
) -> tuple[object, ...]:
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
        is_channels_last(x),
        ACTIVATION_NUMBERS[activation],
        torch.get_num_threads(),
    )


def is_channels_last(x: torch.Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense_format(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _mask_bytes(x: torch.Tensor, lanes: int, backend: str) -> int:
    """Bytes of the mask, as the backend lays out its bits."""
    if backend == "triton":
        from infer_fast.kernels import bn_match as kernels

        return kernels.mask_bytes(x, lanes)
    b, c, h, w = x.shape
    return compiled().bn_match_mask_bytes(lanes, b // lanes, c, h * w, is_channels_last(x))
