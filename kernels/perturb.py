"""perturb_ on CUDA: theta += rho * g / (||g||_2 + 1e-12) over a list of tensors, in two launches.

Tables on the device say which chunk of which tensor each program takes, so that the number of tensors costs no
launches; they depend on the sizes alone and are kept, so that a call sends nothing but the addresses. The first launch
sums the squares of every chunk, the second adds those sums up (in every program, in one order) and takes the step: the
norm never leaves the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

CHUNK, WARPS = 4096, 8  # elements and warps of one program
TINY = 1e-12


@triton.jit
def _elements(addresses, owners, starts, KIND: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """Pointers to the elements of this program's chunk; told of their alignment, Triton takes 16 bytes at a time."""
    chunk = tl.program_id(0)
    first = tl.load(addresses + tl.load(owners + chunk)).to(tl.pointer_type(KIND)) + tl.load(starts + chunk)
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, CHUNK)


@triton.jit
def _left(owners, starts, sizes):
    """Elements from this program's chunk on to the end of its tensor: a whole chunk needs no mask."""
    chunk = tl.program_id(0)
    return tl.load(sizes + tl.load(owners + chunk)) - tl.load(starts + chunk)


@triton.jit
def _squares(
    grads, owners, starts, sizes, partial, KIND: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    g = _elements(grads, owners, starts, KIND, ALIGNED, CHUNK)
    left = _left(owners, starts, sizes)
    if left >= CHUNK:
        value = tl.load(g).to(tl.float32)
    else:
        value = tl.load(g, mask=tl.arange(0, CHUNK) < left, other=0.0).to(tl.float32)
    tl.store(partial + tl.program_id(0), tl.sum(value * value))


@triton.jit
def _step(
    params, grads, owners, starts, sizes, partial, chunks, rho, tiny,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((1024,), tl.float32)
    for begin in range(0, chunks, 1024):
        at = begin + tl.arange(0, 1024)
        total += tl.load(partial + at, mask=at < chunks, other=0.0)
    factor = rho / (tl.sqrt_rn(tl.sum(total)) + tiny)
    p = _elements(params, owners, starts, KIND, ALIGNED, CHUNK)
    g = _elements(grads, owners, starts, KIND, ALIGNED, CHUNK)
    left = _left(owners, starts, sizes)
    if left >= CHUNK:
        tl.store(p, (tl.load(p).to(tl.float32) + factor * tl.load(g).to(tl.float32)).to(KIND))
    else:
        exists = tl.arange(0, CHUNK) < left
        value = tl.load(p, mask=exists, other=0.0).to(tl.float32)
        step = factor * tl.load(g, mask=exists, other=0.0).to(tl.float32)
        tl.store(p, (value + step).to(KIND), mask=exists)


KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Chunks(NamedTuple):
    """int64 tables on the device: each chunk's tensor and its first element there, (chunks,); each tensor's size."""

    owners: torch.Tensor
    starts: torch.Tensor
    sizes: torch.Tensor


@lru_cache(maxsize=16)
def chunks_of(sizes: tuple[int, ...], device: torch.device) -> Chunks:
    """Tensors of these sizes, cut into chunks of CHUNK elements."""
    pieces = [(owner, start) for owner, size in enumerate(sizes) for start in range(0, size, CHUNK)]
    owners, starts = torch.tensor(pieces, dtype=torch.int64).view(-1, 2).t().contiguous().to(device)
    return Chunks(owners, starts, torch.tensor(sizes, dtype=torch.int64, device=device))


def perturb(params: list[torch.Tensor], grads: list[torch.Tensor], rho: float) -> None:
    """In place on `params`; all of one dtype, pairwise of one size and one dense layout."""
    device = params[0].device
    chunks = chunks_of(tuple(p.numel() for p in params), device)
    count = len(chunks.owners)
    if count == 0:
        return
    pointers = [[t.data_ptr() for t in tensors] for tensors in (params, grads)]
    addresses = torch.tensor(pointers, dtype=torch.int64).to(device, non_blocking=True)  # (2, tensors)
    partial = torch.empty(count, dtype=torch.float32, device=device)
    meta = {
        "KIND": KINDS[params[0].dtype],
        "ALIGNED": all(pointer % 16 == 0 for side in pointers for pointer in side),
        "CHUNK": CHUNK,
        "num_warps": WARPS,
    }
    _squares[(count,)](addresses[1], *chunks, partial, **meta)
    _step[(count,)](*addresses, *chunks, partial, count, rho, TINY, **meta)
