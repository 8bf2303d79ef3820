"""Networks by name: our ConvNets, the CIFAR forms of the published networks, whatever torchvision or timm offers."""

from __future__ import annotations

import torch
from torch import nn

from infer_fast.errors import InferFastError
from infer_fast.extras import PIP, installed
from infer_fast.models import cifar
from infer_fast.models.convnet import CONVNET_128, SHAPES, ConvNet, ConvNet128

ALIASES = {"mobilenetV2": "mobilenetv2", "efficientnet": "efficientnet_b0", "shufflenet": "shufflenet_g2"}  # INFER's
LARGE_FORMS = {"mobilenetv2": "mobilenet_v2"}  # what torchvision calls the original of a CIFAR form
SMALL_IMAGE = 64  # up to this size networks take their CIFAR form (ResNets: 3x3 stride-1 stem, no max-pool)


def build(name: str, classes: int, size: tuple[int, int], *, seed: int | None = None) -> nn.Module:
    """A freshly initialised network `name` for `classes` classes and images of `size` (H, W).

    seed: the same seed gives the same weights and leaves torch's global generator as it was.
    Raises InferFastError for a name nobody knows, or images too small for it.
    """
    if seed is None:
        return _build(name, classes, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(name, classes, size)


def _build(name: str, classes: int, size: tuple[int, int]) -> nn.Module:
    name = ALIASES.get(name, name)
    if name in SHAPES:
        _check_halvings(name, SHAPES[name].depth, size)
        return ConvNet(SHAPES[name], classes)
    if name in CONVNET_128:
        _check_halvings(name, CONVNET_128[name][0], size)
        return ConvNet128(classes, size, *CONVNET_128[name])
    if name in cifar.NETWORKS and max(size) <= SMALL_IMAGE:
        return cifar.NETWORKS[name](classes)
    if name == "shufflenet_g2":
        raise InferFastError(f"shufflenet_g2 is a network for images of up to {SMALL_IMAGE}x{SMALL_IMAGE} pixels.")
    return _torchvision(LARGE_FORMS.get(name, name), classes, size)


def _check_halvings(name: str, depth: int, size: tuple[int, int]) -> None:
    if min(size) < 2**depth:
        raise InferFastError(f"{name} halves its image {depth} times: {size[0]}x{size[1]} is too small.")


def _torchvision(name: str, classes: int, size: tuple[int, int]) -> nn.Module:
    import torchvision

    try:
        network = torchvision.models.get_model(name, weights=None, num_classes=classes)
    except ValueError:
        return _timm(name, classes)
    if isinstance(network, torchvision.models.ResNet) and max(size) <= SMALL_IMAGE:
        network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


def _timm(name: str, classes: int) -> nn.Module:
    """timm's network of that name, if timm is installed and knows it."""
    known = ", ".join([*SHAPES, *CONVNET_128, *cifar.NETWORKS])
    if not installed("timm"):
        raise InferFastError(
            f"{name!r} is not a network: choose one of {known}, or a torchvision model name (or a timm one, after "
            f"{PIP['timm']})."
        )
    import timm

    if not timm.is_model(name):
        raise InferFastError(f"{name!r} is not a network: choose one of {known}, or a torchvision or timm model name.")
    return timm.create_model(name, pretrained=False, num_classes=classes)
