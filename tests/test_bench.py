"""What the benchmarks share: tables, pictures, limits."""

import json
import os
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import distill, measure, ops, plot, published, roofline, train
from bench.apart import Apart
from infer_fast.models import build
from infer_fast.models.execution import Execution
from infer_fast.models.surgery import MatchedTeacher
from infer_fast.models.teacher import Teacher
from infer_fast.models.train import Schedule, Training, fit, soft_loss
from infer_fast.settings import SynthesisSettings
from infer_fast.students.labels import averaged_logits
from infer_fast.synthesis import draw_views


def test_every_committed_result_names_its_machine_and_can_be_tabled():
    found = list(plot.RESULTS.glob("*.json"))
    assert {p.stem.split("-")[0] for p in found} >= {"distill", "ops", "memory", "train", "pipeline", "profile"}
    for path in found:
        result = json.loads(path.read_text())
        assert {"device", "torch", "date", "threads"} <= set(result["machine"])
        lines = measure.table(result["rows"]).splitlines()
        assert len(lines) == 2 + len(result["rows"]) and len({line.count(" | ") for line in lines}) == 1


@pytest.mark.parametrize("name", ["distill-cpu", "ops-cpu"])
def test_results_are_drawn(tmp_path, name):
    with Image.open(plot.draw(plot.RESULTS / f"{name}.json", tmp_path)) as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(2**24)) > 20


def test_functions_are_timed_in_turn():
    calls = []
    taken = measure.milliseconds_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b"] * 4 and set(taken) == {"a", "b"} and min(taken.values()) >= 0


def test_turns_have_several_calls_each():
    calls = []

    def way(name: str, times: int) -> list[float]:
        calls.append((name, times))
        return [float(len(calls))] * times

    taken = measure.in_turns({n: partial(way, n) for n in "ab"}, rounds=3, each=2)
    assert calls == [("a", 2), ("b", 2)] * 3 and taken == {"a": 3.0, "b": 4.0}


@pytest.mark.slow
def test_a_way_is_made_timed_and_freed_before_the_next_and_left_out_where_it_does_not_fit():
    alive: weakref.WeakSet = weakref.WeakSet()
    calls = []

    class Made:
        def __call__(self) -> None:
            calls.append(len(alive))

    def make() -> Made:
        made = Made()
        alive.add(made)
        return made

    def too_large() -> Made:
        raise torch.OutOfMemoryError

    taken = measure.made_in_turn({"a": make, "huge": too_large, "b": make}, 2)
    assert calls == [1] * 4 and not alive and list(taken) == ["a", "b"]
    assert min(taken["a"].set_up, taken["b"].run) >= 0


def test_every_input_is_read_before_any_comes_back(generator, monkeypatch):
    assert measure.rotated_bytes() >= min(2 * measure.last_level_cache(), measure.MOST_ROTATED)
    monkeypatch.setattr(measure, "rotated_bytes", lambda: 10_000)
    assert [measure.copies(n) for n in (1, 3_000, 50_000)] == [10_000, 4, 2]
    layers, order = ops.Layers((2, 3, 5, 5), True, torch.float32), []

    def forward(x: torch.Tensor) -> tuple[torch.Tensor]:
        order.append(x.data_ptr())
        y = 2 * x
        y.register_hook(lambda _: order.append(x.data_ptr()))
        return (y,)

    gradient = layers.through(forward)
    assert torch.equal(gradient, 2 * layers.pairs[0][1])
    places = [x.data_ptr() for x, _ in layers.pairs]
    assert len(set(places)) == 17 and order == places * 2  # 600 bytes each
    row = ops.bn_match_row((2, 3, 5, 5), False, torch.float32, 1e9, 1, None)
    assert row["ours ms"] > 0 and row["share of copy bandwidth"] > 0


def test_the_epoch_that_counts_begins_where_its_first_batch_is_asked_for(monkeypatch):
    now, taken = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow_batches():
        for seconds in (7.0, 1.0, 3.0, 1.0):  # two epochs of two batches, each of which begins slowly
            now[0] += seconds
            yield (seconds,)

    watch = train.Watch(updates=2, warm=1)
    for (batch,) in watch.over(slow_batches()):
        now[0] += 0.5
        taken.append(batch)
    assert taken == [7.0, 1.0, 3.0, 1.0] and watch.epochs == 2
    assert watch.epoch == 5.0 and watch.set_up == 9.0 - 5.0


CASE = distill.Case(("convnet",), 4, 8, 2, 3, 1)


