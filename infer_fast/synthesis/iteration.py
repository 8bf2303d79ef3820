"""One iteration: the objective of infer_fast.synthesis.problem, Adam, its schedule; nothing waits for the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from infer_fast.ops import adam_
from infer_fast.synthesis.problem import Problem
from infer_fast.synthesis.views import Views


@dataclass
class AdamState:
    """Everything one iteration reads and writes; all on the device, indexed by a device counter.

    optimised, m, v: float32, what is optimised and Adam's moments; lr: float32 (T,); views: T iterations of L lanes;
    losses: float32 (T, L); counter: int64 (1,), the iterations done.
    """

    optimised: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    lr: torch.Tensor
    views: Views
    losses: torch.Tensor
    counter: torch.Tensor


def start_state(problem: Problem, views: Views) -> AdamState:
    """Adam at rest, with the schedule and the views laid out on the device."""
    optimised = problem.start()
    device, settings = optimised.device, problem.settings
    return AdamState(
        optimised=optimised,
        m=torch.zeros_like(optimised),
        v=torch.zeros_like(optimised),
        lr=torch.tensor(cosine(settings.lr, settings.iterations), device=device),
        views=views.each(torch.clone),
        losses=torch.zeros(settings.iterations, len(optimised), device=device),
        counter=torch.zeros(1, dtype=torch.int64, device=device),
    )


def iterate(problem: Problem, state: AdamState, adam: Callable[..., None] = adam_) -> None:
    """One iteration: view, forward, penalty, backward, Adam, clamp. Nothing here waits for the device."""
    loss, gradient = problem.loss_and_gradient(state.optimised, state.views.at(state.counter))
    with torch.no_grad():
        state.losses.index_copy_(0, state.counter, loss.unsqueeze(0))
        adam(state.optimised, state.m, state.v, gradient, state.lr, state.counter, bounds=problem.bounds)


def cosine(lr: float, iterations: int) -> list[float]:
    """lr_t = lr * (1 + cos(pi t / T)) / 2 for t = 0..T-1."""
    return [lr * (1 + math.cos(math.pi * t / iterations)) / 2 for t in range(iterations)]
