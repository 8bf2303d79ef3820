"""BatchNorm surgery: a copy of a frozen teacher made for matching.

Every BatchNorm2d, the residual add after it and the activation after that become one bn_match, which also gives the
statistics penalty; every convolution keeps nothing but its weight for backward, every max-pooling a byte an output.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from infer_fast.errors import InferFastError
from infer_fast.models.frozen import FrozenConv2d, FrozenLinear, freeze
from infer_fast.models.fuse import fuse
from infer_fast.models.pool import freeze_pooling
from infer_fast.ops import bn_match, bn_match_statistics, bn_match_twice
from infer_fast.ops.bn_match import ACTIVATIONS, Statistics


class Pass:
    """What the BatchNorms of one pass of a teacher share: its lanes, what they match, and what they report.

    whole: each layer's statistics of the batch that this pass takes a chunk of, in the order of the calls, or None.
    """

    def __init__(self) -> None:
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


class MatchedBatchNorm(nn.Module):
    """Takes the place of one eval-mode BatchNorm2d, of a residual add and an activation after it if there are such.

    Reports its penalty, times `match_weight`, to the `shared` pass; its input's statistics where that asks for them.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(
        self,
        norm: nn.BatchNorm2d,
        shared: Pass,
        *,
        match_weight: float,
        r_var: float,
        activation: str = "none",
        backend: str | None = None,
    ):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.eps, self.shared, self.activation = norm.eps, shared, activation
        self.match_weight, self.r_var, self.backend = match_weight, r_var, backend

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, *, twice: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The result, with x's shape unless `residual` broadcasts; two of it with `twice` (see bn_match_twice)."""
        again: list[torch.Tensor] = []
        fused = residual is None or residual.shape == x.shape  # an add that broadcasts stays an add
        added, activation = (residual, self.activation) if fused else (None, "none")
        batch_norm = (x, self.weight, self.bias, self.running_mean, self.running_var, self.eps)
        lanes, backend = self.shared.lanes, self.backend
        if self.shared.statistics_only:
            y, statistics = bn_match_statistics(
                *batch_norm, residual=added, activation=activation, lanes=lanes, backend=backend
            )
            self.shared.statistics.append(statistics)
        else:
            y, *again, penalty = (bn_match_twice if twice else bn_match)(
                *batch_norm,
                residual=added,
                activation=activation,
                lanes=lanes,
                r_var=self.r_var,
                whole=self.shared.next_whole(),
                backend=backend,
            )
            if self.match_weight:
                self.shared.penalties.append(penalty if self.match_weight == 1 else self.match_weight * penalty)
        if residual is not None and not fused:
            y, again = ACTIVATIONS[self.activation](y + residual), []
        return (y, again[0] if again else y) if twice else y


class MatchedTeacher(nn.Module):
    """A frozen, eval-mode copy of `teacher` that gives its logits and sum_l w_l * penalty_l (the loss of INFER, eq. 5).

    w_l is first_bn_multiplier for the first BatchNorm2d in module order, 0 for the positions in skip_bn, else 1.
    The copy's weights are channels_last. The caller's teacher is not touched.
    Raises InferFastError if it has no BatchNorm2d with running statistics.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        first_bn_multiplier: float = 10.0,
        r_var: float = 1.0,
        skip_bn: tuple[int, ...] = (),
        backend: str | None = None,
    ):
        super().__init__()
        self.shared = Pass()
        network = copy.deepcopy(teacher).eval().requires_grad_(False).to(memory_format=torch.channels_last)
        norms = {m: i for i, m in enumerate(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))}
        _check(teacher, list(norms), skip_bn)
        weights = [0.0 if i in skip_bn else first_bn_multiplier if i == 0 else 1.0 for i in norms.values()]

        def matched(norm: nn.BatchNorm2d, activation: str) -> MatchedBatchNorm:
            return MatchedBatchNorm(
                norm,
                self.shared,
                match_weight=weights[norms[norm]],
                r_var=r_var,
                activation=activation,
                backend=backend,
            )

        self._weights = list(network.parameters())  # what convolutions and norms below share their memory with
        self.network = freeze_pooling(freeze(fuse(network, matched, twice=True)), backend)

    @torch.no_grad()
    def take(self, teacher: nn.Module) -> None:
        """Takes over the weights of `teacher`, the network it was made of with others, in the tensors that are there.

        So what an engine captured or compiled goes on being of use. Statistics are those it was made with.
        """
        for own, given in zip(self._weights, teacher.parameters(), strict=True):
            own.copy_(given)
        for module in self.modules():
            if isinstance(module, (FrozenConv2d, FrozenLinear)):
                module.cast_again()

    def forward(
        self, x: torch.Tensor, lanes: int = 1, whole: Sequence[Statistics] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (lanes*B, 3, H, W), normalised -> logits (lanes*B, C) and the weighted penalty, (lanes,).

        whole: what `statistics` gave for the larger batch that x is a chunk of (see bn_match).
        """
        self.shared.begin(lanes, whole)
        logits = self.network(x.contiguous(memory_format=torch.channels_last))
        total, _ = self.shared.end()
        return logits, torch.zeros(lanes, device=x.device) if total is None else total

    @torch.no_grad()
    def statistics(self, x: torch.Tensor, lanes: int = 1) -> list[Statistics]:
        """The statistics of every BatchNorm's input, in the order of the calls; keeps nothing for backward."""
        self.shared.begin(lanes, statistics_only=True)
        self.network(x.contiguous(memory_format=torch.channels_last))
        return self.shared.end()[1]


def _check(teacher: nn.Module, norms: list[nn.BatchNorm2d], skip_bn: tuple[int, ...]) -> None:
    kind = type(teacher).__name__
    if not norms:
        raise InferFastError(
            f"{kind} has no BatchNorm2d, whose statistics are what images are matched to: choose another teacher."
        )
    for position, norm in enumerate(norms):
        if norm.running_mean is None or norm.running_var is None:
            raise InferFastError(f"{kind}: BatchNorm2d layer {position} keeps no running statistics to match.")
    beyond = [p for p in skip_bn if not 0 <= p < len(norms)]
    if beyond:
        raise InferFastError(
            f"skip_bn names BatchNorm layer {beyond[0]}, but {kind} has {len(norms)} (0 is the first)."
        )