def test_both_ways_of_distilling_are_timed_at_their_steady_pace(generator):
    teacher = build("convnet", 4, (8, 8), seed=0).eval()
    base, views = torch.randn(2, 4, 3, 8, 8, generator=generator), draw_views(0, 0, [0, 1], iterations=3, jitter=1)
    settings = SynthesisSettings(iterations=3, lr=0.01, batch_size=4)
    for run in (
        distill.the_published_way(teacher, base, settings, views),
        distill.ours(teacher, settings, "float32", base, views),
    ):
        for _ in range(2):  # and again from the start
            run()
    assert distill.agrees("convnet", teacher, base, settings, views)


def test_a_way_that_does_not_fit_leaves_its_columns_empty():
    rates, seconds = (
        {"float32": 1e12, "bfloat16": 2e12},
        {"float32": 30.0, "floor float32": 20.0, "floor bfloat16": 10.0},
    )
    ours = {way: measure.Taken(1000.0, t) for way, t in seconds.items()}
    whole = ours | {"published": measure.Taken(500.0, 60.0), "bfloat16": measure.Taken(1.0, 15.0)}
    fits, partly, never = (distill.row("a", CASE, taken, 10**9, rates) for taken in (whole, ours, {}))
    assert fits["best"] == "bfloat16" and fits["published / best"] == pytest.approx(4)
    assert partly["published / best"] is None and partly["published / floor"] is None and partly["best"] == "float32"
    both, lacking, failed = (distill.total_row(rows) for rows in ([fits, fits], [fits, partly], [fits, never]))
    assert both["published / best"] == pytest.approx(4) and both["published ms"] == pytest.approx(40)
    assert both["published / floor"] == pytest.approx(6) and both["float32 set-up s"] == pytest.approx(2)
    assert lacking["published / best"] is None and lacking["published ms"] is None
    assert both["share of matrix rate"] == pytest.approx(1e9 / 2e12 / 5e-3)
    assert failed["published / best"] is None and failed["share of matrix rate"] is None


def sleeper(seconds: float, file: Path) -> Callable[[], None]:
    def sleep() -> None:
        time.sleep(seconds)
        with file.open("a") as out:
            print(os.getpid(), file=out)

    return sleep


@pytest.mark.slow
def test_a_way_is_timed_in_a_process_of_its_own(tmp_path):
    file = tmp_path / "calls"
    with Apart() as apart:
        apart.make(sleeper, 0.02, file)
        taken = apart.milliseconds(3)
        with pytest.raises(RuntimeError, match="division"):
            apart.make(divmod, 1, 0)
    process = {int(line) for line in file.read_text().split()}
    assert len(taken) == 3 and min(taken) >= 20
    assert len(file.read_text().split()) == 4  # one to warm up
    assert len(process) == 1 and process != {os.getpid()}


def test_operations_of_an_iteration_are_those_of_its_convolutions():
    """One 3x3 convolution from 3 to 32 channels at 8x8: 2 * 9 * 3 * 32 * 64 operations forward, as many backward."""
    teacher = build("convnet", 5, (8, 8), seed=0)
    convolutions = [(3, 32, 64), (32, 64, 16), (64, 128, 4)]
    expected = 2 * sum(2 * 9 * i * o * pixels for i, o, pixels in convolutions) + 2 * 2 * 128 * 5
    assert distill.flops(teacher, torch.zeros(2, 6, 3, 8, 8)) == 2 * 6 * expected


