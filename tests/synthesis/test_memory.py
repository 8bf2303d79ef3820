"""What fits, and the lanes and chunks that follow from it."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from infer_fast.errors import InferFastError
from infer_fast.files import write_json
from infer_fast.models import build
from infer_fast.synthesis import memory

CPU = torch.device("cpu")


def test_free_bytes_are_those_of_this_machine():
    assert 2**20 < memory.free_bytes(CPU) < 2**50


def test_a_control_groups_limit_counts(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", [(tmp_path, "memory.max", "memory.current")])
    assert memory.free_bytes(CPU) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(CPU) > 3_000_000


def test_bytes_per_image_follow_the_pixels_and_the_precision():
    teacher = build("resnet18", 10, (32, 32), seed=0)
    small, large = (memory.bytes_per_image(teacher, (n, n), "float32") for n in (16, 32))
    assert large == pytest.approx(4 * small, rel=0.05)
    assert memory.bytes_per_image(teacher, (32, 32), "bfloat16") == pytest.approx(large / 2, rel=0.1)
    norm_inputs = 4 * 32 * 32 * (5 * 64 + 5 * 128 / 4 + 5 * 256 / 16 + 5 * 512 / 64)  # all that a pass has to keep
    assert norm_inputs < large < 3.5 * norm_inputs


@pytest.mark.parametrize(
    ("free", "expected"),
    [(10**12, (2, None)), (150, (1, None)), (80, (1, 64)), (0, (1, 1))],  # free: in images of 100
)
def test_lanes_fill_the_device_and_fit_its_memory(monkeypatch, free, expected):
    monkeypatch.setattr(memory, "bytes_per_image", lambda *_: 1000)
    monkeypatch.setattr(memory, "free_bytes", lambda _: free * 1000)
    teacher = build("convnet", 100, (32, 32), seed=0)
    assert memory.choose_lanes(teacher, 100, (32, 32), "float32", most=9) == expected
    assert memory.choose_lanes(teacher, 100, (8, 8), "float32", most=9)[0] == (9 if free > 10**6 else 1)


def test_a_run_goes_on_in_the_room_it_began_with(tmp_path, monkeypatch):
    """What was asked for, else what is kept for the same demand, else what fits."""
    fitting = iter([(3, None), (1, 20), (2, None), (2, None)])
    monkeypatch.setattr(memory, "choose_lanes", lambda *_: next(fitting))
    demand = memory.Demand(("convnet", "convnet-silu"), 4, 100, (8, 8), 10, "compensator", "auto")
    room = memory.find_room(demand, CPU, tmp_path)
    assert (room.lanes, room.chunks) == ([3, 1], [None, 20])
    write_json(tmp_path / memory.ROOM, asdict(room.kept))
    assert memory.find_room(demand, CPU, tmp_path) == room
    assert memory.find_room(demand, CPU, tmp_path, lanes=5).lanes == [5, 5]
    assert memory.find_room(demand, CPU, tmp_path, chunk=7).chunks == [7, 7]
    assert memory.find_room(replace(demand, most=50), CPU, tmp_path).chunks == [50, 20]
    assert memory.find_room(demand, CPU, tmp_path, lanes=5).kept is None  # what is asked for is not what was found
    assert memory.find_room(demand, CPU, tmp_path, chunk=7).kept == room.kept
    assert memory.find_room(replace(demand, precision="bfloat16"), CPU, tmp_path).lanes == [2, 2]
    for damaged in ("{", '{"lanes": [0, 1]}', '{"lanes": [0, 1], "chunks": [null, 1], "made_for": %s}'):
        made_for = json.dumps(room.kept.made_for)
        (tmp_path / memory.ROOM).write_text(damaged.replace("%s", made_for))
        with pytest.raises(InferFastError, match=r"room.json.* what fits is (then )?found anew"):
            memory.find_room(demand, CPU, tmp_path)
