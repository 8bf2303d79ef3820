"""The launch between bn_match's passes: partial sums to statistics, norms and penalty, against float64."""

import pytest
import torch

from tests.ops.test_bn_match import draw, relative_error


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=[pytest.mark.interpreter, pytest.mark.slow]),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 70), (3, 150, 9), (1, 2, 1200), (2, 140, 70), (1, 1500, 5)])
def test_partial_sums_add_up_to_statistics_norms_and_penalty(generator, device, shape):
    from infer_fast.kernels import bn_match_statistics as kernels

    lanes, parts, channels = shape
    count, r_var = 1000.0 * parts, 2.5
    sums = draw(generator, lanes, parts, channels) * 1000
    squares = draw(generator, lanes, parts, channels).abs() * 1000 + 1000
    running_var = draw(generator, channels).abs()
    sizes = (lanes, channels), (lanes, channels), (lanes, 2), (lanes,)
    mean, var, norms, _ = outputs = tuple(torch.empty(size, device=device) for size in sizes)
    arrived = torch.zeros(lanes, dtype=torch.int32, device=device)
    partial = torch.stack([sums, squares], 1).float().to(device)
    kernels.add_up(partial, arrived, running_var.float().to(device), outputs, count, r_var)
    exact_mean = sums.sum(1) / count
    exact_var = (squares.sum(1) / count - exact_mean**2).clamp(min=0)
    exact_norms = torch.stack([exact_mean.norm(dim=1), (exact_var - running_var).norm(dim=1)], 1)
    expected = exact_mean, exact_var, exact_norms, r_var * exact_norms[:, 1] + exact_norms[:, 0]
    for got, exact in zip(outputs, expected, strict=True):
        assert relative_error(got.cpu(), exact) < 1e-5
    again = torch.empty_like(norms)
    kernels.fill_norms(mean, var, running_var.float().to(device), again)
    assert relative_error(again.cpu(), exact_norms) < 1e-5
