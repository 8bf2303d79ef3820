"""Base images that stand for their class: medoids of its clusters."""

import pytest
import torch

from infer_fast.errors import InferFastError
from infer_fast.models import build
from infer_fast.models.teacher import Teacher
from infer_fast.synthesis.choice import chooser, features_of, medoids


def teachers():
    return [Teacher(n, build(n, 4, (8, 8), seed=0).eval(), 25.0, None, "") for n in ("convnet", "convnet-silu")]


def test_medoids_are_closer_to_their_class_than_random_images_are(generator):
    points = torch.randn(400, 6, generator=generator)

    def covered(positions):
        return torch.cdist(points, points[positions]).amin(dim=1).square().mean()

    chosen = covered(medoids(points, 40, generator))
    random = [covered(torch.randperm(400, generator=generator)[:40]) for _ in range(5)]
    assert chosen < min(random)


def test_as_many_medoids_as_points_are_all_of_them(generator):
    same = torch.ones(9, 3)
    assert medoids(same, 9, generator).sort().values.tolist() == list(range(9))


@pytest.mark.parametrize("how", ["random", "medoids"])
def test_images_of_every_class_are_chosen_once_and_the_same_again(tiny_dataset, how):
    choose, again = (chooser(tiny_dataset, how, teachers(), torch.Generator().manual_seed(3)) for _ in range(2))
    positions = choose(5)
    assert positions.shape == (4, 5) and len(positions.unique()) == 20
    assert torch.equal(tiny_dataset.train.labels[positions], torch.arange(4)[:, None].expand(4, 5))
    assert torch.equal(again(5), positions) and torch.equal(choose(5), positions)
    other = chooser(tiny_dataset, how, teachers(), torch.Generator().manual_seed(4))(5)
    assert not torch.equal(other, positions)
    with pytest.raises(InferFastError, match="fewer than"):
        choose(10_000)


def test_features_are_what_the_last_layer_is_given(tiny_dataset):
    features = features_of(tiny_dataset, teachers())
    assert features.shape[0] == len(tiny_dataset.train) and features.isfinite().all()
    first, second = (features_of(tiny_dataset, [t]) for t in teachers())
    assert torch.equal(features, torch.cat([first, second], dim=1))
    for own in (first, second):
        torch.testing.assert_close(own.std(), torch.tensor(1.0))
