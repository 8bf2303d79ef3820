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

from infer_fast.errors import InferFastError, first_line, out_of_memory

TOLERANCE = 5e-4  # what may lie between two ways in float32, of what half of the logits exceed
SLOPES = 0.02  # ... and of a gradient's length: within rounding of 0, a ReLU may let another element through
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
    """What a network gave for some images, the BatchNorms that it met, and the gradient of its `weighed` logits (None:
    PyTorch has none)."""

    logits: torch.Tensor
    met: list[Met]
    gradient: torch.Tensor | None

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
    own = {*module._buffers, *module._parameters}
    return not isinstance(module, nn.modules.batchnorm._NormBase) and {"running_mean", "running_var"} <= own


class Owners:
    """Which module of a network, by its name, holds a tensor: a BatchNorm layer where several do, the first of them."""

    def __init__(self, network: nn.Module):
        self.names: dict[int, str] = {}
        for name, module in (*layers_of(network).items(), *network.named_modules()):
            for tensor in (*module._buffers.values(), *module._parameters.values()):
                if tensor is not None:
                    self.names.setdefault(_place(tensor), name)

    def of(self, tensor: torch.Tensor) -> str | None:
        """The name of the module that holds the tensor, or what it is a view of."""
        return self.names.get(_place(tensor))


def _place(tensor: torch.Tensor) -> int:
    """Where a tensor's values begin in memory; on the meta device, which has none, the tensor itself."""
    return id(tensor) if tensor.is_meta else tensor.data_ptr()


def census(network: nn.Module, images: torch.Tensor) -> Census:
    """Passes `images` (B, 3, H, W) through an eval-mode network as it is, and back.

    Raises InferFastError where it does not take them, gives anything but a tensor, or something else each time, or
    calls a BatchNorm on images that is not in eval mode or that none of its modules holds.
    """
    kind = type(network).__name__
    first, again = (_taken(network, images) for _ in range(2))
    if apart(again.logits, first.logits, TOLERANCE):
        raise InferFastError(
            f"{kind} gives other logits for the same images each time (it draws, or keeps something of every call): it "
            "can't be matched."
        )
    return first


def _taken(network: nn.Module, images: torch.Tensor) -> Census:
    """One pass, with its gradient if PyTorch has one: not of a network that writes over what its backward needs."""
    own = images.clone().requires_grad_(True)
    try:
        logits, met = _passed(network, own * 1)  # what it writes over is no leaf
        (gradient,) = torch.autograd.grad(weighed(logits), own)
        return Census(logits.detach(), met, gradient)
    except Exception as error:  # whatever the network's own code raises
        if out_of_memory(error):
            raise
        with torch.no_grad():
            return Census(*_passed_or_said(network, images.clone()), None)


def _passed_or_said(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[Met]]:
    """As _passed; whatever the network's own code raises is an InferFastError."""
    try:
        return _passed(network, images)
    except Exception as error:
        if isinstance(error, InferFastError) or out_of_memory(error):
            raise
        size, dtype = "x".join(map(str, images.shape)), str(images.dtype).removeprefix("torch.")
        raise InferFastError(
            f"{type(network).__name__} does not take {dtype} images of {size} "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error


def _passed(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[Met]]:
    kind, owners = type(network).__name__, Owners(network)
    met: list[Met] = []

    def count(call: BatchNormCall) -> None:
        layer = owners.of(call.running_mean)
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

    with OnBatchNorm(count):
        logits = network(images)
    if not isinstance(logits, torch.Tensor):
        raise InferFastError(f"{kind} returns a {_described(logits)}: a teacher returns its logits alone, a tensor.")
    return logits, met


def weighed(logits: torch.Tensor) -> torch.Tensor:
    """The sum of all finite logits, in which they weigh unlike."""
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device, dtype=torch.float64).view_as(logits)
    return torch.where(logits.isfinite(), logits.double() * weights, 0.0).sum()


def apart(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether logits differ: by more than `tolerance` of what half of them exceed, or in where they are not finite."""
    found, expected = found.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(found[~finite], expected[~finite]):
        return True
    if not finite.any():
        return False
    sizes = expected[finite].abs()
    scale = sizes[sizes > 0].median() if sizes.any() else 0.0  # a ReLU may leave most of them at 0
    return bool((found - expected)[finite].abs().amax() > tolerance * scale)


def _described(output: object) -> str:
    kind = type(output).__name__
    return f"{kind} of {len(output)}" if isinstance(output, (tuple, list, dict)) else kind


def difference(found: Census, expected: Census, tolerance: float = TOLERANCE) -> str | None:
    """In words, where a rewritten network does something else than the one it was made of; None where it does not."""
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
    if apart(found.logits, expected.logits, tolerance):
        return "its logits are others"
    if found.gradient is None or expected.gradient is None:
        return None
    error, size = ((found.gradient - expected.gradient).double().norm(), expected.gradient.double().norm())
    return f"its gradient is off by {float(error / size):.1%}" if error > SLOPES * size else None


def _of(census: Census, layer: str) -> list[torch.Tensor]:
    return [met.summary for met in census.met if met.layer == layer]
