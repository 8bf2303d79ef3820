"""BatchNorm surgery: same logits, the right penalties, clear errors."""

import pytest
import torch
from torch import nn

from infer_fast.errors import InferFastError
from infer_fast.models import MatchedTeacher, build

NAMES = [
    "convnet", "convnet-residual", "convnet-separable", "convnet-silu", "resnet18", "mobilenetv2", "efficientnet_b0",
    "shufflenet_g2", "mobilenet_v2", "densenet121",
]  # fmt: skip


def trained_looking(name, generator, size=(32, 32)):
    """A network whose running statistics are not the initial 0 and 1."""
    network = build(name, 5, size, seed=1).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network


def penalty_with_hooks(network, x, first_bn_multiplier=10.0, r_var=1.0, skip=()):
    """The same sum the way the published scripts take it: a hook on every BatchNorm2d."""
    total = []

    def hook(position):
        def add(module, inputs, _):
            x = inputs[0]
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            weight = first_bn_multiplier if position == 0 else 1.0
            if position not in skip:
                total.append(weight * (r_var * (var - module.running_var).norm() + (mean - module.running_mean).norm()))

        return add

    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(norms)]
    logits = network(x)
    for handle in handles:
        handle.remove()
    return logits, sum(total)


@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_and_penalties_equal_hooks(generator, name):
    network = trained_looking(name, generator).double()
    x = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    logits, penalty = MatchedTeacher(network, r_var=3.0)(x)
    expected_logits, expected = penalty_with_hooks(network, x, r_var=3.0)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(penalty[0], expected, rtol=1e-9, atol=1e-9)


def test_skipped_layers_are_left_out(generator):
    network = trained_looking("convnet", generator).double()
    x = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    _, penalty = MatchedTeacher(network, skip_bn=(1,))(x)
    _, expected = penalty_with_hooks(network, x, skip=(1,))
    torch.testing.assert_close(penalty[0], expected, rtol=1e-9, atol=1e-9)


def test_the_teacher_itself_is_not_touched(generator):
    network = trained_looking("convnet", generator).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    MatchedTeacher(network)(torch.randn(4, 3, 32, 32, generator=generator))
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert any(isinstance(m, nn.BatchNorm2d) for m in network.modules())


def test_timm_networks_with_batch_norm_act(generator):
    timm = pytest.importorskip("timm")
    network = timm.create_model("efficientnet_b0", num_classes=5).eval().double()
    x = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)
    logits, penalty = MatchedTeacher(network)(x)
    torch.testing.assert_close(logits, network(x), rtol=1e-9, atol=1e-9)
    assert penalty.item() > 0


def test_a_network_without_batch_norm_is_an_error():
    with pytest.raises(InferFastError, match="has no BatchNorm2d"):
        MatchedTeacher(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(InferFastError, match="no running statistics"):
        MatchedTeacher(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))
    with pytest.raises(InferFastError, match="layer 5"):
        MatchedTeacher(nn.Sequential(nn.BatchNorm2d(3)), skip_bn=(5,))


def test_a_bare_batch_norm_is_matched_too():
    logits, penalty = MatchedTeacher(nn.BatchNorm2d(3))(torch.zeros(2, 3, 4, 4))
    assert logits.shape == (2, 3, 4, 4) and penalty.item() == pytest.approx(10 * 3**0.5)
