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
def _elements(addresses, owners, starts, sizes, kind: tl.constexpr, CHUNK: tl.constexpr):
    """(pointers to the elements of this program's chunk, which of them exist)."""
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    at = tl.load(starts + chunk) + tl.arange(0, CHUNK)
    return tl.load(addresses + owner).to(tl.pointer_type(kind)) + at, at < tl.load(sizes + owner)


@triton.jit
def _squares(grads, owners, starts, sizes, partial, KIND: tl.constexpr, CHUNK: tl.constexpr):
    g, exists = _elements(grads, owners, starts, sizes, KIND, CHUNK)
    value = tl.load(g, mask=exists, other=0.0).to(tl.float32)
    tl.store(partial + tl.program_id(0), tl.sum(value * value))


@triton.jit
def _step(params, grads, owners, starts, sizes, partial, chunks, rho, tiny, KIND: tl.constexpr, CHUNK: tl.constexpr):
    total = tl.zeros((1024,), tl.float32)
    for begin in range(0, chunks, 1024):
        at = begin + tl.arange(0, 1024)
        total += tl.load(partial + at, mask=at < chunks, other=0.0)
    factor = rho / (tl.sqrt_rn(tl.sum(total)) + tiny)
    p, exists = _elements(params, owners, starts, sizes, KIND, CHUNK)
    g, _ = _elements(grads, owners, starts, sizes, KIND, CHUNK)
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
    addresses = torch.tensor([[t.data_ptr() for t in params], [t.data_ptr() for t in grads]], dtype=torch.int64)
    addresses = addresses.to(device, non_blocking=True)  # (2, tensors)
    partial = torch.empty(count, dtype=torch.float32, device=device)
    kind = KINDS[params[0].dtype]
    _squares[(count,)](addresses[1], *chunks, partial, KIND=kind, CHUNK=CHUNK, num_warps=WARPS)
    _step[(count,)](*addresses, *chunks, partial, count, rho, TINY, KIND=kind, CHUNK=CHUNK, num_warps=WARPS)
