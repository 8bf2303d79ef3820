"""Random resized crops: torchvision's distribution, and torchvision's pixels."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, resized_crop

from infer_fast.data import crops
from infer_fast.data.crops import crop_boxes, draw_crops


def test_crops_follow_torchvisions_distribution(generator):
    ours = draw_crops(3000, (80, 64), generator).float()
    image = torch.zeros(3, 80, 64)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)]
    ).float()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=1.5, rtol=0.05)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=1.0, rtol=0.08)
    assert ((ours[:, 0] + ours[:, 2] <= 80) & (ours[:, 1] + ours[:, 3] <= 64) & (ours >= 0).all(1)).all()


@pytest.mark.parametrize("size", [(64, 64), (8, 8), (30, 17)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_image_gets_its_own_crop_and_flip(generator, size, layout):
    images = torch.rand(6, 3, *size, generator=generator).contiguous(memory_format=layout)
    boxes = torch.cat([draw_crops(5, size, generator), torch.tensor([[0, 0, *size]])])
    flip = torch.tensor([True, False] * 3)
    ours = crops.resized_crop(images, boxes, flip)
    for i in range(6):
        expected = resized_crop(images[i], *boxes[i].tolist(), size, InterpolationMode.BILINEAR, antialias=True)
        assert (ours[i] - (hflip(expected) if flip[i] else expected)).abs().max() < 1e-3
    assert torch.equal(crops.resized_crop(images, boxes)[1], ours[1])


def test_where_no_box_fits_the_largest_in_the_middle_is_taken():
    numbers = torch.full((2, crops.ATTEMPTS, 4), 0.999)  # the whole area at ratio 4/3: too wide for a tall image
    assert crop_boxes((90, 30), numbers).tolist() == [[25, 0, 40, 30]] * 2
    assert crop_boxes((30, 90), torch.zeros(1, crops.ATTEMPTS, 4))[0, 2:].tolist() == [17, 13]
