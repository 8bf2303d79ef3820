"""What the values of a network must be: finite, and its variances not negative."""

from __future__ import annotations

from collections.abc import Mapping

import torch

VARIANCES = "running_var"


def faulty(state: Mapping[str, torch.Tensor]) -> str | None:
    """The first tensor of a state dict that no network can have, and what is wrong with it; None if all is well.

    Waits for the device once, whatever the number of tensors.
    """
    named = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()}
    if not named or bool(torch.stack([_sound(name, tensor) for name, tensor in named.items()]).all()):
        return None
    name, tensor = next((name, tensor) for name, tensor in named.items() if not _sound(name, tensor))
    if tensor.isnan().any():
        return f"{name} holds NaN"
    return f"{name} holds infinity" if tensor.isinf().any() else f"{name} holds a variance below 0"


def _sound(name: str, tensor: torch.Tensor) -> torch.Tensor:
    sound = tensor.isfinite().all()
    return sound & (tensor >= 0).all() if name.endswith(VARIANCES) else sound