def test_the_published_trainer_and_ours_take_the_same_steps(generator):
    """The loss at each step, and the logits after three."""
    images = torch.randn(8, 3, 16, 16, generator=generator)
    targets = 9 * torch.randn(8, 5, generator=generator)
    theirs, ours = (build("convnet128", 5, (16, 16), seed=0) for _ in range(2))
    trainer, loss, losses = published.Trainer(theirs, 3.0), soft_loss(3.0), []

    def recorded(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses.append(loss(logits, targets))
        return losses[-1]

    expected = [trainer.step(images, targets) for _ in range(3)]
    schedule = Schedule("adamw", 1e-3, 0.01, 0.9, updates=3, updates_per_epoch=3)
    fit(ours, Training([(images, targets)] * 3, recorded), schedule, Execution("float32", "eager"))
    assert [x.item() for x in losses] == pytest.approx(expected, rel=1e-3)
    with torch.no_grad():
        got, want = ours(images), theirs(images)
    assert (got - want).norm() / want.norm() < 1e-2


def test_the_published_labels_are_ours(generator):
    images = torch.randn(70, 3, 8, 8, generator=generator)  # more than one of their batches
    networks = [build(name, 5, (8, 8), seed=0).eval() for name in ("convnet", "convnet-silu")]
    teachers = [Teacher("convnet", network, 0.0, Path(), "") for network in networks]
    with torch.no_grad():
        ours = averaged_logits(teachers, lambda p: images[p], len(images))
    expected = published.label(images, networks, torch.device("cpu"))
    torch.testing.assert_close(ours, expected.half().float(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["convnet", "convnet-separable", "convnet-silu"])
def test_the_trace_of_an_iteration_has_the_operations_of_its_floor(name):
    teacher = build(name, 6, (8, 8), seed=0).eval()
    kernels = roofline.iteration(teacher, 6, 8)
    assert sum(k.operations for k in kernels) == distill.flops(teacher, torch.zeros(1, 6, 3, 8, 8))
    matched = [k for k in kernels if k.name.startswith("infer_fast.bn_match")]
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in teacher.modules())
    assert len(matched) == 2 * norms and sum(k.launches for k in matched) == 3 * norms  # two forward, one backward
    assert [k.launches for k in kernels if k.name == "infer_fast.adam_.default"] == [2]


def test_the_trace_has_max_pooling_as_a_gpu_has_it():
    teacher = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1), nn.Flatten()).eval()
    kernels = {k.name: k for k in roofline.iteration(teacher, 5, 8) if "max_pool" in k.name}
    inside, outside = 5 * 8 * 64, 5 * 8 * 16  # elements, in bfloat16; a byte is the position in the window
    assert {name: (k.launches, k.moved) for name, k in kernels.items()} == {
        "infer_fast.max_pool.default": (1, 2 * inside + 3 * outside),
        "infer_fast.max_pool_backward.default": (1, 2 * inside + 3 * outside),
    }


def test_the_bytes_of_a_tiny_network_are_those_counted_by_hand():
    """5 images of 4x4 in float32 through a 1x1 convolution from 3 to 8 channels and a BatchNorm, and back."""
    network = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)).eval()
    matched = MatchedTeacher(network, backend="native")
    matched.check(torch.zeros(1, 3, 4, 4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, upstream = torch.empty(5, 3, 4, 4, requires_grad=True), torch.empty(5, 8, 4, 4)
        channels_last = x.contiguous(memory_format=torch.channels_last).detach().requires_grad_()
        upstream = upstream.contiguous(memory_format=torch.channels_last)
        kernels = roofline.record(lambda: torch.autograd.grad(matched(channels_last)[0], channels_last, upstream))
    by_name = {k.name: k for k in kernels}
    inside, outside, weight, vector = 4 * 5 * 3 * 16, 4 * 5 * 8 * 16, 4 * 3 * 8, 4 * 8
    assert by_name["aten.convolution.default"].moved == inside + weight + outside
    # x, weight, bias and the running statistics are read, and y, the penalty, the batch's statistics and norms written
    assert by_name["infer_fast.bn_match.default"].moved == outside + 4 * vector + outside + 4 + 2 * vector + 8
    # what flows back, x, the six vectors and the norms are read, and the gradient written
    flowing_back = by_name["infer_fast.bn_match_backward.default"].moved
    assert flowing_back == outside + 4 + outside + 6 * vector + 8 + outside
    assert (
        by_name["aten.convolution_backward.default"].moved == outside + 4 + weight + inside
    )  # 4: a shape without memory
    assert by_name["aten.convolution_backward.default"].operations == 2 * 3 * 8 * 5 * 16
    slow = roofline.Kernel("", 2, int(roofline.MEMORY), int(roofline.MATRIX // 2))
    assert slow.seconds == pytest.approx(1 + 2 * roofline.LAUNCH)


class Junction(nn.Module):
    """A 1x1 convolution and a BatchNorm, whose result two convolutions take."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = (nn.Conv2d(8, 8, 1, bias=False) for _ in range(2))

    def forward(self, x):
        z = self.norm(self.first(x))
        return self.left(z) + self.right(z)


def test_a_second_gradient_is_read_by_bn_match_and_added_by_nobody_else():
    """5 images of 4x4 in float32."""
    matched = MatchedTeacher(Junction().eval(), backend="native")
    matched.check(torch.zeros(1, 3, 4, 4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(5, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
        upstream = torch.empty(5, 8, 4, 4).contiguous(memory_format=torch.channels_last)
        kernels = roofline.record(lambda: torch.autograd.grad(matched(x)[0], x, upstream))
    outside, vector = 4 * 5 * 8 * 16, 4 * 8
    assert sum(k.name.startswith("aten.add") for k in kernels) == 1  # the network's own, forward
    (backward,) = [k for k in kernels if k.name == "infer_fast.bn_match_backward.default"]
    assert backward.launches == 1
    assert backward.moved == 2 * outside + 4 + outside + 6 * vector + 8 + outside  # else as counted above
