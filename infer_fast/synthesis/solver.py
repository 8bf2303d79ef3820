"""The loop: Adam on the objective of infer_fast.synthesis.problem, several tasks of one teacher per batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from infer_fast.errors import InferFastError
from infer_fast.models.surgery import MatchedTeacher
from infer_fast.recipes import SynthesisSettings
from infer_fast.synthesis.problem import Problem, adjusted_teacher
from infer_fast.synthesis.views import Views, draw_views

BETA1, BETA2, EPSILON = 0.5, 0.9, 1e-8
LOG_EVERY = 50  # iterations between two reads of the loss buffer
ENGINES = ("auto", "eager")
PRECISIONS = ("auto", "float32", "bfloat16")


class NonFiniteLossError(InferFastError):
    """Some lanes' losses became NaN or infinite; the others ran to the end.

    failures: {lane: iteration (0-based)}; result: float32 (L, ...) as solve returns it, valid for the other lanes.
    """

    def __init__(self, failures: dict[int, int], result: torch.Tensor):
        self.failures, self.result = failures, result
        where = ", ".join(f"lane {lane} at iteration {iteration}" for lane, iteration in sorted(failures.items()))
        super().__init__(f"The loss became NaN or infinite in {where}: lower --lr or --r-bn.")


@dataclass
class AdamState:
    """Everything one iteration reads and writes; all on the device, indexed by a device counter.

    optimised, m, v: float32, what is optimised and Adam's moments; lr: float32 (T,); shift: int64 (T, L, 2);
    losses: float32 (T, L); counter: int64 (1,), the iterations done.
    """

    optimised: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    lr: torch.Tensor
    shift: torch.Tensor
    losses: torch.Tensor
    counter: torch.Tensor


def solve(
    teacher: nn.Module,
    base: torch.Tensor,
    *,
    settings: SynthesisSettings,
    views: Views | None = None,
    backend: str | None = None,
    engine: str = "auto",
    precision: str = "auto",
    targets: torch.Tensor | None = None,
    on_iteration: Callable[[range, int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Solves L tasks of one teacher side by side; the result of each does not depend on the others.

    teacher: any module with BatchNorm2d that maps (B, 3, H, W) to logits (B, classes); it is copied, never changed.
    base: float32 (L, C, 3, H, W), normalised. views: the random draws (T iterations, L lanes); by default those of
    tasks (teacher 0, index 0..L-1) under settings.seed. targets: int64 (C,), the class of each image of a lane
    (default 0..C-1). precision: bfloat16 runs the teacher under autocast, losses and u stay float32; auto is bfloat16
    on CUDA and float32 elsewhere. on_iteration(lanes, done, losses on the CPU, one for each of lanes) is called every
    LOG_EVERY iterations of these lanes.

    Returns the compensators, float32 (L, 3, H, W), or in image mode the images, float32 (L, C, 3, H, W).
    Raises NonFiniteLossError when a lane diverged (the others are in it), InferFastError for arguments that don't fit.
    """
    _check(base, settings, views, engine, precision, targets)
    lanes, classes = base.shape[:2]
    if targets is None:
        targets = torch.arange(classes, device=base.device)
    if views is None:
        views = draw_views(settings.seed, 0, list(range(lanes)), iterations=settings.iterations, jitter=settings.jitter)
    views = views.to(base.device)
    run = _Run(backend, precision, on_iteration)
    if settings.steps == 0:
        return run.together(teacher, base, targets, settings, views)
    return run.one_by_one(teacher, base, targets, settings, views)  # adjusted weights serve one task alone


@dataclass
class _Run:
    backend: str | None
    precision: str
    on_iteration: Callable[[range, int, torch.Tensor], None] | None

    def together(self, teacher, base, targets, settings, views, first_lane: int = 0) -> torch.Tensor:
        matched = MatchedTeacher(
            teacher,
            first_bn_multiplier=settings.first_bn_multiplier,
            r_var=settings.r_var,
            skip_bn=settings.skip_bn,
            backend=self.backend,
        )
        problem = Problem(matched, base, targets, settings, self.precision)
        state = start_state(problem, views)
        for iteration in range(settings.iterations):
            iterate(problem, state)
            done = iteration + 1
            if done % LOG_EVERY == 0 or done == settings.iterations:
                latest = state.losses[iteration].cpu()
                if self.on_iteration is not None:
                    self.on_iteration(range(first_lane, first_lane + len(base)), done, latest)
                if not latest.isfinite().any():
                    break
        result = state.optimised if settings.optimise == "images" else state.optimised[:, 0]
        failures = failed_lanes(state.losses[:done].cpu())
        if failures:
            raise NonFiniteLossError(failures, result)
        return result

    def one_by_one(self, teacher, base, targets, settings, views) -> torch.Tensor:
        results, failures = [], {}
        for lane in range(len(base)):
            own, lane_base = views.lane(lane), base[lane : lane + 1]
            adjusted = adjusted_teacher(teacher, lane_base, targets, settings, own)
            try:
                results.append(self.together(adjusted, lane_base, targets, settings, own, lane))
            except NonFiniteLossError as error:
                results.append(error.result)
                failures[lane] = error.failures[0]
        result = torch.cat(results)
        if failures:
            raise NonFiniteLossError(failures, result)
        return result


