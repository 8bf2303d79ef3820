"""Global average pooling: torch's own, to the byte, with a gradient that copies nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from infer_fast.models import MatchedTeacher
from infer_fast.models.average import GlobalAveragePool, global_average


@pytest.mark.parametrize("shape", [(3, 8, 4, 4), (2, 5, 7, 3), (4, 6, 1, 1), (1, 1, 3, 3), (5, 4, 6)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_gradients_and_layout_are_torchs_to_the_byte(generator, shape, layout, dtype):
    x = torch.randn(shape, generator=generator).to(dtype)
    x = (x.contiguous(memory_format=layout) if x.dim() == 4 else x).requires_grad_()
    ours, expected = global_average(x), F.adaptive_avg_pool2d(x, 1)
    upstream = torch.randn(ours.shape, generator=generator).to(dtype)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (ours, expected)]
    assert torch.equal(ours, expected) and torch.equal(*gradients)
    assert ours.stride() == expected.stride()


class Pooled(nn.Module):
    """A convolution, its norm, and a pool."""

    def __init__(self, pool):
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), pool

    def forward(self, x):
        return self.pool(self.norm(self.conv(x)))


POOLS = {
    "module": nn.AdaptiveAvgPool2d(1),
    "pair": nn.AdaptiveAvgPool2d((1, 1)),
    "function": lambda x: F.adaptive_avg_pool2d(x, 1),
    "named": lambda x: F.adaptive_avg_pool2d(x, output_size=(1, 1)),
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_matched_teacher_has_it_in_the_place_of_torchs(generator, pool):
    teacher, x = MatchedTeacher(Pooled(POOLS[pool])), torch.randn(2, 3, 6, 6, generator=generator)
    graph, ours = teacher.network.graph, [m for m in teacher.modules() if isinstance(m, GlobalAveragePool)]
    assert ours or any(node.target is global_average for node in graph.nodes)
    assert teacher(x)[0].shape == (2, 4, 1, 1)


def test_a_pool_to_more_pixels_stays(generator):
    teacher = MatchedTeacher(Pooled(nn.AdaptiveAvgPool2d((2, 1))))
    assert teacher(torch.randn(2, 3, 6, 6, generator=generator))[0].shape == (2, 4, 2, 1)
