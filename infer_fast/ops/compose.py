"""compose: a batch for training straight from the stored bytes.

    pixel = clamp(base/255 + offset + scale * compensator, 0, 1)        (base alone where there is no compensator)
    batch = (mix(flip(crop(pixel))) - mean) / std

One gather, one write: nothing of the dataset is kept in floating point.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from infer_fast.errors import InferFastError
from infer_fast.ops.backend import buffer, choose, compiled

DTYPES = {
    "native": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


class Quantised(NamedTuple):
    """Compensators as bytes: pixel offset = offset + scale * values, in [0,1] pixels.

    values: uint8 (N, 3, H, W); scale, offset: floating (N, 3), per compensator and channel.
    """

    values: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor


def reference(
    base: torch.Tensor,
    base_index: torch.Tensor,
    compensators: Quantised | None,
    compensator_index: torch.Tensor | None,
    *,
    shift: torch.Tensor | None,
    flip: torch.Tensor | None,
    lam: torch.Tensor | None,
    partner: torch.Tensor | None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Plain PyTorch, on any device; float64 if dtype says so. Shapes as in compose."""
    wide = torch.promote_types(dtype, torch.float32)
    pixels = base[base_index].to(wide) / 255  # (B, 3, H, W)
    if compensators is not None and compensator_index is not None:
        pixels = (pixels + _dequantise(compensators, compensator_index, wide)).clamp(0, 1)
    if shift is not None:
        pixels = _crop(pixels, shift)
    if flip is not None:
        pixels = torch.where(flip.view(-1, 1, 1, 1), pixels.flip(3), pixels)
    if lam is not None:
        weight = lam.to(wide).view(-1, 1, 1, 1)
        pixels = weight * pixels + (1 - weight) * pixels[partner]
    mean_, std_ = _statistics(tuple(mean), tuple(std), wide, base.device).view(2, 3, 1, 1)
    return ((pixels - mean_) / std_).to(dtype)


