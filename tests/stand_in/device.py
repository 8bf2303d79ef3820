"""The stand-in itself: what a GPU would refuse or wait for is noticed, and what is lawful gives the right values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
import triton
from infer_fast.kernels import perturb

from tests.stand_in.emulation import emulated, value
from tests.stand_in.record import idle


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def hazards(step: Callable[[], object]) -> list[str]:
    """What is noted where step() is captured."""
    noted: list[str] = []
    with pytest.raises(AssertionError), emulated() as record:
        with suppress(RuntimeError):
            captured(step)
        noted += record.hazards()
    return noted


def check_a_graph_replays_on_new_values():
    with emulated():
        x, y = torch.arange(3.0).cuda(), torch.zeros(3, device="cuda")
        graph = captured(lambda: y.add_(2 * x))
        assert value(y).tolist() == [0, 0, 0], "a capture runs nothing"
        x.add_(1)
        graph.replay()
        graph.replay()
        assert value(y).tolist() == [4, 8, 12] and torch.cuda.get_device_capability() == (9, 0)


def check_memory_is_counted_by_the_caching_allocator():
    with emulated():
        before = torch.cuda.memory_allocated()
        held = torch.zeros(1024, device="cuda")
        assert torch.cuda.memory_allocated() - before == held.nbytes
        del held
        assert torch.cuda.memory_allocated() == before


def check_what_a_capture_forbids_is_noticed():
    with emulated():
        x, host = torch.ones(3, device="cuda"), torch.ones(3)
        table = torch.ones(4, 3, device="cuda")
    assert hazards(lambda: x.sum().item()) == ["a tensor is read by the host inside a capture"]
    assert hazards(lambda: x.cpu()) == ["aten._to_copy.default copies to the host inside a capture"]
    assert hazards(lambda: x.copy_(host)) == ["aten.copy_.default takes a host tensor (3,) inside a capture"]
    assert hazards(lambda: table[torch.tensor([1, 2])]) == [
        "aten.index.Tensor takes a host tensor (2,) inside a capture"
    ]
    assert hazards(torch.cuda.synchronize) == ["cudaDeviceSynchronize inside a capture"]


def check_tensors_of_two_devices_are_noticed():
    noted = []
    with pytest.raises(AssertionError), emulated() as record:
        torch.ones(3, device="cuda") + torch.ones(3)
        noted += record.hazards()
    assert noted == ["aten.add.Tensor mixes tensors of host and device"]


def check_triton_in_a_capture_is_noticed():
    with idle():
        x = torch.ones(8, device="cuda")
        chunks = perturb.chunks_of((8,), x.device)
    arguments = {"KIND": triton.language.float32, "ALIGNED": True, "CHUNK": 8}
    noted: list[str] = []
    with pytest.raises(AssertionError), idle() as record:
        perturb._squares[(1,)](x, *chunks, x, **arguments)
        captured(lambda: perturb._squares[(1,)](x, *chunks, x, **arguments))
        assert record.hazards() == []
        perturb._squares[(1, 70000)](x, *chunks, x.cpu(), **arguments)
        captured(lambda: perturb._squares[(1,)](x, *chunks, x, **arguments, num_warps=8))
        noted += record.hazards()
    assert noted == [
        "_squares has a grid of (1, 70000)",
        "_squares is compiled inside a capture",
        "_squares is given partial_ptr on the host",
    ]
