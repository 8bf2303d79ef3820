"""perturb_ on CUDA: theta += rho * g / (||g||_2 + 1e-12) over a list of tensors, in two launches.

A table on the device says where each chunk of each tensor lies, so that the number of tensors costs no launches. The
first launch sums the squares of every chunk, the second adds those sums up (in every program, in one order) and takes
the step: the norm never leaves the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK = 8192  # elements of one program
TINY = 1e-12


@triton.jit
def _elements(addresses, sizes, chunk, kind: tl.constexpr, CHUNK: tl.constexpr):
    """(pointers to the chunk's elements, which of them exist); sizes counts the elements from the chunk's start."""
    at = tl.arange(0, CHUNK)
    base = tl.load(addresses + chunk).to(tl.pointer_type(kind))
    return base + at, at < tl.load(sizes + chunk)


@triton.jit
def _squares(grads, sizes, partial, KIND: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    g, exists = _elements(grads, sizes, chunk, KIND, CHUNK)
    value = tl.load(g, mask=exists, other=0.0).to(tl.float32)
    tl.store(partial + chunk, tl.sum(value * value))


@triton.jit
def _step(params, grads, sizes, partial, chunks, rho, tiny, KIND: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    total = tl.zeros((1024,), tl.float32)
    for begin in range(0, chunks, 1024):
        at = begin + tl.arange(0, 1024)
        total += tl.load(partial + at, mask=at < chunks, other=0.0)
    factor = rho / (tl.sqrt_rn(tl.sum(total)) + tiny)
    p, exists = _elements(params, sizes, chunk, KIND, CHUNK)
    g, _ = _elements(grads, sizes, chunk, KIND, CHUNK)
    value = tl.load(p, mask=exists, other=0.0).to(tl.float32)
    step = factor * tl.load(g, mask=exists, other=0.0).to(tl.float32)
    tl.store(p, (value + step).to(KIND), mask=exists)


KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def perturb(params: list[torch.Tensor], grads: list[torch.Tensor], rho: float) -> None:
    """In place on `params`; params and grads contiguous, of one dtype, pairwise of one size."""
    table = [
        (p.data_ptr() + start * p.element_size(), g.data_ptr() + start * g.element_size(), p.numel() - start)
        for p, g in zip(params, grads, strict=True)
        for start in range(0, p.numel(), CHUNK)
    ]
    if not table:
        return
    device = params[0].device
    addresses = torch.tensor(table, dtype=torch.int64).t().contiguous().to(device, non_blocking=True)  # (3, chunks)
    partial = torch.empty(len(table), dtype=torch.float32, device=device)
    kind = KINDS[params[0].dtype]
    grid = (len(table),)
    _squares[grid](addresses[1], addresses[2], partial, KIND=kind, CHUNK=CHUNK)
    _step[grid](*addresses, partial, len(table), rho, TINY, KIND=kind, CHUNK=CHUNK)
