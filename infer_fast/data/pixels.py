"""From stored bytes to what networks see, and back."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Pixels(NamedTuple):
    """What images are normalised with: mean and standard deviation of each channel, of [0,1] pixels; std is never 0."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (..., 3, H, W) -> float32 (images/255 - mean) / std, same shape."""
        mean, std = self.columns(images.device)
        return (images.float() / 255 - mean) / std

    def to_bytes(self, normalised: torch.Tensor) -> torch.Tensor:
        """float32 (..., 3, H, W), normalised -> uint8 pixels, rounded to nearest and clamped to 0..255."""
        mean, std = self.columns(normalised.device)
        return ((normalised * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def bounds(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised values of pixels 0 and 1, each float32 (3, 1, 1)."""
        mean, std = self.columns(device)
        return -mean / std, (1 - mean) / std

    def columns(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """mean and std on `device`, each float32 (3, 1, 1)."""
        return _columns(self, device)


@lru_cache(maxsize=64)
def _columns(pixels: Pixels, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sent once: a GPU would have to wait for them in every batch."""
    mean, std = (torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in pixels)
    return mean, std


AS_STORED = Pixels((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # [0,1] pixels as they are
