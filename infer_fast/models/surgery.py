"""BatchNorm surgery: a copy of a frozen teacher made for matching.

Every BatchNorm2d, the residual add after it and the activation after that become one bn_match, which also gives the
statistics penalty; every convolution keeps nothing but its weight for backward. What follows a BatchNorm is found in
the torch.fx graph; a network that can't be traced is walked module by module, and its activations stay where they are.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx, nn
from torch.nn import functional as F

from infer_fast.errors import InferFastError
from infer_fast.ops import bn_match, bn_match_statistics
from infer_fast.ops.bn_match import ACTIVATIONS, Statistics
from infer_fast.ops.frozen_conv import frozen_conv2d

MODULES: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}
FUNCTIONS: dict[object, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
}
METHODS: dict[object, str] = {"relu": "relu", "relu_": "relu"}
ADDS: set[object] = {operator.add, operator.iadd, torch.add}

Matched = Callable[[nn.BatchNorm2d, str], nn.Module]  # what takes the place of a norm and the activation after it


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

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
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
            y, penalty = bn_match(
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
        return y if fused or residual is None else ACTIVATIONS[self.activation](y + residual)


class FrozenConv2d(nn.Module):
    """Takes the place of a Conv2d whose weight is constant; under autocast the weight is cast once and kept."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        assert not isinstance(conv.padding, str)  # freeze_convolutions leaves those as they are
        self.register_buffer("weight", conv.weight.detach())
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        self.rest = (_pair(conv.stride), _pair(conv.padding), _pair(conv.dilation), conv.groups)
        self.cast: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        weight, bias = self._weights(dtype)
        with torch.autocast(kind, enabled=False):
            return frozen_conv2d(x.to(dtype), weight, bias, *self.rest)

    def cast_again(self) -> None:
        """After the weight has changed: what it was cast to follows, where it is."""
        for weight, bias in self.cast.values():
            weight.copy_(self.weight)
            if bias is not None and self.bias is not None:
                bias.copy_(self.bias)

    def _weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        if dtype == self.weight.dtype:
            return self.weight, self.bias
        if dtype not in self.cast:
            self.cast[dtype] = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        return self.cast[dtype]


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Of a Conv2d, whose tuples have two numbers each: torch's types don't say so."""
    rows, columns = sizes
    return rows, columns


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
        self.network = freeze_convolutions(fuse(network, matched))

    @torch.no_grad()
    def take(self, teacher: nn.Module) -> None:
        """Takes over the weights of `teacher`, the network it was made of with others, in the tensors that are there.

        So what an engine captured or compiled goes on being of use. Statistics are those it was made with.
        """
        for own, given in zip(self._weights, teacher.parameters(), strict=True):
            own.copy_(given)
        for module in self.modules():
            if isinstance(module, FrozenConv2d):
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


def fuse(network: nn.Module, matched: Matched) -> nn.Module:
    """Puts matched(norm, activation) in the place of every BatchNorm2d and what can be fused with it."""
    if isinstance(network, nn.BatchNorm2d):
        return _without_graph(network, matched)
    try:
        graph = _Tracer().trace(network)
    except Exception:  # control flow that depends on data: fx raises whatever the network's code raised
        return _walk(network, matched)
    traced = fx.GraphModule(network, graph)
    for node in list(graph.nodes):
        norm = _called(traced, node)
        if isinstance(norm, nn.BatchNorm2d):
            _fuse_node(traced, node, norm, matched)
    graph.eliminate_dead_code()
    graph.lint()
    traced.recompile()
    return traced


class _Tracer(fx.Tracer):
    """Enters every module but torch's own and BatchNorm2d's subclasses (timm's carry an activation)."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.BatchNorm2d) or super().is_leaf_module(module, name)


def _called(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls, None if it calls none."""
    if node.op != "call_module":
        return None
    assert isinstance(node.target, str)  # fx calls a module by its name, and a function by itself
    return traced.get_submodule(node.target)


def _fuse_node(traced: fx.GraphModule, node: fx.Node, norm: nn.BatchNorm2d, matched: Matched) -> None:
    """Replaces a BatchNorm call, and the add and activation after it, by one call at the place of the last of them."""
    last, residual = node, None
    if hasattr(norm, "act"):
        module = _without_graph(norm, matched)
    else:
        add = _only_user(node)
        if add is not None and (residual := _other_summand(add, node)) is not None:
            last = add
        follower = _only_user(last)
        activation = None if follower is None else _activation(traced, follower)
        if follower is not None and activation is not None:
            last = follower
        module = matched(norm, activation or "none")
    name = f"matched_{node.name}"
    traced.add_submodule(name, module)
    with traced.graph.inserting_after(last):
        call = traced.graph.call_module(name, (node.args[0],) if residual is None else (node.args[0], residual))
    last.replace_all_uses_with(call)
    for used in dict.fromkeys((last, *_between(last, node))):
        traced.graph.erase_node(used)


def _between(last: fx.Node, node: fx.Node) -> list[fx.Node]:
    """The fused nodes before `last`, latest first, down to and with the BatchNorm `node`."""
    chain = []
    while last is not node:
        last = next(a for a in last.all_input_nodes if a is node or node in a.all_input_nodes)
        chain.append(last)
    return chain


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_summand(add: fx.Node, node: fx.Node) -> fx.Node | None:
    """What `add` adds to `node`, if it is a plain sum of two tensors that overwrites nothing anyone else reads."""
    if add.kwargs or len(add.args) != 2:
        return None
    first, second = add.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):  # a number is no residual
        return None
    plain = (add.op == "call_function" and add.target in ADDS) or (
        add.op == "call_method" and add.target in ("add", "add_")
    )
    if not plain or first is second:
        return None
    in_place = add.target in (operator.iadd, "add_")
    other = second if first is node else first
    if in_place and first is other and len(other.users) > 1:
        return None
    return other


def _activation(traced: fx.GraphModule, node: fx.Node) -> str | None:
    """The name of the activation that `node` is, or None."""
    if node.op == "call_module":
        return MODULES.get(type(_called(traced, node)))
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    return METHODS.get(node.target) if node.op == "call_method" else None


def _walk(network: nn.Module, matched: Matched) -> nn.Module:
    """Without a graph: every BatchNorm2d is replaced where it stands."""
    for name, child in network.named_children():
        setattr(network, name, _walk(child, matched))
    return _without_graph(network, matched) if isinstance(network, nn.BatchNorm2d) else network


def _without_graph(norm: nn.BatchNorm2d, matched: Matched) -> nn.Module:
    """The norm alone, matched; with it the dropout and activation of its own that timm's BatchNormAct2d has."""
    if not hasattr(norm, "act"):
        return matched(norm, "none")
    drop, act = (getattr(norm, name, nn.Identity()) for name in ("drop", "act"))
    activation = "none" if isinstance(act, nn.Identity) else MODULES.get(type(act))
    if isinstance(drop, nn.Identity) and activation is not None:
        return matched(norm, activation)
    return nn.Sequential(matched(norm, "none"), drop, act)


def freeze_convolutions(network: nn.Module) -> nn.Module:
    """Every plain Conv2d becomes a FrozenConv2d (string or non-zero padding modes stay as they are)."""
    for name, child in network.named_children():
        setattr(network, name, freeze_convolutions(child))
    if type(network) is nn.Conv2d and network.padding_mode == "zeros" and not isinstance(network.padding, str):
        return FrozenConv2d(network)
    return network


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
