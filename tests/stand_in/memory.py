"""Device memory goes back by itself: Python's collector is off, but for the calls that the package makes.

What a device holds is counted by torch's own allocator, in bytes of live tensors.
"""

from __future__ import annotations

import functools
import gc
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from infer_fast.data.budget import Base
from infer_fast.models.execution import Execution
from infer_fast.models.surgery import MatchedTeacher
from infer_fast.models.teacher import Teacher
from infer_fast.settings import Recipe
from infer_fast.synthesis.plan import make_plan
from infer_fast.synthesis.problem import Problem
from infer_fast.synthesis.solver import Solver
from infer_fast.synthesis.tasks import Synthesis, synthesise
from infer_fast.synthesis.views import View
from tests.stand_in import training
from tests.stand_in.emulation import emulated
from tests.stand_in.engines import CLASSES, SETTINGS, trained

DEVICE = torch.device("cuda")


@contextmanager
def without_collector() -> Iterator[None]:
    """The stand-in, with nothing left to collect; what falls into a circle stays until the package collects it."""
    with emulated():
        gc.collect()
        torch.cuda.empty_cache()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            gc.collect()


@contextmanager
def held_at(kind: type, method: str) -> Iterator[list[int]]:
    """The bytes that the device holds each time a method begins."""
    found: list[int] = []
    whole: Callable[..., Any] = getattr(kind, method)

    @functools.wraps(whole)
    def noted(*args: Any, **kwargs: Any) -> Any:
        found.append(torch.cuda.memory_allocated())
        return whole(*args, **kwargs)

    with mock.patch.object(kind, method, noted):
        yield found


def check_a_replaced_teacher_leaves_nothing():
    names, size = ("convnet", "convnet-residual", "convnet-silu"), (16, 16)
    plan = make_plan(Recipe(arch_name=names, ipc=4, synthesis=SETTINGS), CLASSES, size, lanes=2)
    base = Base(torch.randint(0, 256, (CLASSES, plan.k, 3, *size), dtype=torch.uint8))
    with without_collector(), tempfile.TemporaryDirectory() as folder:
        teachers = [Teacher(name, trained(name, 16).to(DEVICE), 0.0, Path(), name) for name in names]
        work = Synthesis(plan, teachers, base, SETTINGS, Execution().on(DEVICE), [None] * len(names))
        with held_at(Solver, "solve") as held:
            assert synthesise(work, Path(folder), range(plan.k)) is not None
        assert len(held) == len(plan.batches) and set(held) == {held[0]}, f"bytes as each teacher's turn began: {held}"


def run_out(*, capturing: bool) -> None:
    """Four lanes run out of memory, as they are warmed up or captured, and two do not."""
    whole = Problem.loss_and_gradient

    def greedy(problem: Problem, optimised: torch.Tensor, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        results = whole(problem, optimised, view)
        if len(optimised) > 2 and torch.cuda.is_current_stream_capturing() == capturing:
            raise torch.OutOfMemoryError("the stand-in has no more")
        return results

    with without_collector(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        solver = Solver(trained("convnet", 16).to(DEVICE), settings=SETTINGS)
        base = torch.randn(4, CLASSES, 3, 16, 16, device=DEVICE)
        with mock.patch.object(Problem, "loss_and_gradient", greedy), held_at(MatchedTeacher, "__init__") as held:
            solver.solve(base)
        assert solver.lanes == 2 and solver.execution.engine == "graph"
        assert any("Out of memory with 4 lanes" in str(warning.message) for warning in said), said
        assert len(held) == 2 and held[0] == held[1], f"bytes before either attempt: {held}"


def check_running_out_of_memory_leaves_nothing():
    run_out(capturing=False)


def check_running_out_of_memory_inside_a_capture_leaves_nothing():
    run_out(capturing=True)


def check_each_adjusted_task_leaves_what_the_last_one_left():
    settings = replace(SETTINGS, optimise="images", steps=2, rho=0.1, r_var=11.0)
    with without_collector():
        solver, held = Solver(trained("convnet", 16).to(DEVICE), settings=settings), []
        for _ in range(3):
            solver.solve(torch.randn(1, CLASSES, 3, 16, 16, device=DEVICE))
            held.append(torch.cuda.memory_allocated())
        assert set(held) == {held[0]}, f"bytes after each task: {held}"


def check_teachers_that_labelled_leave_nothing():
    with without_collector():
        resident = training.instances(soft=True, compensated=True).to(DEVICE)
        teacher = training.build("resnet18", training.CLASSES, (training.SIZE,) * 2, seed=2).eval().to(DEVICE)
        teachers, held = [Teacher("resnet18", teacher, 0.0, Path(), "")], []
        for _ in range(3):
            network = training.build("convnet", training.CLASSES, (training.SIZE,) * 2, seed=1).to(DEVICE)
            training.weights(resident, network, training.ADAMW, training.PADDED, Execution(), teachers)
            del network
            held.append(torch.cuda.memory_allocated())
        assert set(held[1:]) == {held[1]}, f"bytes after each: {held}"


def check_a_trained_network_leaves_nothing():
    with without_collector():
        resident = training.instances(soft=True, compensated=True).to(DEVICE)
        held = []
        for _ in range(3):
            network = training.build("convnet", training.CLASSES, (training.SIZE,) * 2, seed=1).to(DEVICE)
            training.weights(resident, network, training.ADAMW, training.PADDED, Execution(), [])
            del network
            held.append(torch.cuda.memory_allocated())
        assert set(held[1:]) == {held[1]}, f"bytes after each: {held}"
