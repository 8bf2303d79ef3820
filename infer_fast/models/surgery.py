"""BatchNorm surgery: a copy of a frozen teacher whose BatchNorm layers also return the statistics penalty."""

from __future__ import annotations

import copy

import torch
from torch import nn

from infer_fast.errors import InferFastError
from infer_fast.ops import bn_match


class PenaltySum:
    """What one pass of a teacher adds up: sum_l w_l * penalty_l, float32 (lanes,)."""

    def __init__(self) -> None:
        self.lanes = 1
        self.total: torch.Tensor | None = None

    def start(self, lanes: int) -> None:
        self.lanes, self.total = lanes, None

    def add(self, penalty: torch.Tensor, weight: float) -> None:
        weighted = penalty if weight == 1 else weight * penalty
        self.total = weighted if self.total is None else self.total + weighted


class MatchedBatchNorm(nn.Module):
    """Takes the place of one eval-mode BatchNorm2d and reports its penalty, times `match_weight`, to `penalties`."""

    def __init__(
        self, norm: nn.BatchNorm2d, penalties: PenaltySum, match_weight: float, r_var: float, backend: str | None
    ):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.eps, self.penalties = norm.eps, penalties
        self.match_weight, self.r_var, self.backend = match_weight, r_var, backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, penalty = bn_match(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            lanes=self.penalties.lanes,
            r_var=self.r_var,
            backend=self.backend,
        )
        if self.match_weight:
            self.penalties.add(penalty, self.match_weight)
        return y


class MatchedTeacher(nn.Module):
    """A frozen, eval-mode copy of `teacher` that gives its logits and sum_l w_l * penalty_l (the loss of INFER, eq. 5).

    w_l is first_bn_multiplier for the first BatchNorm2d in module order, 0 for the positions in skip_bn, else 1.
    The caller's teacher is not touched. Raises InferFastError if it has no BatchNorm2d with running statistics.
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
        self.penalties = PenaltySum()
        self.network = copy.deepcopy(teacher).eval().requires_grad_(False)
        norms = [(name, m) for name, m in self.network.named_modules() if isinstance(m, nn.BatchNorm2d)]
        self._check(teacher, norms, skip_bn)
        for position, (name, norm) in enumerate(norms):
            weight = 0.0 if position in skip_bn else (first_bn_multiplier if position == 0 else 1.0)
            matched: nn.Module = MatchedBatchNorm(norm, self.penalties, weight, r_var, backend)
            if hasattr(norm, "act"):  # timm's BatchNormAct2d: BatchNorm, then drop, then activation
                matched = nn.Sequential(matched, getattr(norm, "drop", nn.Identity()), norm.act)
            self._replace(name, matched)

    def forward(self, x: torch.Tensor, lanes: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (lanes*B, 3, H, W), normalised -> logits (lanes*B, C) and the weighted penalty, (lanes,)."""
        self.penalties.start(lanes)
        logits = self.network(x)
        total = self.penalties.total
        return logits, torch.zeros(lanes, device=x.device) if total is None else total

    def _replace(self, name: str, module: nn.Module) -> None:
        parent_name, _, child = name.rpartition(".")
        if not name:
            self.network = module
        else:
            setattr(self.network.get_submodule(parent_name), child, module)

    @staticmethod
    def _check(teacher: nn.Module, norms: list, skip_bn: tuple[int, ...]) -> None:
        kind = type(teacher).__name__
        if not norms:
            raise InferFastError(
                f"{kind} has no BatchNorm2d, whose statistics are what images are matched to: choose another teacher."
            )
        for name, norm in norms:
            if norm.running_mean is None or norm.running_var is None:
                raise InferFastError(
                    f"{kind}: BatchNorm2d {name!r} keeps no running statistics, so there is none to match."
                )
        beyond = [p for p in skip_bn if not 0 <= p < len(norms)]
        if beyond:
            raise InferFastError(
                f"skip_bn names BatchNorm layer {beyond[0]}, but {kind} has {len(norms)} (0 is the first)."
            )
