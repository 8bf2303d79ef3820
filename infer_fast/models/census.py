"""What a network does with its BatchNorms on a few images, whatever way it calls them.

PyTorch's BatchNorm layers, their subclasses and functional calls all end in torch.nn.functional.batch_norm (or
torch.batch_norm): a mode of torch's function overrides sees every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from infer_fast.errors import InferFastError, first_line

# The arguments of both functions that matter, by position.
SIGNATURES: dict[object, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


class BatchNormCall(NamedTuple):
    """A call of batch_norm on images with running statistics."""

    input: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor
    running_var: torch.Tensor
    eps: float
    training: bool


class Met(NamedTuple):
    """A BatchNorm met on the way: its layer's name, and the mean and mean square of its input, float64 (2,)."""

    layer: str
    summary: torch.Tensor


class Census(NamedTuple):
    """What a network gave for some images, and the BatchNorms that it met."""

    logits: torch.Tensor
    met: list[Met]

    def counts(self) -> dict[str, int]:
        """How often each layer was met."""
        return {layer: sum(m.layer == layer for m in self.met) for layer in dict.fromkeys(m.layer for m in self.met)}


class OnBatchNorm(TorchFunctionMode):
    """While it is active, calls of batch_norm on (B, C, H, W) with running statistics are what `instead` returns."""

    def __init__(self, instead: Callable[[BatchNormCall], torch.Tensor | None]):
        super().__init__()
        self.instead = instead

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in SIGNATURES:
            call = _call(SIGNATURES[func], args, kwargs)
            result = None if call is None else self.instead(call)
            if result is not None:
                return result
        return func(*args, **kwargs)


def _call(names: tuple[str, ...], args: tuple, kwargs: dict) -> BatchNormCall | None:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given["input"].dim() != 4 or given["running_mean"] is None or given["running_var"] is None:
        return None
    affine = given.get("weight"), given.get("bias")
    eps, training = given.get("eps", 1e-5), bool(given.get("training", False))
    return BatchNormCall(given["input"], *affine, given["running_mean"], given["running_var"], eps, training)


def summary(x: torch.Tensor) -> torch.Tensor:
    """What tells one input of a BatchNorm from another, float64 (2,)."""
    x = x.detach().double()
    return torch.stack([x.mean(), x.square().mean()])


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that keep running statistics of images, by name, in module order: BatchNorm2d, SyncBatchNorm, and
    those of anyone that name theirs alike."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) or _keeps_statistics(module)
    }


def _keeps_statistics(module: nn.Module) -> bool:
    own = module._buffers
    return not isinstance(module, nn.modules.batchnorm._NormBase) and {"running_mean", "running_var"} <= own.keys()


def owners_of(network: nn.Module) -> dict[int, str]:
    """The name of the module that holds a buffer, by the buffer's id."""
    return {
        id(buffer): name
        for name, module in network.named_modules()
        for buffer in module._buffers.values()
        if buffer is not None
    }


def census(network: nn.Module, images: torch.Tensor) -> Census:
    """Passes `images` (B, 3, H, W) through an eval-mode network as it is.

    Raises InferFastError where it does not take them, gives anything but a tensor, or calls a BatchNorm on images that
    is not in eval mode or that none of its modules holds.
    """
    kind, owners, met = type(network).__name__, owners_of(network), []

    def count(call: BatchNormCall) -> None:
        layer = owners.get(id(call.running_mean))
        if layer is None:
            raise InferFastError(
                f"{kind} calls a BatchNorm whose running statistics none of its modules holds, so that it can't be "
                "matched: keep its layers in an nn.ModuleList or as attributes."
            )
        if call.training:
            raise InferFastError(
                f"{kind}: BatchNorm {layer or 'itself'} normalises by the batch in eval mode too, not by the running "
                "statistics that images are matched to."
            )
        met.append(Met(layer, summary(call.input)))

    try:
        with OnBatchNorm(count), torch.no_grad():
            logits = network(images)
    except InferFastError:
        raise
    except Exception as error:  # whatever the network's own code raises
        size = "x".join(map(str, images.shape))
        raise InferFastError(
            f"{kind} does not take {str(images.dtype).removeprefix('torch.')} images of {size} "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    if not isinstance(logits, torch.Tensor):
        raise InferFastError(f"{kind} returns a {_described(logits)}: a teacher returns its logits alone, a tensor.")
    return Census(logits, met)


def _described(output: object) -> str:
    kind = type(output).__name__
    return f"{kind} of {len(output)}" if isinstance(output, (tuple, list, dict)) else kind


def difference(found: Census, expected: Census, tolerance: float) -> str | None:
    """In words, where a rewritten network does something else than the one it was made of; None where it does not.

    tolerance: of logits, relative to the largest; what lies before a layer is told apart by ten times as much.
    """
    counts, wanted = found.counts(), expected.counts()
    for layer in dict.fromkeys([*wanted, *counts]):
        if counts.get(layer, 0) != wanted.get(layer, 0):
            return f"BatchNorm {layer} is called {wanted.get(layer, 0)} times and matched {counts.get(layer, 0)}"
    if found.logits.shape != expected.logits.shape:
        return f"its output is {tuple(found.logits.shape)} in place of {tuple(expected.logits.shape)}"
    for layer in wanted:
        for own, other in zip(_of(found, layer), _of(expected, layer), strict=True):
            if not torch.allclose(own, other, rtol=10 * tolerance, atol=tolerance * float(other[1].sqrt())):
                return f"what comes to BatchNorm {layer} is something else"
    error = (found.logits.double() - expected.logits.double()).abs().amax()
    if not error <= tolerance * expected.logits.abs().amax():
        return f"its logits differ by {float(error):.2g}"
    return None


def _of(census: Census, layer: str) -> list[torch.Tensor]:
    return [met.summary for met in census.met if met.layer == layer]
