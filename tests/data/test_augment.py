"""The draws of augmentation have the distributions they should."""

import pytest
import torch

from infer_fast.data.augment import beta, cutmix_box, inside


def test_beta_has_the_moments_of_beta(generator):
    draws = torch.cat([beta(0.8, generator) for _ in range(4000)])
    assert draws.mean().item() == pytest.approx(0.5, abs=0.03)
    assert draws.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.02)


def test_cutmix_boxes_have_the_weights_area(generator):
    for share in (0.0, 0.3, 0.9, 1.0):
        box, weight = cutmix_box(torch.tensor([share]), (16, 12), generator)
        covered = inside(box, (16, 12)).float().mean()
        assert weight.item() == pytest.approx(1 - covered.item(), abs=1e-6)
        assert covered <= 1 - share + 1e-6
