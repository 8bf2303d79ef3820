"""How much memory there is, and how many images of a teacher's pass it holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from infer_fast.errors import InferFastError
from infer_fast.files import read_json_as
from infer_fast.models.build import build
from infer_fast.models.execution import at_precision, choose_precision
from infer_fast.models.surgery import MatchedTeacher

SHARE = 0.8  # of the free memory; the rest is for what the estimate does not see
WORKSPACE = (
    1.6  # a pass's highest point over what it keeps for backward: outputs, gradients, the libraries' own buffers
)
PROBE = 2  # images
ROOM = "room.json"
FILL_PIXELS = {"cuda": 2**20, "cpu": 2**18}  # of a batch: with more, another lane no longer makes the device faster
CONTROL_GROUPS = (  # a container's limit: folder, limit and use, in both versions of the kernel's interface
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had: the device's and the allocator's own on CUDA, else the machine's or its group's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    bounds = [_machine_bytes()]
    for group, limit, used in CONTROL_GROUPS:
        most, now = _number(Path(group, limit)), _number(Path(group, used))
        bounds += [] if most is None or now is None else [most - now]
    return max(0, min(bounds))


def bytes_per_image(teacher: nn.Module, size: tuple[int, int], precision: str) -> int:
    """What a pass of the matched `teacher` keeps for backward, and its workspace, for each image of `size`.

    Measured: a pass of PROBE images, its saved tensors counted. Weights and statistics are not images' bytes.
    """
    device = next(teacher.parameters()).device
    matched = MatchedTeacher(teacher)
    constant = {t.data_ptr() for t in (*matched.parameters(), *matched.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in constant and tensor.shape[:1] == (PROBE,):
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    images = torch.zeros(PROBE, 3, *size, device=device, requires_grad=True)
    matched.check(images)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), at_precision(device, precision):
        outputs = matched(images)  # held while it is counted: an address must not be given out twice
    del outputs
    return int(WORKSPACE * sum(kept.values()) / PROBE)


def images_that_fit(teacher: nn.Module, size: tuple[int, int], precision: str) -> int:
    """How many images one pass of `teacher` can take, at least 1."""
    device = next(teacher.parameters()).device
    return max(1, int(SHARE * free_bytes(device) / bytes_per_image(teacher, size, precision)))


def choose_lanes(
    teacher: nn.Module, images: int, size: tuple[int, int], precision: str, most: int
) -> tuple[int, int | None]:
    """How many tasks of `images` images to solve side by side, at most `most`, and the chunk (None: all the images).

    As many lanes as fill the device and fit the free memory; a single lane that does not fit is passed in chunks.
    """
    fit = images_that_fit(teacher, size, precision)
    if fit < images:
        return 1, fit
    device = next(teacher.parameters()).device
    filling = FILL_PIXELS.get(device.type, FILL_PIXELS["cpu"]) // (images * size[0] * size[1])
    return max(1, min(most, filling, fit // images)), None


@dataclass(frozen=True)
class Demand:
    """What room is looked for: for up to `ipc` tasks of `images` images of `size` with each of the networks `teachers`.

    classes: the networks' outputs; most: images in one pass at most (None: no bound); optimise, precision: the
    settings'.
    """

    teachers: tuple[str, ...]
    classes: int
    images: int
    size: tuple[int, int]
    ipc: int
    optimise: str
    precision: str
    most: int | None = None

    def on(self, device: torch.device) -> list:
        """What a room is found for, as JSON gives it back."""
        return [
            list(self.teachers), self.images, list(self.size), self.ipc, self.optimise, self.precision, device.type
        ]  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What room.json holds, so that a run goes on as it began whatever the free memory is then: the lanes and chunks
    that were found, and what they were found for."""

    lanes: tuple[int, ...]
    chunks: tuple[int | None, ...]
    made_for: list


class Room(NamedTuple):
    """Of each teacher: tasks side by side, and images of a task in one pass (None: all). kept: what of it was found and
    not asked for (None: nothing), to be kept with the run."""

    lanes: list[int]
    chunks: list[int | None]
    kept: Kept | None


def find_room(
    demand: Demand, device: torch.device, folder: Path, lanes: int | None = None, chunk: int | None = None
) -> Room:
    """The lanes and chunks of each teacher: as asked for, else as the run in `folder` began, else what fits now.

    Raises InferFastError for a damaged room.json.
    """
    count, kept = len(demand.teachers), None
    side_by_side: list[int] = [0 if lanes is None else lanes] * count
    chunks: list[int | None] = [None] * count
    if lanes is None:
        kept = _kept(folder / ROOM, demand, device) or _found(demand, device)
        side_by_side, chunks = list(kept.lanes), list(kept.chunks)
    if chunk is not None:
        chunks = [chunk] * count
    elif demand.most is not None and demand.most < demand.images:
        chunks = [demand.most if own is None else min(own, demand.most) for own in chunks]
    return Room(side_by_side, chunks, kept)


def _kept(path: Path, demand: Demand, device: torch.device) -> Kept | None:
    """What was found when the run began, if that was for the same demand."""
    if not path.is_file():
        return None
    try:
        kept = read_json_as(path, Kept)
    except InferFastError as error:
        raise InferFastError(f"{error} Delete {path}: what fits is then found anew.") from error
    if kept.made_for != demand.on(device):
        return None
    if not len(kept.lanes) == len(kept.chunks) == len(demand.teachers) or min(kept.lanes) < 1:
        raise InferFastError(f"{path} is damaged: delete it, and what fits is found anew.")
    return kept


def _found(demand: Demand, device: torch.device) -> Kept:
    """What fits now."""
    found = [_room_of(name, demand, device) for name in demand.teachers]
    return Kept(tuple(own for own, _ in found), tuple(own for _, own in found), demand.on(device))


def _room_of(name: str, demand: Demand, device: torch.device) -> tuple[int, int | None]:
    network = build(name, demand.classes, demand.size, seed=0).to(device)
    precision = choose_precision(device, demand.precision)
    return choose_lanes(network, demand.images, demand.size, precision, demand.ipc)


def _machine_bytes() -> int:
    """What Linux says is available; half of the memory elsewhere."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _number(path: Path) -> int | None:
    """The number in a file of the control group, None if there is none or it says `max`."""
    if not path.is_file():
        return None
    text = path.read_text().strip()
    return int(text) if text.isdigit() else None
