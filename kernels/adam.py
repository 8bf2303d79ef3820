"""adam_ on CUDA: the solver's step in two launches, all of it on the device.

The first looks for gradients that are not finite, and moves the counter on; the second takes the step. Between them lie
a flag for each chunk of each lane, and the iteration that this is. See infer_fast.ops.adam for the formula.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

CHUNK, WARPS = 1024, 4  # elements and warps of one program: two accesses of 16 bytes a thread and tensor
VECTOR = 4  # float32 elements of 16 bytes
LARGEST = tl.constexpr(3.4028234663852886e38)  # of finite float32
SIZES = ["size", "chunks", "plane", "channels"]


@triton.jit
def _elements(size, VECTOR: tl.constexpr, CHUNK: tl.constexpr):
    """(places in the tensor, int64; places in the lane, int32; which exist) of this program's chunk, each (CHUNK,).

    size  number, int32   elements of a lane, in vectors of VECTOR
    """
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    return tl.program_id(1).to(tl.int64) * size * VECTOR + at, at, at < size * VECTOR


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["counter_ptr", "now_ptr", "broken_ptr"])
def _look(gradient_ptr, counter_ptr, now_ptr, broken_ptr, size, VECTOR: tl.constexpr, CHUNK: tl.constexpr):
    """Counts the elements of each chunk that are not finite; keeps the iteration's number, and moves the counter on.

    Grid: (chunks of a lane; lanes).

    gradient_ptr  pointer, float32 (L, N)
    counter_ptr   pointer, int64 (1,)           in and out: iterations done
    now_ptr       pointer, int64 (1,)           out: iterations done before this one
    broken_ptr    pointer, int32 (L, chunks)    out
    size          number, int32                 N, in vectors of VECTOR
    VECTOR        elements to which lanes are aligned
    CHUNK         elements of one program
    """
    place, _, exists = _elements(size, VECTOR, CHUNK)
    gradient = tl.load(gradient_ptr + place, mask=exists, other=0.0)
    broken = tl.where(tl.abs(gradient) <= LARGEST, 0, 1)  # NaN compares false
    tl.store(broken_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(broken))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        now = tl.load(counter_ptr)
        tl.store(now_ptr, now)
        tl.store(counter_ptr, now + 1)


@triton.jit(
    do_not_specialize=SIZES, do_not_specialize_on_alignment=["lr_ptr", "now_ptr", "broken_ptr", "low_ptr", "high_ptr"]
)
def _update(
    optimised_ptr, m_ptr, v_ptr, gradient_ptr, lr_ptr, now_ptr, broken_ptr, low_ptr, high_ptr,
    size, chunks, plane, channels, beta1, beta2, log2_beta1, log2_beta2, epsilon,
    BOUNDED: tl.constexpr, VECTOR: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk's step (Adam, arXiv 1412.6980, algorithm 1), with gradient 0 where the lane's is not finite.

        m = beta1 * m + (1 - beta1) * g,  v = beta2 * v + (1 - beta2) * g^2
        x = clamp(x - lr[t - 1] * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon)),  t = now + 1

    Grid: (chunks of a lane; lanes).

    optimised_ptr, m_ptr, v_ptr   pointers, float32 (L, N)     in and out: x and the moments
    gradient_ptr                  pointer, float32 (L, N)
    lr_ptr                        pointer, float32 (T,)        each iteration's learning rate
    now_ptr, broken_ptr           pointers                     as _look writes them
    low_ptr, high_ptr             pointers, float32 (C,)       bounds of each channel, read with BOUNDED
    size, chunks                  numbers, int32               N, in vectors of VECTOR, and chunks of a lane
    plane, channels               numbers, int32               elements of one channel, and C
    beta1, beta2, epsilon         numbers, float32
    log2_beta1, log2_beta2        numbers, float32
    BOUNDED                       whether there are bounds
    VECTOR, CHUNK                 as _look's
    """
    broken = tl.zeros((128,), tl.int32)
    for begin in range(0, chunks, 128):
        flag = begin + tl.arange(0, 128)
        broken += tl.load(broken_ptr + tl.program_id(1) * chunks + flag, mask=flag < chunks, other=0)
    finite = tl.sum(broken) == 0
    now = tl.load(now_ptr)
    time = (now + 1).to(tl.float32)
    first, second = 1 - tl.exp2(time * log2_beta1), 1 - tl.exp2(time * log2_beta2)
    rate = tl.load(lr_ptr + now) / first
    place, at, exists = _elements(size, VECTOR, CHUNK)
    g = tl.where(finite, tl.load(gradient_ptr + place, mask=exists, other=0.0), 0.0)
    m = tl.load(m_ptr + place, mask=exists, other=0.0)
    v = tl.load(v_ptr + place, mask=exists, other=0.0)
    x = tl.load(optimised_ptr + place, mask=exists, other=0.0)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    x -= rate * m / (tl.sqrt_rn(v / second) + epsilon)
    if BOUNDED:
        channel = at // plane % channels
        low = tl.load(low_ptr + channel)
        high = tl.load(high_ptr + channel)
        x = tl.where(x < low, low, tl.where(x > high, high, x))  # NaN stays
    tl.store(m_ptr + place, m, mask=exists)
    tl.store(v_ptr + place, v, mask=exists)
    tl.store(optimised_ptr + place, x, mask=exists)


def adam(
    optimised: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    gradient: torch.Tensor,
    lr: torch.Tensor,
    counter: torch.Tensor,
    bounds: tuple[torch.Tensor, torch.Tensor] | None,
    betas: tuple[float, float],
    epsilon: float,
) -> None:
    """In place on optimised, m, v (L, ..., C, H, W) and counter; all contiguous; bounds: (C,) each."""
    lanes, channels, plane = len(optimised), optimised.shape[-3], optimised.shape[-2] * optimised.shape[-1]
    size = optimised.numel() // lanes
    vector = VECTOR if size % VECTOR == 0 else 1
    chunks = triton.cdiv(size, CHUNK)
    broken = torch.empty((lanes, chunks), dtype=torch.int32, device=optimised.device)
    now = torch.empty_like(counter)
    low, high = (lr, lr) if bounds is None else bounds
    meta = {"VECTOR": vector, "CHUNK": CHUNK, "num_warps": WARPS}
    _look[(chunks, lanes)](gradient, counter, now, broken, size // vector, **meta)
    _update[(chunks, lanes)](
        optimised, m, v, gradient, lr, now, broken, low, high,
        size // vector, chunks, plane, channels, *betas, *(math.log2(beta) for beta in betas), epsilon,
        BOUNDED=bounds is not None, **meta,
    )  # fmt: skip
