"""Results that two operations take: who is given one of their own, and that values and gradients stay the network's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import published
from infer_fast.models import MatchedTeacher, build


class Block(nn.Module):
    """A BatchNorm and SiLU, whose result z `takes` uses; a subclass says how many of it are `given`."""

    given = 1

    def __init__(self):
        super().__init__()
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.identity = nn.Identity()

    def forward(self, x):
        return self.takes(F.silu(self.norm(x)))


class Residual(Block):
    given = 2

    def takes(self, z):
        return self.other(self.conv(z)) + z


class BehindAnIdentity(Block):
    given = 2

    def takes(self, z):
        z = self.identity(z)
        return self.other(self.conv(z)) + z


class TwoConvolutions(Block):
    given = 2

    def takes(self, z):
        return self.conv(z) * self.second(z)


class SqueezeAndExcite(Block):
    given = 2

    def takes(self, z):
        return z * torch.sigmoid(self.second(F.adaptive_avg_pool2d(z, 1)))


class TakenTwiceByOne(Block):
    given = 2

    def takes(self, z):
        return (z + z) * self.conv(z)


class BroadcastResidual(Block):
    """The sum is no residual of the same shape, so an add and an activation follow the BatchNorm."""

    given = 2

    def forward(self, x):
        z = F.silu(self.norm(x) + x.mean((2, 3), keepdim=True))
        return self.conv(z) * self.second(z)


class OneUser(Block):
    def takes(self, z):
        return self.conv(z)


class ThreeUsers(Block):
    def takes(self, z):
        return self.conv(z) * self.second(z) + z


class AddedInPlace(Block):
    def takes(self, z):
        doubled = z * 2
        return doubled * z.add_(1)


class ActivatedInPlace(Block):
    def __init__(self):
        super().__init__()
        self.activation = nn.ELU(inplace=True)

    def takes(self, z):
        doubled = z * 2
        return doubled * self.activation(z)


class ViewChangedInPlace(Block):
    def takes(self, z):
        doubled = z * 2
        return doubled.flatten(1) * torch.flatten(z, 1).add_(1)


class ViewTakenAsWell(Block):
    def takes(self, z):
        return torch.cat([self.conv(z).flatten(1), z.flatten(1)], dim=1)


NETWORKS = [
    *(Residual, BehindAnIdentity, TwoConvolutions, SqueezeAndExcite, TakenTwiceByOne, BroadcastResidual),
    *(OneUser, ThreeUsers, AddedInPlace, ActivatedInPlace, ViewChangedInPlace, ViewTakenAsWell),
]


def trained(kind, generator):
    network = kind().eval().requires_grad_(False)
    for norm in (network.norm, network.other):
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
    return network


def pairs(matched):
    """The calls of which two results are given."""
    return [node for node in matched.network.graph.nodes if node.kwargs.get("twice")]


def value_and_gradient(outputs, penalty, x):
    """What a network gave, in one piece, and x's gradient of that and the penalty, in which elements weigh unlike."""
    together = outputs.flatten()
    weights = torch.linspace(-1, 1, together.numel(), dtype=together.dtype)
    return together, *torch.autograd.grad((together * weights).sum() + penalty.sum(), x)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_of_two_users_is_given_one_and_all_stays_as_it_was(generator, kind, dtype):
    network = trained(kind, generator).to(dtype)
    x = torch.randn(3, 4, 6, 5, generator=generator, dtype=dtype).requires_grad_()
    matched = MatchedTeacher(network)
    assert [len(call.users) for call in pairs(matched)] == [2] * (kind.given == 2)
    ours = value_and_gradient(*matched(x), x)
    exact_x = x.detach().double().requires_grad_()
    hooks = published.hooks_of(network.double(), 1.0)
    outputs = network(exact_x)
    expected = value_and_gradient(outputs, published.weighted_penalty(hooks, first_bn_multiplier=10.0), exact_x)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for got, exact in zip(ours, expected, strict=True):
        assert (got.double() - exact).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("kind", [Residual, BroadcastResidual])
def test_a_pass_for_statistics_alone_gives_those_of_every_input(generator, kind):
    network = trained(kind, generator).double()
    x = torch.randn(3, 4, 6, 5, generator=generator, dtype=torch.float64)
    inputs, matched = [], MatchedTeacher(network)
    assert len(pairs(matched)) == 1
    for norm in (network.norm, network.other):
        norm.register_forward_pre_hook(lambda norm, args: inputs.append((norm, args[0])))
    network(x)
    for (norm, given), statistics in zip(inputs, matched.statistics(x), strict=True):
        var, mean = torch.var_mean(given, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(statistics.mean[0], mean - norm.running_mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(statistics.var[0], var, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "expected"), [("resnet18", 8), ("convnet-residual", 3), ("convnet", 0)])
def test_every_junction_of_a_network_is_found(name, expected):
    assert len(pairs(MatchedTeacher(build(name, 5, (32, 32), seed=0)))) == expected
