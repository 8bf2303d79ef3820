"""What can be fused with a BatchNorm: the residual add and the activation after it, found in the torch.fx graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeGuard
from unittest import mock

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from infer_fast.errors import out_of_memory
from infer_fast.models.average import global_average, is_one
from infer_fast.models.copies import hooks_of, is_plain
from infer_fast.models.junction import give_twice
from infer_fast.models.overwriting import without_overwriting

MODULES: dict[type, str] = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu"}
FUNCTIONS: dict[object, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
}
METHODS: dict[object, str] = {"relu": "relu"}
ADDS: set[object] = {operator.add, torch.add}

Norm = nn.BatchNorm2d | nn.SyncBatchNorm  # which are the same in eval mode
Matched = Callable[[Norm, str], nn.Module]


def fuse(network: nn.Module, matched: Matched, *, twice: bool = False) -> nn.Module | None:
    """Puts matched(norm, activation) in the place of every BatchNorm2d and what can be fused with it.

    A BatchNorm that has hooks, or whose class does something else than its base, stays as it is. twice: at junctions
    these modules are called with twice=True, and give their result two times. `network` is used up. Returns None for a
    network that can't be rewritten: its code depends on the data, hooks of anyone may change it, or it overwrites what
    it may read by another name.
    """
    if _is_norm(network):
        return _without_graph(network, matched)
    if any(_changes_its_call(module) for module in network.modules()):
        return None
    buffers = {buffer: buffer._version for buffer in network.buffers()}
    try:
        with _autocast_refused():
            called = nn.Sequential(network)  # as it is called, with its defaults: not with each of them a variable
            traced = fx.GraphModule(called, _Tracer().trace(called))
        if any(buffer._version != version for buffer, version in buffers.items()):
            return None  # what tracing it changed is no constant
        without_overwriting(traced)
        return _fused(traced, matched, twice)
    except Exception as error:  # fx raises whatever the network's code raised, and what its names make of the code
        if out_of_memory(error):
            raise
        return None


def _fused(traced: fx.GraphModule, matched: Matched, twice: bool) -> fx.GraphModule:
    """A traced network in which nothing is overwritten, with its BatchNorms matched."""
    graph = traced.graph
    nodes = list(graph.nodes)
    norms = [(node, norm) for node in nodes if (norm := _called(traced, node)) is not None and _is_norm(norm)]
    calls = [_fuse_node(traced, node, norm, matched) for node, norm in norms]
    if twice:
        give_twice(traced, [call for call in calls if not isinstance(_called(traced, call), nn.Sequential)])
    for node in nodes:
        if node.op == "call_function" and node.target is F.adaptive_avg_pool2d and _pools_to_one(node):
            node.target = global_average
        if (
            node.op == "call_method"
            and node.target == "view"
            and not any(isinstance(a, torch.dtype) for a in node.args)
        ):
            node.target = "reshape"  # a channels_last tensor has no view of some shapes
    graph.eliminate_dead_code()
    graph.lint()
    traced.recompile()
    return traced


@contextmanager
def _autocast_refused() -> Iterator[None]:
    """A graph has no place for a precision of a part's own: entering one while it is traced is an error."""

    def refuse(*_: object) -> None:
        raise RuntimeError("a part of the network has a precision of its own")

    with mock.patch.object(torch.autocast, "__enter__", refuse):
        yield


class _Tracer(fx.Tracer):
    """Enters every module but torch's own and BatchNorm2d's subclasses (timm's carry an activation)."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.BatchNorm2d) or super().is_leaf_module(module, name)


def _is_norm(module: nn.Module) -> TypeGuard[Norm]:
    """Whether the module is a BatchNorm of images and nothing else, or timm's with an activation of its own."""
    if hasattr(module, "act") and type(module).__module__.startswith("timm."):
        return isinstance(module, nn.BatchNorm2d) and is_plain(module, type(module))
    if not isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) or is_parametrized(module):
        return False
    inherited = type(module).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    return inherited and is_plain(module, type(module))


def _changes_its_call(module: nn.Module) -> bool:
    """Whether the graph may lack what calling the module does: hooks, but those by which torch makes a weight anew in
    every call of one of its own layers, which the graph calls as it is."""
    layer = type(module).__module__.startswith("torch.nn.")
    hooks = [h for h in hooks_of(module) if not (layer and type(h).__module__.startswith("torch.nn.utils."))]
    return bool(hooks) or (not layer and "forward" in vars(module))


def _pools_to_one(node: fx.Node) -> bool:
    """Whether a call of adaptive_avg_pool2d gives one pixel."""
    if not node.args:  # the image is named, as global_average does not name it
        return False
    return is_one(node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size"))


def _called(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls, None if it calls none."""
    if node.op != "call_module":
        return None
    assert isinstance(node.target, str)  # fx calls a module by its name, and a function by itself
    return traced.get_submodule(node.target)


def _fuse_node(traced: fx.GraphModule, node: fx.Node, norm: Norm, matched: Matched) -> fx.Node:
    """Replaces a BatchNorm call, and the add and activation after it, by one call at the place of the last of them.

    The new call is returned.
    """
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
        given = node.args[0] if node.args else node.kwargs["input"]
        call = traced.graph.call_module(name, (given,) if residual is None else (given, residual))
    last.replace_all_uses_with(call)
    for used in dict.fromkeys((last, *_between(last, node))):
        traced.graph.erase_node(used)
    return call


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
    """What `add` adds to `node`, if it is a plain sum of two of the graph's values."""
    if add.kwargs or len(add.args) != 2:
        return None
    first, second = add.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):  # a number is no residual
        return None
    plain = add.target in ADDS if add.op == "call_function" else (add.op, add.target) == ("call_method", "add")
    if not plain or first is second:
        return None
    return second if first is node else first


def _activation(traced: fx.GraphModule, node: fx.Node) -> str | None:
    """The name of the activation that `node` is, or None."""
    if node.op == "call_module":
        module = _called(traced, node)
        return MODULES.get(type(module)) if module is not None and is_plain(module, type(module)) else None
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    return METHODS.get(node.target) if node.op == "call_method" else None


def _without_graph(norm: Norm, matched: Matched) -> nn.Module:
    """The norm alone, matched; with it the dropout and activation of its own that timm's BatchNormAct2d has."""
    if not hasattr(norm, "act"):
        return matched(norm, "none")
    drop, act = (getattr(norm, name, nn.Identity()) for name in ("drop", "act"))
    activation = "none" if isinstance(act, nn.Identity) else MODULES.get(type(act))
    if isinstance(drop, nn.Identity) and activation is not None:
        return matched(norm, activation)
    return nn.Sequential(matched(norm, "none"), drop, act)
