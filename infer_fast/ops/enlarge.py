"""enlarge: small images to a larger size, bilinearly, as one matrix product along each axis.

    out = rows @ x @ columns^T          rows (H, s), columns (W, s): a pixel's weights of its two neighbours

Half-pixel centres, edges repeated, as torch's interpolate. The gradient is two products more, and no scatter: it is the
same in every run, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F


class Maps(NamedTuple):
    """What takes lines of s pixels to the larger size: float32 (H, s) and (W, s)."""

    rows: torch.Tensor
    columns: torch.Tensor


def enlarging(side: int, size: Sequence[int], like: torch.Tensor | None = None) -> Maps:
    """The maps from (side, side) to `size` (H, W), on the device of `like` and in its dtype."""
    one = torch.eye(side)[None]  # line i is 1 at pixel i alone
    lines = [F.interpolate(one, length, mode="linear")[0].T.contiguous() for length in size]
    return Maps(*(lines if like is None else [line.to(like) for line in lines]))


def enlarged(x: torch.Tensor, maps: Maps) -> torch.Tensor:
    """float32 (..., s, s) -> (..., H, W), differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        return maps.rows @ x @ maps.columns.T
