"""The loop: iterations of infer_fast.synthesis.iteration under an engine, several tasks of one teacher per batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn

from infer_fast.errors import InferFastError, InferFastWarning, out_of_memory
from infer_fast.models.engine import CaptureError, capture, compiled, compiling, release
from infer_fast.models.execution import AUTO, Execution
from infer_fast.models.surgery import MatchedTeacher
from infer_fast.ops.adam import adam_
from infer_fast.ranges import check, check_counts
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis.arguments import blame, check_targets, check_tasks, check_teacher
from infer_fast.synthesis.iteration import AdamState, iterate, start_state
from infer_fast.synthesis.problem import Problem, adjusted_teacher
from infer_fast.synthesis.views import Views, draw_views

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.10 has none

LOG_EVERY = 50  # iterations between two reads of the loss buffer

OnIteration = Callable[[range, int, torch.Tensor], None]


class NonFiniteLossError(InferFastError):
    """Some lanes' losses became NaN or infinite; the others ran to the end.

    failures: {lane: iteration (0-based)}; causes: {lane: what is to blame, in words}; result: float32 (L, ...) as solve
    returns it, valid for the other lanes.
    """

    def __init__(self, failures: dict[int, int], causes: dict[int, str], result: torch.Tensor):
        self.failures, self.causes, self.result = failures, causes, result
        where = [f"lane {lane} at iteration {failures[lane]} ({causes[lane]})" for lane in sorted(failures)]
        super().__init__(f"The loss became NaN or infinite in {', '.join(where)}.")


class ExecutionOptions(TypedDict, total=False):
    """The fields of Execution as arguments; backend None is auto."""

    precision: str
    engine: str
    backend: str | None


def solve(
    teacher: nn.Module,
    base: torch.Tensor,
    *,
    settings: SynthesisSettings,
    views: Views | None = None,
    targets: torch.Tensor | None = None,
    **execution: Unpack[ExecutionOptions],
) -> torch.Tensor:
    """Solves L tasks of one teacher side by side; the result of each does not depend on the others.

    teacher: any module with BatchNorm2d that maps (B, 3, H, W) to logits (B, classes); it is copied, never changed.
    base: float32 (L, C, 3, H, W), normalised. views: the random draws (T iterations, L lanes); by default those of
    tasks (teacher 0, index 0..L-1) under settings.seed. targets: int64 (C,), the class of each image of a lane
    (default 0..C-1). execution: precision="auto", engine="auto", backend=None, see infer_fast.models.execution. Solver
    has the rest: bounds on lanes and chunks, losses along the way, many batches of one teacher.

    Returns the compensators, float32 (L, 3, H, W), or in image mode the images, float32 (L, C, 3, H, W).
    Raises NonFiniteLossError when a lane diverged (the others are in it), InferFastError for arguments that don't fit.
    """
    return Solver(teacher, settings=settings, execution=_execution(**execution)).solve(base, views, targets)


def _execution(precision: str = "auto", engine: str = "auto", backend: str | None = None) -> Execution:
    return Execution(precision, engine, "auto" if backend is None else backend)


class Solver:
    """solve() for many batches of one teacher: the matched teacher, and what the engine made of it, are kept.

    lanes: at most so many tasks in one batch (None: all); chunk: at most so many images of a lane in one pass (None:
    all C; the result is the same). Both are halved, with a warning, when the memory does not suffice. The other
    arguments, results and errors are those of solve().
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        settings: SynthesisSettings,
        execution: Execution = AUTO,
        lanes: int | None = None,
        chunk: int | None = None,
    ):
        check(settings)
        check_counts(lanes=lanes, chunk=chunk)
        check_teacher(teacher)
        self.device = next(teacher.parameters(), torch.empty(0)).device
        self.teacher, self.settings, self.execution = teacher, settings, execution.on(self.device)
        self.lanes, self.chunk = lanes, chunk
        self._matched: MatchedTeacher | None = None
        self._loop: Loop | None = None
        self._classes = 1  # outputs that the tasks need of the teacher

    def solve(
        self,
        base: torch.Tensor,
        views: Views | None = None,
        targets: torch.Tensor | None = None,
        on_iteration: OnIteration | None = None,
    ) -> torch.Tensor:
        """The tasks of `base`, in batches of at most self.lanes; see solve()."""
        settings = self.settings
        check_tasks(base, views, settings.iterations, self.device)
        count = len(base)
        targets = torch.arange(base.shape[1]) if targets is None else targets
        self._classes = check_targets(targets, base.shape[1])
        targets = targets.to(base.device)
        if views is None:
            size, iterations = (base.shape[3], base.shape[4]), settings.iterations
            views = draw_views(
                settings.seed, 0, list(range(count)), iterations=iterations, jitter=settings.jitter, size=size
            )
        views = views.to(base.device)
        self._check(base)
        done, results = 0, []
        failures: dict[int, int] = {}
        while done < count:
            # adjusted weights serve one task alone
            most = 1 if settings.steps else count if self.lanes is None else self.lanes
            lanes = range(done, min(count, done + most))
            outcome = self._try(base, views, targets, lanes, on_iteration)
            if outcome is not None:
                results.append(outcome[0])
                failures |= {lanes[lane]: iteration for lane, iteration in outcome[1].items()}
                done = lanes.stop
        result = torch.cat(results)
        if failures:
            causes = {lane: blame(base[lane], settings, iteration) for lane, iteration in failures.items()}
            raise NonFiniteLossError(failures, causes, result)
        return result

    def _try(self, base, views, targets, lanes: range, on_iteration) -> tuple[torch.Tensor, dict[int, int]] | None:
        """The result and the failed lanes of one batch; None when that took too much memory and less was settled on."""
        own, own_views = base[lanes.start : lanes.stop], views.lanes(lanes)
        try:
            return self._batch(own, own_views, targets, lanes, on_iteration)
        except Exception as error:
            if not out_of_memory(error):
                raise
            smaller = self._settle_for_less(len(lanes), base.shape[1])
            if smaller is None:
                raise
        warnings.warn(f"Out of memory with {smaller}.", InferFastWarning, stacklevel=4)
        self._forget()  # outside the except block, which holds on to the frames that ran out
        return None

    def _settle_for_less(self, lanes: int, images: int) -> str | None:
        """Halves the lanes, then the chunk; says so in words, or None if there is nothing left to halve."""
        if self._matched is not None and self._matched.mixes_images:
            return None
        chunk = images if self.chunk is None else min(self.chunk, images)
        if lanes > 1:
            self.lanes = lanes // 2
            return f"{lanes} lanes: going on with {self.lanes}"
        if chunk > 1:
            self.chunk = -(-chunk // 2)
            return f"{chunk} images in one pass: going on with chunks of {self.chunk} images, matched as one batch"
        return None

    def _forget(self) -> None:
        self._matched = self._loop = None
        release()

    def _batch(self, base, views, targets, lanes: range, on_iteration) -> tuple[torch.Tensor, dict[int, int]]:
        loop = self.prepare(base, views, targets)
        state, iterations = loop.state, self.settings.iterations
        for done in range(1, iterations + 1):
            loop.step()
            if done % LOG_EVERY == 0 or done == iterations:
                latest = state.losses[done - 1].cpu()
                if on_iteration is not None:
                    on_iteration(lanes, done, latest)
                if not latest.isfinite().any():
                    break
        result = state.optimised if self.settings.optimise == "images" else state.optimised[:, 0]
        return result.clone(), failed_lanes(state.losses[:done].cpu())

    def prepare(self, base: torch.Tensor, views: Views, targets: torch.Tensor) -> Loop:
        """The loop for these tasks, ready to step: the last one with its data replaced if it fits, else a new one."""
        matched = self._ready()
        if self.settings.steps:
            matched.take(adjusted_teacher(self.teacher, base, targets, self.settings, views, self._classes))
        if self._loop is None or not self._loop.takes(base, views):
            self._let_go()
            problem = Problem(
                matched,
                base.clone(),
                targets.clone(),
                self.settings,
                self.execution.precision,
                self.chunk,
                self.execution.forced_backend,
                self._classes,
            )
            self._loop = self._start(problem, start_state(problem, views))
        else:
            self._loop.problem.require(self._classes)
            self._loop.take(base, views, targets)
        return self._loop

    def _let_go(self) -> None:
        """Frees what the last loop holds before the next one is made."""
        if self._loop is not None:
            self._loop = None
            release()

    def _start(self, problem: Problem, state: AdamState) -> Loop:
        """The loop under the engine; eager, with a warning, if auto chose a graph and the teacher can't be captured."""
        try:
            return Loop(problem, state, self.execution.engine)
        except CaptureError as error:
            if not self.execution.any_engine:
                raise
            reason = str(error)
        self.execution = replace(self.execution, engine="eager")
        warnings.warn(f"No CUDA graph of this teacher ({reason}): going on eager.", InferFastWarning, stacklevel=5)
        loop = Loop(problem, state, "eager")
        loop.restart()  # from whatever the attempt left behind
        return loop

    def _check(self, base: torch.Tensor) -> None:
        """Holds the matched teacher against the given one, once, in values; where an image's logits depend on the
        others of its batch, tasks and chunks stay apart."""
        if self._matched is not None:
            return
        matched = self._ready()
        matched.check(base[0])
        if matched.mixes_images and (self.lanes != 1 or self.chunk is not None):
            self.lanes, self.chunk = 1, None
            kind = type(self.teacher).__name__
            warnings.warn(
                f"{kind} makes an image's logits of the images beside it: one task at a time, and all its images.",
                InferFastWarning,
                stacklevel=3,
            )

    def _ready(self) -> MatchedTeacher:
        """The matched teacher, made where there is none."""
        if self._matched is None:
            self._matched = self._match()
        return self._matched

    def _match(self) -> MatchedTeacher:
        return MatchedTeacher(
            self.teacher,
            first_bn_multiplier=self.settings.first_bn_multiplier,
            r_var=self.settings.r_var,
            skip_bn=self.settings.skip_bn,
            backend=self.execution.forced_backend,
        )


class Loop:
    """One batch of tasks under an engine: step() is one iteration. take() puts other tasks in the same tensors."""

    def __init__(self, problem: Problem, state: AdamState, engine: str):
        self.problem, self.state, self.engine = problem, state, engine
        self.adam: Callable[..., None] = adam_
        if engine in ("compile", "graph-compile"):
            self.adam = compiled(problem.teacher, adam_)
        self.replay = capture(self._iterate, self.restart) if engine in ("graph", "graph-compile") else None

    def step(self) -> None:
        """One iteration."""
        if self.replay is not None:
            self.replay()
        else:
            self._iterate()

    def _iterate(self) -> None:
        if self.adam is adam_:
            iterate(self.problem, self.state)
        else:
            with compiling():
                iterate(self.problem, self.state, self.adam)

    def takes(self, base: torch.Tensor, views: Views) -> bool:
        """Whether these tasks fit the tensors that are there."""
        return self.problem.base.shape == base.shape and (self.state.views.crop is None) == (views.crop is None)

    def take(self, base: torch.Tensor, views: Views, targets: torch.Tensor) -> None:
        """Other tasks of the same shape, at iteration 0."""
        self.problem.base.copy_(base)
        self.problem.targets.copy_(targets)
        for own, given in zip(vars(self.state.views).values(), vars(views).values(), strict=True):
            if own is not None:
                own.copy_(given)
        self.restart()

    def restart(self) -> None:
        """Back to iteration 0 of the same tasks."""
        state = self.state
        state.optimised.copy_(self.problem.start())
        for tensor in (state.m, state.v, state.losses, state.counter):
            tensor.zero_()


def failed_lanes(losses: torch.Tensor) -> dict[int, int]:
    """{lane: first iteration whose loss is not finite} of losses (T, L)."""
    bad = ~losses.isfinite()
    return {lane: int(bad[:, lane].nonzero()[0]) for lane in range(losses.shape[1]) if bad[:, lane].any()}
