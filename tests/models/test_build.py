"""Networks by name."""

import pytest
import torch

from infer_fast.errors import InferFastError
from infer_fast.extras import PIP, installed
from infer_fast.models import build
from infer_fast.models.convnet import HalvingPool

PARAMETERS = {  # public counts of the CIFAR forms with 10 classes
    "resnet18": 11_173_962,
    "mobilenetv2": 2_296_922,
    "efficientnet_b0": 3_599_686,
    "shufflenet_g2": 887_582,
    "vgg16": 14_728_266,
    "convnet128": 320_010,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_the_published_teachers_have_the_published_sizes(name, count):
    network = build(name, 10, (32, 32))
    assert sum(p.numel() for p in network.parameters()) == count
    assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("depth", [3, 4])
@pytest.mark.parametrize("norm", ["", "-batchnorm", "-groupnorm", "-none"])
def test_convnet_128_has_a_choice_of_depth_and_norm(depth, norm):
    network = build(f"convnet128{'-d4' if depth == 4 else ''}{norm}", 10, (32, 32))
    names = [type(module).__name__ for module in network.features]
    assert names.count("Conv2d") == names.count("HalvingPool") == depth
    assert (
        names[1] == {"": "GroupNorm", "-batchnorm": "BatchNorm2d", "-groupnorm": "GroupNorm", "-none": "Identity"}[norm]
    )
    assert network.classifier.in_features == 128 * (32 >> depth) ** 2
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 1, 2, 2), (3, 2, 7, 4), (2, 2, 5, 5), (0, 3, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_halving_pool_is_average_pooling(generator, shape, dtype):
    x = torch.randn(shape, generator=generator).to(dtype)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        ours, theirs = given.clone().requires_grad_(True), given.clone().requires_grad_(True)
        pooled, expected = HalvingPool()(ours), torch.nn.functional.avg_pool2d(theirs, 2)
        torch.testing.assert_close(pooled, expected, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=1e-2)
        weights = torch.randn(expected.shape, generator=generator).to(dtype)
        (pooled * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_timm_networks_are_built_by_name():
    pytest.importorskip("timm")
    assert build("resnet10t", 7, (64, 64)).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("name", ["convnet", "convnet-residual", "convnet-separable", "convnet-silu"])
@pytest.mark.parametrize("size", [(8, 8), (32, 32)])
def test_convnets_take_small_images(name, size):
    assert build(name, 7, size).eval()(torch.zeros(2, 3, *size)).shape == (2, 7)


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    first, second = (build("convnet", 4, (8, 8), seed=3).state_dict() for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = build("convnet", 4, (8, 8), seed=4).state_dict()
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_large_images_get_the_original_stem():
    assert build("resnet18", 4, (224, 224)).conv1.kernel_size == (7, 7)
    assert build("resnet18", 4, (64, 64)).conv1.kernel_size == (3, 3)
    assert build("mobilenetv2", 4, (224, 224)).features[0][0].stride == (2, 2)
    with pytest.raises(InferFastError, match="shufflenet_g2 is a network for images of up to 64x64"):
        build("shufflenet_g2", 4, (224, 224))


def test_unknown_names_and_small_images_are_errors():
    with pytest.raises(InferFastError, match="resnet19"):
        build("resnet19", 4, (32, 32))
    if not installed("timm"):
        with pytest.raises(InferFastError, match=f"one of convnet, .*torchvision.*timm one, after {PIP['timm']}"):
            build("resnet10t", 4, (32, 32))
    with pytest.raises(InferFastError, match="too small"):
        build("convnet", 4, (4, 4))
