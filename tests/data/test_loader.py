"""Batches: every instance once per epoch, targets mixed as the images are."""

import pytest
import torch

from infer_fast.data.augment import Augmentation, Sampling
from infer_fast.data.images import Split
from infer_fast.data.loader import feed
from infer_fast.data.pixels import AS_STORED
from infer_fast.data.sets import resident_distilled, resident_split
from infer_fast.errors import InferFastError

from .test_distilled import PIXELS, make


def resident(generator, count=10, size=4, logits=None):
    """Image i is filled with level 20*i, so that a batch tells what is in it."""
    images = (torch.arange(count) * 20).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()
    return resident_split(Split(images, torch.arange(count) % 3), 3, AS_STORED, logits)


def made(resident, loader="fused", **options):
    """The batches (images, targets) of a loader."""
    stream, make = feed(loader, resident, Sampling(**{"augmentation": Augmentation(), **options}))
    return [make(*batch) for batch in stream]


def levels(images):
    return (images[:, 0, 0, 0] * 255 / 20).round().int().tolist()


def test_each_epoch_holds_every_instance_once_and_updates_are_counted(generator):
    stream = made(resident(generator), batch_size=4, updates=7, generator=generator)
    assert [len(images) for images, _ in stream] == [4, 4, 2, 4, 4, 2, 4]
    first, second = ([level for images, _ in part for level in levels(images)] for part in (stream[:3], stream[3:6]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_hard_targets_follow_their_images(generator):
    for images, targets in made(resident(generator), batch_size=4, updates=3, generator=generator):
        assert targets.argmax(1).tolist() == [level % 3 for level in levels(images)]


def test_mixup_mixes_inputs_and_logits_with_the_same_weight(generator):
    """Each logit is a linear function of its image's level, so it stays one after any mixing."""
    logits = torch.arange(10).float().view(-1, 1).repeat(1, 3) * 7
    mixup = Augmentation(mix="mixup")
    for images, targets in made(
        resident(generator, logits=logits), batch_size=5, updates=4, augmentation=mixup, generator=generator
    ):
        torch.testing.assert_close(targets[:, 0], images[:, 0, 0, 0] * 255 / 20 * 7, atol=1e-3, rtol=1e-4)


def test_the_same_generator_gives_the_same_batches(generator):
    runs = [
        torch.cat(
            [
                images
                for images, _ in made(
                    resident_distilled(make(torch.Generator().manual_seed(5)), soft=True),
                    batch_size=8,
                    updates=5,
                    augmentation=Augmentation(2, True, "mixup"),
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
        ((images, targets),) = made(own, batch_size=1000, updates=1, generator=generator)
        expected = distilled.instances(torch.arange(len(distilled)))
        assert torch.allclose(images.sum((1, 2, 3)).sort()[0], expected.sum((1, 2, 3)).sort()[0], atol=1e-3)
        assert targets.shape == (len(distilled), 3)
    assert own.pixels == PIXELS


def is_rectangle(mask):
    rows, columns = mask.any(1), mask.any(0)
    gaps = (rows.int().diff().abs().sum() + columns.int().diff().abs().sum()).item()
    return mask.sum() == rows.sum() * columns.sum() and gaps <= 4


def test_cutmix_pastes_a_box_of_the_partner_and_mixes_targets_by_its_area(generator):
    """Each image is one level all over, so a pasted box shows, and its share is the targets' weight."""
    logits = torch.arange(10).float().view(-1, 1).repeat(1, 3)
    cutmix = Augmentation(mix="cutmix", mix_alpha=1.0)
    pasted = 0
    for images, targets in made(
        resident(generator, size=8, logits=logits), batch_size=5, updates=8, augmentation=cutmix, generator=generator
    ):
        for image, target in zip(images, targets, strict=True):
            found = (image[0] * 255 / 20).round()
            torch.testing.assert_close(target[0], found.mean())  # the level is the logit: the mean is the mixture
            pasted += len(found.unique()) == 2
            assert any(is_rectangle(found == level) for level in found.unique())
    assert pasted > 5


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix"])
def test_torch_and_fused_make_the_same_batches(mix):
    own = resident_distilled(make(torch.Generator().manual_seed(5)), soft=True)
    both = [
        made(own, loader, batch_size=8, updates=5, augmentation=Augmentation(2, True, mix), generator=generator)
        for loader, generator in (
            ("torch", torch.Generator().manual_seed(1)),
            ("fused", torch.Generator().manual_seed(1)),
        )
    ]
    for plain, fused in zip(*both, strict=True):
        torch.testing.assert_close(plain, fused, atol=1e-5, rtol=1e-5)


def test_an_unknown_loader_or_mix_is_an_error(generator):
    with pytest.raises(InferFastError, match="not a loader"):
        made(resident(generator), "magic", batch_size=2, updates=1, generator=generator)
    with pytest.raises(InferFastError, match="not a way of mixing"):
        Augmentation(mix="blend")
