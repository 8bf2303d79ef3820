"""What the benchmarks share: tables, pictures, limits."""

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import distill, measure, plot, published
from bench.apart import Apart
from infer_fast.models import build
from infer_fast.models.execution import Execution
from infer_fast.models.teacher import Teacher
from infer_fast.models.train import Schedule, Training, fit, soft_loss
from infer_fast.students.labels import averaged_logits


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
