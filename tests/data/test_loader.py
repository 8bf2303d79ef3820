"""Batches: every instance once per epoch, targets mixed as the images are."""

import pytest
import torch

from infer_fast.data.images import Split
from infer_fast.data.loader import Augmentation, batches, beta, resident_distilled, resident_split

from .test_distilled import MEAN, STD, make


def resident(generator, count=10, size=4, logits=None):
    """Image i is filled with level 20*i, so that a batch tells what is in it."""
    images = (torch.arange(count) * 20).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()
    return resident_split(Split(images, torch.arange(count) % 3), 3, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), logits)


def levels(images):
    return (images[:, 0, 0, 0] * 255 / 20).round().int().tolist()


def test_each_epoch_holds_every_instance_once_and_updates_are_counted(generator):
    stream = list(
        batches(resident(generator), batch_size=4, updates=7, augmentation=Augmentation(), generator=generator)
    )
    assert [len(images) for images, _ in stream] == [4, 4, 2, 4, 4, 2, 4]
    first, second = ([level for images, _ in part for level in levels(images)] for part in (stream[:3], stream[3:6]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_hard_targets_follow_their_images(generator):
    for images, targets in batches(
        resident(generator), batch_size=4, updates=3, augmentation=Augmentation(), generator=generator
    ):
        assert targets.argmax(1).tolist() == [level % 3 for level in levels(images)]


def test_mixup_mixes_inputs_and_logits_with_the_same_weight(generator):
    """Each logit is a linear function of its image's level, so it stays one after any mixing."""
    logits = torch.arange(10).float().view(-1, 1).repeat(1, 3) * 7
    for images, targets in batches(
        resident(generator, logits=logits),
        batch_size=5,
        updates=4,
        augmentation=Augmentation(mix_alpha=0.8),
        generator=generator,
    ):
        torch.testing.assert_close(targets[:, 0], images[:, 0, 0, 0] * 255 / 20 * 7, atol=1e-3, rtol=1e-4)


def test_the_same_generator_gives_the_same_batches(generator):
    runs = [
        torch.cat(
            [
                images
                for images, _ in batches(
                    resident_distilled(make(torch.Generator().manual_seed(5)), soft=True),
                    batch_size=8,
                    updates=5,
                    augmentation=Augmentation(2, True, 0.8),
                    generator=torch.Generator().manual_seed(seed),
                )
            ]
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_distilled_set_gives_its_instances(generator):
    distilled = make(generator)
    for soft in (True, False):
        own = resident_distilled(distilled, soft=soft)
        assert len(own) == len(distilled) and own.soft == soft
        images, targets = next(
            batches(own, batch_size=1000, updates=1, augmentation=Augmentation(), generator=generator)
        )
        expected = distilled.instances(torch.arange(len(distilled)))
        assert torch.allclose(images.sum((1, 2, 3)).sort()[0], expected.sum((1, 2, 3)).sort()[0], atol=1e-3)
        assert targets.shape == (len(distilled), 3)
    assert own.mean == MEAN and own.std == STD


def test_beta_has_the_moments_of_beta(generator):
    draws = torch.cat([beta(0.8, generator) for _ in range(4000)])
    assert draws.mean().item() == pytest.approx(0.5, abs=0.03)
    assert draws.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.02)
