"""The training step: losses against their formulas, schedules, and learning something."""

import pytest
import torch
from torch import nn

from infer_fast.errors import InferFastError
from infer_fast.models.train import Schedule, accuracy, fit, hard_loss, predict, soft_loss


def test_soft_loss_is_kl_of_tempered_softmaxes_without_t_squared(generator):
    student, teacher = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = ((z / 7).softmax(1) for z in (teacher, student))
    expected = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(soft_loss(7.0)(student, teacher), expected)
    assert soft_loss(7.0)(teacher, teacher).abs() < 1e-12


def test_hard_loss_is_cross_entropy_with_probabilities(generator):
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    targets = torch.rand(6, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(hard_loss(logits, targets), -(targets * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fit_learns_and_follows_the_cosine_per_epoch(generator, optimizer):
    x = torch.randn(64, 4, 1, 1, generator=generator)
    y = (x[:, 0, 0, 0] > 0).long()
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    rates = []

    def stream():
        for _ in range(40):
            yield x, nn.functional.one_hot(y, 2).float()

    real = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD

    class Recording(real):
        def step(self, *a, **k):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*a, **k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, real.__name__, Recording)
        fit(network, stream(), hard_loss, Schedule(optimizer, 0.1, 0.0, 0.9, 40, 10))
    assert not network.training
    assert accuracy(network(x), y) > 90
    expected = [0.1 * (1 + torch.cos(torch.tensor(torch.pi * e / 4)).item()) / 2 for e in range(4) for _ in range(10)]
    assert rates == pytest.approx(expected)


def test_divergence_is_an_error():
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    stream = [(torch.full((1, 2, 1, 1), float("nan")), torch.ones(1, 2))]
    with pytest.raises(InferFastError, match="diverged"):
        fit(network, stream, hard_loss, Schedule("sgd", 0.1, 0.0, 0.0, 1, 1))


def test_predict_covers_every_position_once():
    network = nn.Identity()
    logits = predict(network, lambda p: p.float().view(-1, 1, 1, 1), 11, batch_size=4)
    assert logits.flatten().tolist() == list(range(11))
