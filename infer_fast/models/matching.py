"""A BatchNorm that is matched: what takes its place, and what all of one pass share.

In a network that was rewritten a MatchedBatchNorm stands where the layer stood; a network that runs as it is has every
call of batch_norm matched on its way (AsItRuns).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from infer_fast.models.census import BatchNormCall, Met, OnBatchNorm, Owners, summary
from infer_fast.models.fuse import Norm
from infer_fast.ops import bn_match, bn_match_statistics, bn_match_twice
from infer_fast.ops.bn_match import ACTIVATIONS, Statistics

Affine = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor, float]


class Layer(NamedTuple):
    """A BatchNorm layer: its name, and the weight of its penalty."""

    name: str
    weight: float


class Pass:
    """What the BatchNorms of one pass of a teacher share: its lanes, what they match, and what they report.

    whole: each layer's statistics of the batch that this pass takes a chunk of, in the order of the calls, or None.
    """

    def __init__(self, r_var: float = 1.0, backend: str | None = None) -> None:
        self.r_var, self.backend = r_var, backend
        self.met: list[Met] | None = None  # the layers that were met, where that is asked for
        self.begin(1)

    def begin(self, lanes: int, whole: Sequence[Statistics] | None = None, *, statistics_only: bool = False) -> None:
        self.lanes, self.whole, self.statistics_only = lanes, whole, statistics_only
        self.penalties: list[torch.Tensor] = []
        self.statistics: list[Statistics] = []
        self.calls = 0

    def next_whole(self) -> Statistics | None:
        """The whole batch's statistics for the layer that is called now."""
        self.calls += 1
        return None if self.whole is None else self.whole[self.calls - 1]

    def end(self) -> tuple[torch.Tensor | None, list[Statistics]]:
        """The sum of the penalties, (lanes,), or None without any; the statistics. Keeps neither."""
        total = torch.stack(self.penalties).sum(dim=0) if self.penalties else None
        statistics = self.statistics
        self.begin(1)
        return total, statistics

    def match(
        self,
        layer: Layer,
        batch_norm: Affine,
        residual: torch.Tensor | None = None,
        activation: str = "none",
        *,
        twice: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """One BatchNorm: the result, two of it with `twice` (see bn_match_twice); its penalty or statistics are kept.

        batch_norm: the input, weight, bias, running mean and variance, and eps.
        """
        if self.met is not None:
            self.met.append(Met(layer.name, summary(batch_norm[0])))
        lanes, backend = self.lanes, self.backend
        if self.statistics_only:
            result, statistics = bn_match_statistics(
                *batch_norm, residual=residual, activation=activation, lanes=lanes, backend=backend
            )
            self.statistics.append(statistics)
            return (result,)
        *y, penalty = (bn_match_twice if twice else bn_match)(
            *batch_norm,
            residual=residual,
            activation=activation,
            lanes=lanes,
            r_var=self.r_var,
            whole=self.next_whole(),
            backend=backend,
        )
        if layer.weight:
            self.penalties.append(penalty if layer.weight == 1 else layer.weight * penalty)
        return tuple(y)


class MatchedBatchNorm(nn.Module):
    """Takes the place of one eval-mode BatchNorm2d, of a residual add and an activation after it if there are such.

    Reports its penalty, times the layer's weight, to the `shared` pass; its input's statistics where that asks for
    them.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    _is_impure = True  # fx would drop a call whose result nobody takes, and with it the penalty

    def __init__(self, norm: Norm, shared: Pass, layer: Layer, activation: str = "none"):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.eps, self.shared, self.layer, self.activation = norm.eps, shared, layer, activation

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, *, twice: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The result, with x's shape unless `residual` broadcasts; two of it with `twice` (see bn_match_twice)."""
        # An add of a number, or that broadcasts, stays an add.
        fused = residual is None or (isinstance(residual, torch.Tensor) and residual.shape == x.shape)
        fused = fused and x.dim() == 4
        added, activation = (residual, self.activation) if fused else (None, "none")
        batch_norm = (x, self.weight, self.bias, self.running_mean, self.running_var, self.eps)
        again: list[torch.Tensor] = []
        if x.dim() == 4:
            y, *again = self.shared.match(self.layer, batch_norm, added, activation, twice=twice)
        else:  # of no images: a SyncBatchNorm may stand anywhere
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if not fused:
            y = y if residual is None else y + residual
            y, again = ACTIVATIONS[self.activation](y), []
            return (y, y) if twice else y
        return (y, again[0] if again else y) if twice else y


class AsItRuns(nn.Module):
    """A network left as it is, each of whose calls of batch_norm is matched while it runs.

    copying: what is matched is copied first, for networks that overwrite it later.
    """

    def __init__(self, network: nn.Module, shared: Pass, weights: dict[str, float], *, copying: bool):
        super().__init__()
        self.network, self.shared, self.weights, self.copying = network, shared, weights, copying
        self.forward = torch.compiler.disable(self._forward)  # here, since torch imports its compiler for it

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        with OnBatchNorm(partial(self._match, Owners(self.network))):
            return self.network(x.clone(memory_format=torch.contiguous_format) if self.copying else x.contiguous())

    def _match(self, owners: Owners, call: BatchNormCall) -> torch.Tensor | None:
        name = owners.of(call.running_mean)
        if name is None:
            return None
        x = call.input.clone() if self.copying else call.input
        batch_norm = (x, call.weight, call.bias, call.running_mean, call.running_var, call.eps)
        return self.shared.match(Layer(name, self.weights.get(name, 1.0)), batch_norm)[0]