def start_state(problem: Problem, views: Views) -> AdamState:
    """Adam at rest, with the schedule and the views laid out on the device."""
    optimised = problem.start()
    device, settings = optimised.device, problem.settings
    return AdamState(
        optimised=optimised,
        m=torch.zeros_like(optimised),
        v=torch.zeros_like(optimised),
        lr=torch.tensor(cosine(settings.lr, settings.iterations), device=device),
        shift=views.shift,
        losses=torch.zeros(settings.iterations, len(optimised), device=device),
        counter=torch.zeros(1, dtype=torch.int64, device=device),
    )


def iterate(problem: Problem, state: AdamState) -> None:
    """One iteration: view, forward, penalty, backward, Adam, clamp. Nothing here waits for the device."""
    shift = state.shift.index_select(0, state.counter)[0]
    optimised = state.optimised.detach().requires_grad_(True)
    loss = problem.loss(optimised, shift)
    (gradient,) = torch.autograd.grad(loss.sum(), optimised)
    with torch.no_grad():
        state.losses.index_copy_(0, state.counter, loss.detach().unsqueeze(0))
        adam_step(state, gradient)
        problem.clamp_(state.optimised)
        state.counter += 1


def adam_step(state: AdamState, gradient: torch.Tensor) -> None:
    """Adam (arXiv 1412.6980, algorithm 1) with betas 0.5, 0.9 and this iteration's learning rate, in place.

    A lane whose gradient is not finite stays where it was, so that it can't disturb anything it shares memory with.
    """
    finite = gradient.flatten(1).isfinite().all(dim=1).view(-1, *[1] * (gradient.dim() - 1))
    gradient = torch.where(finite, gradient, torch.zeros((), device=gradient.device))
    lr = state.lr.index_select(0, state.counter)
    time = (state.counter + 1).to(torch.float32)
    state.m.lerp_(gradient, 1 - BETA1)
    state.v.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    corrected = (state.v / (1 - BETA2**time)).sqrt_().add_(EPSILON)
    state.optimised.sub_(state.m / (1 - BETA1**time) * lr / corrected)


def cosine(lr: float, iterations: int) -> list[float]:
    """lr_t = lr * (1 + cos(pi t / T)) / 2 for t = 0..T-1."""
    return [lr * (1 + math.cos(math.pi * t / iterations)) / 2 for t in range(iterations)]


def failed_lanes(losses: torch.Tensor) -> dict[int, int]:
    """{lane: first iteration whose loss is not finite} of losses (T, L)."""
    bad = ~losses.isfinite()
    return {lane: int(bad[:, lane].nonzero()[0]) for lane in range(losses.shape[1]) if bad[:, lane].any()}


def _check(base, settings, views, engine, precision, targets) -> None:
    if base.dim() != 5 or base.shape[2] != 3 or base.dtype != torch.float32:
        raise InferFastError(f"solve takes base as float32 (L, C, 3, H, W), not {base.dtype} {tuple(base.shape)}.")
    if engine not in ENGINES:
        raise InferFastError(f"{engine!r} is not an engine: choose one of {', '.join(ENGINES)}.")
    if precision not in PRECISIONS:
        raise InferFastError(f"{precision!r} is not a precision: choose one of {', '.join(PRECISIONS)}.")
    if settings.iterations < 1 or settings.jitter < 0 or settings.steps < 0:
        raise InferFastError("solve needs at least 1 iteration, and jitter and steps of at least 0.")
    expected = (settings.iterations, len(base), 2)
    if views is not None and tuple(views.shift.shape) != expected:
        raise InferFastError(f"views.shift must be (T, L, 2) = {expected}, not {tuple(views.shift.shape)}.")
    if targets is not None and tuple(targets.shape) != (base.shape[1],):
        raise InferFastError(
            f"targets must be ({base.shape[1]},), one class for each image, not {tuple(targets.shape)}."
        )
