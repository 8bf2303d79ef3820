"""How bn_match's passes are cut into programs: one choice for each problem, made from its sizes before the launch.

Nothing is tuned while a network runs, so a captured graph launches what an eager call would.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

BLOCK = 64  # channels_last elements side by side in a tile: a cache line of bfloat16
VECTOR = 8  # elements that a thread moves at a time: 16 bytes of bfloat16
THREAD_BYTES = 32  # bytes of each tensor that a thread holds: two accesses of 16 bytes under way
WARPS = (8, 4)  # of one program: the first that leaves every multiprocessor BUSY programs, else the last
BUSY = 4
RESIDENT = 64  # warps that each multiprocessor is given in all: a few rounds of what its registers hold at a time
INTERPRETED = 1  # multiprocessors that are planned for where there are none


class Plan(NamedTuple):
    """A tensor as its passes see it: L lanes, each of some rows of `inners` elements, in tiles.

    channels_last, a row is the least number of pixels whose elements fill whole blocks, so that any channel count uses
    every thread, and a column is always the same channel. Contiguous, it is the plane of one channel of one image.
    """

    grid: tuple[int, int, int]  # columns of tiles (or channels), splits, lanes
    steps: int  # tiles of one program, one after the other
    inners: int  # elements of a row: lcm(C, BLOCK), or P
    size: int  # elements of a lane
    parts: int  # partial sums of each channel of a lane
    vector: int  # VECTOR where rows and lanes are whole vectors, so that accesses are aligned, else 1
    block: int  # elements side by side in a tile
    tile: int  # elements of a tile
    warps: int


@cache
def plan(images: int, channels: int, plane: int, rows: bool, lanes: int, itemsize: int, multiprocessors: int) -> Plan:
    """The one way in which this problem is cut; rows: whether the layout is channels_last.

    images: of a lane; plane: H*W; itemsize: bytes of an element. Bound by memory, a pass wants enough bytes under way
    and little else: programs of THREAD_BYTES a thread, smaller ones where there would be too few of them, each taking
    as many tiles as make RESIDENT warps for each multiprocessor, for every program costs the sums of a tile's columns.
    """
    size = images * channels * plane
    inners = math.lcm(channels, BLOCK) if rows else plane
    block = BLOCK if rows else max(VECTOR, min(512, 1 << (plane - 1).bit_length()))
    across = inners // block if rows else channels
    outers = -(-size // inners) if rows else images
    for warps in WARPS:
        tile = warps * 32 * THREAD_BYTES // itemsize  # two rows at least
        tiles = -(-outers * block // tile)
        if across * tiles * lanes >= BUSY * multiprocessors:
            break
    most = max(1, RESIDENT // warps * multiprocessors // (across * lanes))
    steps = -(-tiles // most)
    splits = -(-tiles // steps)
    return Plan(
        grid=(across, splits, lanes),
        steps=steps,
        inners=inners,
        size=size,
        parts=splits * (inners // channels if rows else 1),
        vector=VECTOR if inners % VECTOR == 0 and size % VECTOR == 0 else 1,
        block=block,
        tile=tile,
        warps=warps,
    )


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; elsewhere kernels are interpreted or not run at all."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED
