"""In-place operations of a traced network, rewritten: each gives a tensor of its own, which later users are given.

A graph in which nothing is overwritten may be reordered, and what nobody uses in it may be dropped. Where memory that
is overwritten may be seen by another name too (a view of it, a part), it is not rewritten.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable

import torch
from torch import fx, nn
from torch.nn import functional as F

from infer_fast.models.copies import hooks_of

OPERATORS: dict[object, Callable] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.imatmul: operator.matmul,
}
# What may return its input, or a view of it. Everything else in torch.nn returns memory of its own.
ALIASES: set[type] = {
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
}
# Functions and methods that return memory of their own.
FRESH_FUNCTIONS: set[object] = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, operator.matmul),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.concat, torch.stack, torch.matmul, torch.mean),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.abs, torch.maximum, torch.minimum, torch.softmax),
    *(F.conv2d, F.linear, F.batch_norm, F.layer_norm, F.group_norm, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    *(F.adaptive_max_pool2d, F.interpolate, F.pad, F.softmax, F.log_softmax, F.relu, F.relu6, F.silu, F.gelu, F.elu),
    *(F.leaky_relu, F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.mish, F.selu, F.celu, F.prelu),
}
FRESH_METHODS = {
    *("add", "sub", "mul", "div", "neg", "pow", "exp", "sqrt", "abs", "relu", "sigmoid", "tanh", "softmax"),
    *("mean", "sum", "amax", "amin", "clamp", "clone"),
}
NO_TWINS = {"set_", "resize_", "resize_as_", "copy_", "requires_grad_", "random_"}


class OverwritingError(Exception):
    """An in-place operation that can't be rewritten; its text says which."""


def without_overwriting(traced: fx.GraphModule) -> None:
    """Rewrites the graph of `traced` so that nothing in it is overwritten. Raises OverwritingError where it can't."""
    place = {node: position for position, node in enumerate(traced.graph.nodes)}
    same: dict[fx.Node, set[fx.Node]] = {}  # the nodes that may share a node's memory, with itself
    for node in list(traced.graph.nodes):
        target = _made_pure(traced, node)
        if target is not None:
            later = [user for user in target.users if place[user] > place[node]]
            seen = [n for n in same[target] if n is not target and any(place[u] > place[node] for u in n.users)]
            unsure = later and not _surely_a_tensor(target, node)
            if seen or unsure or any(n.op == "get_attr" for n in same[target]):
                raise OverwritingError(f"{node} overwrites what {(seen or [target])[0]} shows too")
            for user in later:
                user.replace_input_with(target, node)
        shared = set() if target is not None or _is_fresh(traced, node) else set(node.all_input_nodes)
        same[node] = {node}.union(*(same[n] for n in shared))
        for other in same[node]:
            same[other] = same[node]


def _made_pure(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Makes `node` give its result without overwriting anything; returns what it overwrote, None if nothing."""
    if node.op == "call_module":
        return _pure_module(traced, node)
    if node.op == "call_function":
        return _pure_function(node)
    return _pure_method(node) if node.op == "call_method" else None


def _pure_module(traced: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    assert isinstance(node.target, str)  # fx calls a module by its name
    module = traced.get_submodule(node.target)
    if getattr(module, "inplace", False) is not True:
        return None
    pure = copy.deepcopy(module)
    pure.inplace = False  # type: ignore[assignment]
    name = f"pure_{node.name}"
    traced.add_submodule(name, pure)
    node.target = name
    return None if type(module) in ALIASES else _first(node)


def _pure_function(node: fx.Node) -> fx.Node | None:
    name = getattr(node.target, "__name__", "")
    if node.target in OPERATORS:
        node.target = OPERATORS[node.target]
        return _first(node)
    if node.target in (operator.setitem, operator.delitem) or node.kwargs.get("out") is not None:
        raise OverwritingError(f"{node} writes into a tensor")
    if name.endswith("_") and not name.endswith("__"):
        twin = getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)
        if twin is None:
            raise OverwritingError(f"{node} has no form that overwrites nothing")
        node.target = twin
        return _first(node)
    place = _place_of_inplace(node.target)
    if place is None:
        return None
    asked = node.kwargs.get("inplace", node.args[place] if len(node.args) > place else False)
    if asked is False:
        return None
    node.args = tuple(False if i == place else arg for i, arg in enumerate(node.args))
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    return None if name.endswith("dropout") else _first(node)  # which does nothing in eval mode


def _pure_method(node: fx.Node) -> fx.Node | None:
    name = str(node.target)
    if name == "__setitem__":
        raise OverwritingError(f"{node} writes into a tensor")
    if not name.endswith("_") or name.endswith("__"):
        return None
    if name in NO_TWINS or not hasattr(torch.Tensor, name[:-1]):
        raise OverwritingError(f"{node} has no form that overwrites nothing")
    node.target = name[:-1]
    return _first(node)


def _place_of_inplace(function: object) -> int | None:
    """The position of a function's argument `inplace`."""
    try:
        return list(inspect.signature(function).parameters).index("inplace")  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _first(node: fx.Node) -> fx.Node:
    """What an in-place operation overwrites: its first argument."""
    given = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(given, fx.Node):
        raise OverwritingError(f"{node} overwrites something unknown")
    return given


def _surely_a_tensor(target: fx.Node, writer: fx.Node) -> bool:
    """Whether `target` is no number: x += 1 leaves the other names of a number alone."""
    if writer.op != "call_function" or writer.target not in OPERATORS.values():
        return True
    if target.op == "call_function":
        return target.target in FRESH_FUNCTIONS - set(OPERATORS.values())
    return target.op in ("placeholder", "call_module") or (
        target.op == "call_method" and target.target in FRESH_METHODS
    )


def _is_fresh(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` surely returns memory of its own."""
    if node.op == "call_module":
        assert isinstance(node.target, str)
        module = traced.get_submodule(node.target)
        known = type(module).__module__.startswith("torch.nn.modules.") and type(module) not in ALIASES
        return known and not hooks_of(module)
    if node.op == "call_function":
        return node.target in FRESH_FUNCTIONS
    return node.op in ("placeholder", "get_attr") or (node.op == "call_method" and node.target in FRESH_METHODS)
