"""What the launchers in infer_fast.kernels fill their outputs with, in plain PyTorch on CPU tensors.

Arguments as the launchers'. Masks are laid out anew (one bit per element, in the order of the elements), for only the
launchers read what they wrote.
"""

from __future__ import annotations

import torch
from torch.nn.functional import max_pool2d as pooled

from infer_fast.ops.adam import reference as stepped
from infer_fast.ops.bn_match import ACTIVATIONS, Statistics
from infer_fast.ops.bn_match import reference as bn_match
from infer_fast.ops.bn_match_operator import ACTIVATION_NUMBERS
from infer_fast.ops.compose import Quantised
from infer_fast.ops.compose import reference as composed
from infer_fast.ops.objective import reference as lane_loss
from infer_fast.ops.perturb import reference as perturb
from infer_fast.ops.scale_shift import reference as scaled
from infer_fast.synthesis.views import Views, _mapped, _maps, apply_view, circular_shift

__all__ = [
    "adam", "bn_match_backward", "bn_match_forward", "compose", "max_pool_backward", "max_pool_forward",
    "objective_backward", "objective_forward", "perturb", "scale_shift", "sum_back", "uncropped", "view",
]  # fmt: skip

NAMES = {number: name for name, number in ACTIVATION_NUMBERS.items()}
BITS = 2 ** torch.arange(8, dtype=torch.uint8)


def bn_match_forward(
    x, residual, weight, bias, running_mean, running_var, eps, activation, lanes, r_var, outputs
) -> None:
    y, penalty, mean, var, norms, mask = outputs
    z, own_penalty, own = bn_match(
        x.float(), weight, bias, running_mean, running_var, eps, residual=residual, lanes=lanes, r_var=r_var
    )
    y.copy_(ACTIVATIONS[NAMES[activation]](z))
    own_norms = [torch.linalg.vector_norm(d, dim=1) for d in (own.mean, own.var - running_var)]
    for tensor, value in (
        (penalty, own_penalty), (mean, own.mean), (var, own.var), (norms, torch.stack(own_norms, dim=1))
    ):  # fmt: skip
        tensor.copy_(value)
    if mask.numel():
        passed = (z > 0) & (z < (6 if NAMES[activation] == "relu6" else torch.inf))
        flat = torch.nn.functional.pad(passed.flatten().to(torch.uint8), (0, -passed.numel() % 8))
        packed = (flat.view(-1, 8) * BITS).sum(dim=1, dtype=torch.uint8)
        mask[: len(packed)] = packed


@torch.enable_grad()
def bn_match_backward(
    grad_y, grad_y2, grad_penalty, x, residual, weight, bias, running_mean, running_var, mean, var, norms, mask, eps,
    activation, lanes, r_var, outputs,
) -> None:  # fmt: skip
    grad_x, grad_residual = outputs
    leaf = x.float().requires_grad_(True)
    z, penalty, _ = bn_match(
        leaf, weight, bias, running_mean, running_var, eps, residual=residual, lanes=lanes, r_var=r_var,
        whole=Statistics(mean, var),
    )  # fmt: skip
    grad = grad_y.float() if grad_y2 is None else grad_y.float() + grad_y2.float()
    if mask.numel():
        bits = (mask[:, None] & BITS) > 0
        grad = grad * bits.flatten()[: x.numel()].view(x.shape)
    elif NAMES[activation] != "none":
        at = z.detach().requires_grad_(True)
        grad = torch.autograd.grad(ACTIVATIONS[NAMES[activation]](at), at, grad)[0]
    grad_x.copy_(torch.autograd.grad([z, penalty], leaf, [grad, grad_penalty])[0])
    if grad_residual is not None:
        grad_residual.copy_(grad)


def adam(optimised, m, v, gradient, lr, counter, bounds, betas, epsilon) -> None:
    stepped(optimised, m, v, gradient, lr, counter, bounds)


def objective_forward(logits, targets, penalty, arrived, r_bn, outputs) -> None:
    loss, sums = outputs
    sums.copy_(logits.float().logsumexp(dim=1))
    loss.copy_(lane_loss(logits, targets, penalty, r_bn))


def objective_backward(upstream, logits, targets, sums, r_bn, outputs) -> None:
    grad_logits, grad_penalty = outputs
    images, lanes = len(targets), len(upstream)
    of_losses = (logits.float() - sums[:, None]).exp()
    of_losses[torch.arange(len(logits)), targets.repeat(lanes)] -= 1
    grad_logits.copy_(of_losses * (upstream / images).repeat_interleave(images)[:, None])
    grad_penalty.copy_(r_bn * upstream)


def compose(base, base_index, compensators, compensator_index, shift, flip, lam, partner, statistics, out) -> None:
    mean, std = (tuple(row) for row in statistics.tolist())
    dense = None if compensators is None else Quantised(*compensators)
    known = None if compensators is None else compensator_index
    drawn = {"shift": shift, "flip": flip, "lam": lam, "partner": partner}
    out.copy_(composed(base, base_index, dense, known, **drawn, mean=mean, std=std, dtype=out.dtype))


def view(base, added, shift, crop, flip, counter, out) -> None:
    whole = base if added is None else base + added
    out.copy_(apply_view(whole, Views(shift, crop, flip).at(counter)).flatten(0, 1))


def sum_back(grad, shift, counter, out) -> None:
    total = grad.float().unflatten(0, (len(out), -1)).sum(dim=1)
    if shift is None:
        out.copy_(total)
    else:
        lanes = shift.shape[1]
        back = circular_shift(total.unflatten(0, (lanes, -1)), -shift.index_select(0, counter)[0])
        out.copy_(back.flatten(0, 1))


def uncropped(grad, shift, crop, flip, counter, out) -> None:
    rows, columns = _maps(Views(shift, crop, flip).at(counter), out.unsqueeze(1))
    out.copy_(_mapped(grad.unsqueeze(1), rows.transpose(-1, -2), columns.transpose(-1, -2)).squeeze(1))


def max_pool_forward(x, window, channels_last, outputs) -> None:
    y, position = outputs
    chosen, index = pooled(x.float(), *window, ceil_mode=True, return_indices=True)
    h, w = y.shape[2:]  # without ceil_mode the last windows are left out
    y.copy_(chosen[..., :h, :w])
    rows, columns = index[..., :h, :w] // x.shape[3], index[..., :h, :w] % x.shape[3]
    tops, lefts = starts_of(y, window)
    position.copy_((rows - tops) * window.kernel[1] + columns - lefts)


def max_pool_backward(grad_y, position, window, channels_last, grad_x) -> None:
    tops, lefts = starts_of(grad_y, window)
    index = position.long()
    index = (tops + index // window.kernel[1]) * grad_x.shape[3] + lefts + index % window.kernel[1]
    summed = torch.zeros(grad_x.shape).flatten(2)
    grad_x.copy_(summed.scatter_add_(2, index.flatten(2), grad_y.float().flatten(2)).view(grad_x.shape))


def starts_of(y, window) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row and column of each window, padding counted, (OH, 1) and (OW,)."""
    sides = zip(y.shape[2:], window.stride, window.padding, strict=True)
    rows, columns = (torch.arange(windows) * stride - padding for windows, stride, padding in sides)
    return rows.view(-1, 1), columns


def scale_shift(x, scale, shift, residual, activation, y) -> None:
    y.copy_(scaled(x, scale, shift, residual, NAMES[activation]))