def _dequantise(compensators: Quantised, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 3, H, W) in [0,1] pixels; zero where index is -1."""
    known = index.clamp(min=0)
    scale = compensators.scale[known].to(dtype)[:, :, None, None]
    offset = compensators.offset[known].to(dtype)[:, :, None, None]
    dense = compensators.values[known].to(dtype) * scale + offset
    return torch.where((index >= 0).view(-1, 1, 1, 1), dense, torch.zeros((), dtype=dtype, device=dense.device))


def _crop(pixels: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """out[b, :, y, x] = pixels[b, :, y + shift[b,0], x + shift[b,1]], black outside."""
    batch, _, height, width = pixels.shape
    device = pixels.device
    rows = torch.arange(height, device=device) + shift[:, :1]  # (B, H)
    columns = torch.arange(width, device=device) + shift[:, 1:]  # (B, W)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    image = torch.arange(batch, device=device)[:, None, None]
    moved = pixels.permute(0, 2, 3, 1)[
        image, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]  # (B, H, W, 3)
    return (moved * inside[..., None]).permute(0, 3, 1, 2)


def compose(
    base: torch.Tensor,
    base_index: torch.Tensor,
    compensators: Quantised | None = None,
    compensator_index: torch.Tensor | None = None,
    *,
    shift: torch.Tensor | None = None,
    flip: torch.Tensor | None = None,
    lam: torch.Tensor | None = None,
    partner: torch.Tensor | None = None,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> torch.Tensor:
    """A batch of B augmented, normalised images from stored bytes.

    base: uint8 (N, 3, H, W); base_index: int64 (B,); compensators: bytes of K of them, or None; compensator_index:
    int64 (B,), -1 for a bare base image; shift: int64 (B, 2), rows and columns of a crop with black padding; flip: bool
    (B,), mirror left and right; lam: float32 (B,), MixUp's weight of the image itself against partner; partner: int64
    (B,), positions in the batch. Returns (B, 3, H, W) of `dtype`.
    Raises InferFastError for an index out of range, shapes that don't fit, or a forced backend that can't serve.
    """
    probe = torch.empty(0, dtype=dtype, device=base.device)
    chosen = choose("compose", probe, backend, DTYPES)
    _check(base, base_index, compensators, compensator_index, shift, flip, lam, partner)
    if chosen != "reference":
        values, scale, offset = (
            (None, None, None) if compensators is None or compensator_index is None else compensators
        )
        return _compose(
            base,
            base_index,
            values,
            scale,
            offset,
            None if compensators is None else compensator_index,
            shift,
            flip,
            lam,
            partner,
            mean,
            std,
            dtype,
            chosen,
        )
    return reference(
        base,
        base_index,
        compensators,
        compensator_index,
        shift=shift,
        flip=flip,
        lam=lam,
        partner=partner,
        mean=mean,
        std=std,
        dtype=dtype,
    )


@torch.library.custom_op(
    "infer_fast::compose",
    mutates_args=(),
    schema="(Tensor base, Tensor base_index, Tensor? values, Tensor? scale, Tensor? offset, Tensor? compensator_index, "
    "Tensor? shift, Tensor? flip, Tensor? lam, Tensor? partner, float[] mean, float[] std, ScalarType dtype, "
    "str backend) -> Tensor",
)
def _compose(
    base: torch.Tensor,
    base_index: torch.Tensor,
    values: torch.Tensor | None,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    compensator_index: torch.Tensor | None,
    shift: torch.Tensor | None,
    flip: torch.Tensor | None,
    lam: torch.Tensor | None,
    partner: torch.Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    """The native and triton backends."""
    out = torch.empty((len(base_index), *base.shape[1:]), dtype=dtype, device=base.device)
    given = [
        base,
        base_index,
        values,
        None if scale is None else scale.float(),
        None if offset is None else offset.float(),
        compensator_index,
        shift,
        flip,
        None if lam is None else lam.float(),
        partner,
    ]
    held = [None if t is None else t.contiguous() for t in given]
    if backend == "triton":
        from infer_fast.kernels import compose as kernels

        if out.numel():
            statistics = _statistics(tuple(mean), tuple(std), torch.float32, base.device)
            compensators = None if values is None else held[2:5]
            kernels.compose(*held[:2], compensators, *held[5:], statistics, out)
        return out
    compiled().compose(
        [*(buffer(t) for t in held), buffer(out)],
        dtype == torch.bfloat16,
        len(base_index),
        len(base),
        0 if values is None else len(values),
        base.shape[2],
        base.shape[3],
        mean,
        std,
        torch.get_num_threads(),
    )
    return out


@lru_cache(maxsize=16)
def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """mean and std on the device, (2, 3): sent once, for a copy from the host would end a capture."""
    return torch.tensor([mean, std], dtype=dtype, device=device)


@_compose.register_fake
def _(
    base: torch.Tensor,
    base_index: torch.Tensor,
    values: torch.Tensor | None,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    compensator_index: torch.Tensor | None,
    shift: torch.Tensor | None,
    flip: torch.Tensor | None,
    lam: torch.Tensor | None,
    partner: torch.Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    return base.new_empty((base_index.shape[0], *base.shape[1:]), dtype=dtype)


def _check(
    base: torch.Tensor,
    base_index: torch.Tensor,
    compensators: Quantised | None,
    compensator_index: torch.Tensor | None,
    shift: torch.Tensor | None,
    flip: torch.Tensor | None,
    lam: torch.Tensor | None,
    partner: torch.Tensor | None,
) -> None:
    if base.dtype != torch.uint8 or base.dim() != 4 or base.shape[1] != 3:
        raise InferFastError(f"compose takes base as uint8 (N, 3, H, W), not {base.dtype} {tuple(base.shape)}.")
    batch = len(base_index)
    expected = {
        "base_index": (base_index, torch.int64, (batch,)),
        "compensator_index": (compensator_index, torch.int64, (batch,)),
        "shift": (shift, torch.int64, (batch, 2)),
        "flip": (flip, torch.bool, (batch,)),
        "lam": (lam, None, (batch,)),
        "partner": (partner, torch.int64, (batch,)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is not None and (tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype)):
            raise InferFastError(f"compose takes {name} as {dtype} {shape}, not {tensor.dtype} {tuple(tensor.shape)}.")
    if (lam is None) != (partner is None):
        raise InferFastError("compose takes lam and partner together.")
    if compensator_index is not None and compensators is None:
        raise InferFastError("compose: compensator_index was given without compensators.")
    if compensators is not None and compensators.values.shape[1:] != base.shape[1:]:
        raise InferFastError(
            f"compose: compensators are {tuple(compensators.values.shape[1:])}, base images {tuple(base.shape[1:])}."
        )
    if base.device.type == "cpu":  # on a GPU the check would cost a synchronisation
        _check_range("base_index", base_index, 0, len(base))
        if compensators is not None and compensator_index is not None:
            _check_range("compensator_index", compensator_index, -1, len(compensators.values))
        if partner is not None:
            _check_range("partner", partner, 0, batch)


def _check_range(name: str, index: torch.Tensor, low: int, high: int) -> None:
    if len(index) and (int(index.min()) < low or int(index.max()) >= high):
        raise InferFastError(
            f"compose: {name} holds {int(index.min())}..{int(index.max())}, allowed {low}..{high - 1}."
        )
