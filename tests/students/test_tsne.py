"""Features and their picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from infer_fast.data.class_folders import Reading, read_test_folders
from infer_fast.data.images import FileSplit, image_dataset
from infer_fast.errors import InferFastError
from infer_fast.models import build
from infer_fast.models.train import features
from infer_fast.students.tsne import draw


def test_features_are_the_last_linear_layers_input(generator):
    network = build("convnet", 4, (8, 8), seed=0).eval()
    images = torch.randn(5, 3, 8, 8, generator=generator)
    seen = features(network, lambda p: images[p], len(images))
    torch.testing.assert_close(network.classifier(seen), network(images), atol=1e-4, rtol=1e-4)
    with pytest.raises(InferFastError, match="no linear layer"):
        features(nn.Identity(), lambda p: images[p], len(images))


def test_the_picture_has_a_panel_for_each_network(tiny_dataset, tmp_path):
    networks = {str(seed): build("convnet", 4, (8, 8), seed=seed).eval() for seed in (0, 1)}
    one, two = (draw(dict(list(networks.items())[:n]), tiny_dataset, tmp_path / f"{n}.png") for n in (1, 2))
    with Image.open(one) as single, Image.open(two) as double:
        assert double.width == pytest.approx(2 * single.width, rel=0.02) and double.height == single.height
        assert len(double.convert("RGB").getcolors(2**24)) > 20  # points are on it


def test_a_set_on_the_disk_is_drawn_like_one_in_memory(tmp_path):
    for c in range(4):
        for which, count in (("train", 3), ("test", 6)):
            (tmp_path / which / f"{c}").mkdir(parents=True)
            for i in range(count):
                pixels = np.full((8, 8, 3), 60 * c + i, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / which / f"{c}" / f"{i}.png")
    parts = [read_test_folders(tmp_path / which, None, Reading(8, on_disk=True)) for which in ("train", "test")]
    dataset = image_dataset("d", parts[0][0], parts[1][0], parts[0][1])
    assert isinstance(dataset.test, FileSplit)
    draw({"one": build("convnet", 4, (8, 8), seed=0).eval()}, dataset, tmp_path / "t.png")
    with Image.open(tmp_path / "t.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 20
