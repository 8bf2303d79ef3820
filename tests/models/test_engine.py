"""Engines agree, and none of them waits for the device between two reads of the losses."""

from dataclasses import replace

import pytest
import torch

from infer_fast.errors import InferFastWarning
from infer_fast.models.engine import CaptureError, choose_engine, measured_convolutions
from infer_fast.models.execution import Execution
from infer_fast.synthesis import draw_views, solve
from infer_fast.synthesis.solver import Solver
from tests.synthesis.test_solver import SETTINGS, teacher_and_base


@pytest.mark.slow
def test_compiled_equals_eager(generator):
    network, base = teacher_and_base(generator, lanes=2)
    expected = solve(network, base, settings=SETTINGS, engine="eager")
    solver = Solver(network, settings=SETTINGS, execution=Execution(engine="compile"), chunk=2)
    for _ in range(2):  # the second time on what the first one compiled
        assert (solver.solve(base) - expected).norm() / expected.norm() < 1e-4


def test_auto_goes_on_eager_where_a_graph_fails_and_a_forced_graph_does_not(generator, monkeypatch):
    """A capture that breaks after an iteration, as a teacher with data-dependent control flow would have it."""

    def broken(iterate, restore):
        iterate()
        raise CaptureError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr("infer_fast.synthesis.solver.capture", broken)
    network, base = teacher_and_base(generator)
    expected = solve(network, base, settings=SETTINGS)
    solver = Solver(network, settings=SETTINGS)
    solver.execution = replace(solver.execution, engine="graph")  # as auto chooses it on CUDA
    with pytest.warns(InferFastWarning, match="not permitted.*going on eager"):
        assert torch.equal(solver.solve(base), expected)
    forced = Solver(network, settings=SETTINGS, execution=Execution(engine="eager"))
    forced.execution = replace(forced.execution, engine="graph")
    with pytest.raises(RuntimeError, match="not permitted"):
        forced.solve(base)


@pytest.mark.gpu
@pytest.mark.parametrize("optimise", ["compensator", "images"])
@pytest.mark.parametrize(
    ("engine", "chunk"), [("graph", None), ("graph", 3), ("compile", None), ("graph-compile", None)]
)
def test_engines_agree_on_a_gpu(generator, engine, chunk, optimise):
    network, base = teacher_and_base(generator)
    settings = replace(SETTINGS, optimise=optimise)
    network, base = network.cuda(), base.cuda()
    with measured_convolutions():  # the same algorithms for both: others would differ by more after 20 steps of Adam
        expected = solve(network, base, settings=settings, engine="eager", precision="float32")
    solver = Solver(network, settings=settings, execution=Execution("float32", engine), chunk=chunk)
    for _ in range(2):
        with measured_convolutions():
            found = solver.solve(base)
        assert (found - expected).norm() / expected.norm() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_nothing_waits_for_the_device_between_logs(generator, engine):
    network, base = teacher_and_base(generator)
    solver = Solver(network.cuda(), settings=SETTINGS, execution=Execution(engine=engine))
    solver.solve(base.cuda())
    views = draw_views(0, 0, [0, 1, 2], iterations=20, jitter=2).to(torch.device("cuda"))
    loop = solver.prepare(base.cuda(), views, torch.arange(base.shape[1], device="cuda"))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            loop.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_bfloat16_graphs_of_two_lane_counts_follow_each_other(generator):
    network, base = teacher_and_base(generator)
    solver = Solver(network.cuda(), settings=SETTINGS, lanes=2)
    assert solver.execution == Execution("bfloat16", "graph", any_engine=True)
    assert solver.solve(base.cuda()).isfinite().all()


def test_auto_is_a_graph_on_cuda_and_eager_elsewhere():
    assert choose_engine("auto", torch.device("cuda")) == "graph"
    assert choose_engine("auto", torch.device("cpu")) == "eager"
