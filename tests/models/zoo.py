"""Networks of torchvision and timm, matched and made for labelling: logits and BatchNorms against the network itself.

Not part of the tests: `make zoo` runs it, with timm installed, in some minutes.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from infer_fast.errors import InferFastWarning
from infer_fast.models import MatchedTeacher
from infer_fast.models.census import census
from infer_fast.models.fold import folded
from infer_fast.models.matching import AsItRuns

SIZE, CLASSES = 64, 7
LARGER = {"inception_v3": 96, "inception_v4": 96, "inception_resnet_v2": 96, "legacy_xception": 96}

TORCHVISION = [
    "densenet121", "densenet161", "densenet169", "densenet201", "efficientnet_b0", "efficientnet_b1",
    "efficientnet_b2", "efficientnet_b3", "efficientnet_v2_s", "googlenet", "inception_v3", "mnasnet0_5",
    "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
    "regnet_x_400mf", "regnet_x_800mf", "regnet_y_400mf", "regnet_y_800mf", "resnet18", "resnet34", "resnet50",
    "resnet101", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn", "wide_resnet50_2",
]  # fmt: skip

TIMM = [
    "botnet26t_256", "cspdarknet53", "cspresnet50", "dla34", "dla46_c", "dpn48b", "efficientformer_l1",
    "efficientnet_lite0", "efficientvit_m0", "ese_vovnet19b_slim", "fastvit_t8", "fbnetc_100", "gcresnet33ts",
    "ghostnet_050", "ghostnetv2_100", "halonet26t", "hardcorenas_a", "hgnetv2_b0", "hrnet_w18_small",
    "inception_resnet_v2", "inception_v4", "lambda_resnet26t", "lcnet_050", "legacy_seresnet18", "legacy_xception",
    "levit_128s", "mixnet_s", "mobilenetv4_conv_small", "mobileone_s0", "mobilevit_xxs", "regnetz_b16",
    "repghostnet_050", "repvgg_a0", "res2net50_26w_4s", "resnest14d", "resnet10t", "resnet26d", "resnetaa34d",
    "resnetblur18", "rexnet_100", "selecsls42", "semnasnet_075", "seresnet33ts", "skresnet18", "spnasnet_100",
    "starnet_s1", "tf_efficientnet_b0", "tf_efficientnetv2_b0", "tinynet_e", "visformer_tiny", "xception41",
]  # fmt: skip
FIXED_SIZE = {
    **dict.fromkeys(("botnet26t_256", "halonet26t", "lambda_resnet26t"), 256),
    **dict.fromkeys(("levit_128s", "visformer_tiny", "efficientformer_l1", "efficientvit_m0"), 224),
}


def network_of(library: str, name: str) -> tuple[torch.nn.Module, int]:
    """A network with statistics and affine parameters unlike those it begins with, and the side of its images."""
    torch.manual_seed(0)
    size = FIXED_SIZE.get(name, LARGER.get(name, SIZE))
    if library == "torchvision":
        import torchvision

        options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        network = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)
    else:
        timm = pytest.importorskip("timm")
        network = timm.create_model(name, num_classes=CLASSES)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase):
            module.running_mean.normal_(0, 0.05)
            module.running_var.uniform_(0.7, 1.4)
    return network.eval(), size


@pytest.mark.parametrize(("library", "name"), [("torchvision", n) for n in TORCHVISION] + [("timm", n) for n in TIMM])
def test_a_network_of_the_zoo_stays_what_it_is(library, name, record_property):
    network, size = network_of(library, name)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected = census(network, images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InferFastWarning)
        matched, labelling = MatchedTeacher(network), folded(network, (size, size))
        matched.check(images)
    matched.shared.met = []
    with torch.no_grad():
        logits, penalty = matched(images)
        labels = labelling(images.contiguous(memory_format=torch.channels_last))
    counts = {}
    for met in matched.shared.met:
        counts[met.layer] = counts.get(met.layer, 0) + 1
    record_property("as it runs", isinstance(matched.network, AsItRuns))
    assert counts == expected.counts() and penalty.item() > 0
    for found in (logits, labels):
        assert (found - expected.logits).abs().max() <= 1e-3 * expected.logits.abs().max()
