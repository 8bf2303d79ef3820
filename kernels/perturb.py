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
def _elements(addresses_ptr, owners_ptr, starts_ptr, KIND: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    """Pointers to the elements of this program's chunk; told of their alignment, Triton takes 16 bytes at a time.

    addresses_ptr           pointer, int64 (tensors,)   where each tensor begins in memory
    owners_ptr, starts_ptr  pointers, int64 (chunks,)   as _step's, and so are the capitals
    """
    chunk = tl.program_id(0)
    first = tl.load(addresses_ptr + tl.load(owners_ptr + chunk)).to(tl.pointer_type(KIND)) + tl.load(starts_ptr + chunk)
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + tl.arange(0, CHUNK)


@triton.jit
def _left(owners_ptr, starts_ptr, sizes_ptr):
    """Elements from this program's chunk on to the end of its tensor: a whole chunk needs no mask.

    owners_ptr, starts_ptr, sizes_ptr   as _step's
    """
    chunk = tl.program_id(0)
    return tl.load(sizes_ptr + tl.load(owners_ptr + chunk)) - tl.load(starts_ptr + chunk)


@triton.jit
def _squares(
    grads_ptr, owners_ptr, starts_ptr, sizes_ptr, partial_ptr,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sum of the squares of one chunk of the gradients, float32; arguments as _step's.

    partial_ptr   pointer, float32 (chunks,)   out
    """
    g = _elements(grads_ptr, owners_ptr, starts_ptr, KIND, ALIGNED, CHUNK)
    left = _left(owners_ptr, starts_ptr, sizes_ptr)
    if left >= CHUNK:
        value = tl.load(g).to(tl.float32)
    else:
        value = tl.load(g, mask=tl.arange(0, CHUNK) < left, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(value * value))


@triton.jit(do_not_specialize=["chunks"])
def _step(
    params_ptr, grads_ptr, owners_ptr, starts_ptr, sizes_ptr, partial_ptr, chunks, rho, tiny,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of theta += rho * g / (||g||_2 + tiny), the norm over all chunks (DWA, arXiv 2409.17612, eq. 7).

    params_ptr, grads_ptr   pointers, int64 (tensors,)   where each tensor begins in memory
    owners_ptr, starts_ptr  pointers, int64 (chunks,)    each chunk's tensor, and its first element there
    sizes_ptr               pointer, int64 (tensors,)    elements of each tensor
    partial_ptr             pointer, float32 (chunks,)   sums of squares, as _squares writes them
    chunks                  number                       how many, in all tensors together
    rho, tiny               numbers, float32             length of the step; what keeps 0/0 away
    KIND                    the elements' type: float32, bfloat16 or float16
    ALIGNED                 whether every tensor begins at a multiple of 16 bytes
    CHUNK                   elements of a chunk
    """
    total = tl.zeros((1024,), tl.float32)
    for begin in range(0, chunks, 1024):
        at = begin + tl.arange(0, 1024)
        total += tl.load(partial_ptr + at, mask=at < chunks, other=0.0)
    factor = rho / (tl.sqrt_rn(tl.sum(total)) + tiny)
    p = _elements(params_ptr, owners_ptr, starts_ptr, KIND, ALIGNED, CHUNK)
    g = _elements(grads_ptr, owners_ptr, starts_ptr, KIND, ALIGNED, CHUNK)
    left = _left(owners_ptr, starts_ptr, sizes_ptr)
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
