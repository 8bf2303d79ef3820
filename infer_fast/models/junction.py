"""Junctions: where two operations take the result of one fused BatchNorm, each is given one of its own.

Their gradients then come to the BatchNorm's backward apart, which adds them while it reads them (bn_match_twice). The
two share their memory, so nothing may be given one that changes it, or that returns a view which others may change.
"""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx, nn
from torch.nn import functional as F

# What returns a tensor of its own, and changes none; subclasses may do anything.
MODULES: set[type] = {nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d}
FUNCTIONS: set[object] = {
    *(operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul),
    *(F.conv2d, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d),
}


def give_twice(traced: fx.GraphModule, calls: Collection[fx.Node]) -> None:
    """Calls with twice=True those of `calls` that have just two users, which only read; each user is given one result.

    calls: of modules that take twice=True and then return their result two times. A user that takes the result more
    than once, as x + x does, is one user.
    """
    _skip_identities(traced)
    for call in calls:
        users = list(call.users)
        if len(users) == 2 and all(user in calls or _only_reads(traced, user) for user in users):
            call.kwargs = {"twice": True}
            for position, user in enumerate(users):
                with traced.graph.inserting_before(user):
                    own = traced.graph.call_function(operator.getitem, (call, position))
                user.replace_input_with(call, own)


def _skip_identities(traced: fx.GraphModule) -> None:
    """Takes every nn.Identity out of the graph: its users are those of what it is given."""
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and type(traced.get_submodule(node.target)) is nn.Identity and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _only_reads(traced: fx.GraphModule, user: fx.Node) -> bool:
    """Whether `user` changes nothing, and what it returns shares no memory with what it is given."""
    if user.op == "call_module":
        assert isinstance(user.target, str)  # fx calls a module by its name, and a function by itself
        return type(traced.get_submodule(user.target)) in MODULES
    return user.op == "call_function" and user.target in FUNCTIONS
