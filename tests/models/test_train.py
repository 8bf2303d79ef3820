"""The training step: losses against their formulas, schedules, and learning something."""

import pytest
import torch
from torch import nn

from infer_fast.data.augment import Augmentation, Sampling
from infer_fast.data.images import Split
from infer_fast.data.loader import feed
from infer_fast.data.pixels import Pixels
from infer_fast.data.sets import resident_split
from infer_fast.errors import InferFastError
from infer_fast.models import build
from infer_fast.models.execution import Execution
from infer_fast.models.teacher import Teacher
from infer_fast.models.train import Schedule, Training, accuracy, fit, hard_loss, predict, soft_loss, takes_one
from infer_fast.students.labels import dynamic_labels


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
        fit(network, Training(stream(), hard_loss), Schedule(optimizer, 0.1, 0.0, 0.9, 40, 10))
    assert not network.training
    assert accuracy(network(x), y) > 90
    expected = [0.1 * (1 + torch.cos(torch.tensor(torch.pi * e / 4)).item()) / 2 for e in range(4) for _ in range(10)]
    assert rates == pytest.approx(expected)


def test_the_rate_warms_up_linearly_before_the_cosine():
    schedule = Schedule("sgd", 0.2, 0.0, 0.9, updates=100, updates_per_epoch=10, warm_up=4)
    rates = [schedule.rate(epoch) for epoch in range(10)]
    assert rates[0] == pytest.approx(0.002) and rates[4] == pytest.approx(0.2)
    assert torch.tensor(rates[:5]).diff().diff().abs().max() < 1e-6  # a straight line
    assert rates[7] == pytest.approx(0.1) and rates[4:] == sorted(rates[4:], reverse=True)


def test_other_schedules_fall_as_torchs_do():
    """steplr and exponentiallr against torch's own schedulers, after a constant warm-up."""
    parameter = nn.Parameter(torch.zeros(1))
    for kind, cls, options in (
        ("step", torch.optim.lr_scheduler.StepLR, {"step_size": 3, "gamma": 0.5}),
        ("exponential", torch.optim.lr_scheduler.ExponentialLR, {"gamma": 0.9}),
    ):
        optimizer = torch.optim.SGD([parameter], lr=0.2)
        theirs = cls(optimizer, **options)
        expected = [0.002, 0.002]
        for _ in range(8):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            theirs.step()
        schedule = Schedule(
            "sgd",
            0.2,
            0.0,
            0.9,
            updates=10,
            updates_per_epoch=1,
            warm_up=2,
            warm_up_kind="constant",
            kind=kind,
            **options,
        )
        assert [schedule.rate(epoch) for epoch in range(10)] == pytest.approx(expected)


def test_labels_are_made_of_the_batch_the_student_sees(generator):
    """make() doubles the images; the labels it gives are wrong and must not be used."""
    x = torch.randn(32, 4, 1, 1, generator=generator)
    seen = []

    def label(images):
        seen.append(images)
        return torch.nn.functional.one_hot((images[:, 0, 0, 0] > 0).long(), 2).float()

    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    stream = [(x, torch.zeros(32, 2))] * 60
    schedule = Schedule("adamw", 0.1, 0.0, 0.9, 60, 60)
    fit(network, Training(stream, hard_loss, lambda images, targets: (2 * images, targets), label), schedule)
    assert len(seen) == 60 and torch.equal(seen[0], 2 * x)
    assert accuracy(network(x), (x[:, 0, 0, 0] > 0).long()) > 90


def test_top_k_accuracy_counts_the_k_largest():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0, -1]] * 7)
    labels = torch.arange(7)
    assert accuracy(logits, labels) == pytest.approx(100 / 7)
    assert accuracy(logits, labels, top=5) == pytest.approx(500 / 7)
    assert accuracy(logits[:3, :3], labels[:3], top=5) == 100


@pytest.mark.gpu
@pytest.mark.parametrize("loader", ["fused", "torch"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_captured_step_trains_as_an_eager_one(generator, optimizer, dynamic, loader):
    """Epochs of 3 full batches and a short one, so two graphs; and nothing waits for the device once captured."""
    device = torch.device("cuda")
    images = torch.randint(0, 256, (28, 3, 16, 16), generator=generator).to(torch.uint8)
    own = resident_split(Split(images, torch.arange(28) % 4), 4, Pixels((0.5,) * 3, (0.25,) * 3)).to(device)
    teacher = Teacher("convnet", build("convnet", 4, (16, 16), seed=1).eval().to(device), 0.0, None, "")
    label = dynamic_labels([teacher], "float32", (16, 16)) if dynamic else None
    trained = []
    for engine in ("eager", "graph"):
        network = build("convnet-silu", 4, (16, 16), seed=0).to(device)
        sampling = Sampling(8, 40, Augmentation(2, True, "cutmix"), torch.Generator().manual_seed(0))
        stream, make = feed(loader, own, sampling)
        schedule = Schedule(optimizer, 1e-3, 0.01, 0.9, 40, 4)
        loss = soft_loss(4.0) if dynamic else hard_loss
        fit(network, Training(stream, loss, make, label), schedule, Execution("float32", engine))
        trained.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert (trained[0] - trained[1]).norm() / trained[0].norm() < 1e-3


def test_divergence_is_an_error():
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    stream = [(torch.full((1, 2, 1, 1), float("nan")), torch.ones(1, 2))]
    with pytest.raises(InferFastError, match="diverged"):
        fit(network, Training(stream, hard_loss), Schedule("sgd", 0.1, 0.0, 0.0, 1, 1))


@pytest.mark.parametrize(
    ("images", "targets", "lr", "words"),
    [
        (float("nan"), 1.0, 0.1, "its images hold NaN or infinity"),
        (1.0, float("inf"), 0.1, "its labels hold NaN or infinity, so look at the teachers"),
        (1.0, 1.0, 1e38, r"lower its learning rate \(now 1e\+38\) or its weight decay \(now 1e\+10\)"),
    ],
)
def test_the_cause_of_a_divergence_is_named(images, targets, lr, words):
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    stream = [(torch.full((2, 2, 1, 1), images), torch.full((2, 2), targets))] * 4
    with pytest.raises(InferFastError, match=f"diverged .1.weight holds .*{words}"):
        fit(network, Training(stream, hard_loss), Schedule("sgd", lr, 1e10, 0.0, 4, 4))


def test_statistics_that_are_no_numbers_are_a_divergence_too():
    """The weights may stay as they are."""
    network = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(3, 2))
    stream = [(torch.full((2, 3, 1, 1), 3e38), torch.zeros(2, 2))] * 2
    with pytest.raises(InferFastError, match="diverged .0.running_(mean|var) holds"):
        fit(network, Training(stream, lambda logits, _: 0.0 * logits.nan_to_num().sum()),
            Schedule("sgd", 0.1, 0.0, 0.0, 2, 2))  # fmt: skip


def parameters(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize("name", ["resnet18", "convnet"])
def test_a_batch_of_one_is_left_out_where_batchnorm_can_not_take_it(generator, name):
    """Epochs of 5 and 1: as if there were no last batch, or with it where the network has pixels left."""
    images, targets = torch.randn(6, 3, 8, 8, generator=generator), torch.randn(6, 4, generator=generator)
    batches = [(images[:5], targets[:5]), (images[5:], targets[5:])]
    seen, trained = [], []
    for stream, per_epoch in ((batches * 2, 2), (batches[:1] * 2, 1)):
        network = build(name, 4, (8, 8), seed=0)
        schedule = Schedule("sgd", 0.01, 0.0, 0.9, len(stream), per_epoch)
        fit(network, Training(stream, soft_loss(4.0)), schedule, Execution("float32", "eager"), seen.append)
        trained.append(parameters(network))
    assert seen == [1, 2, 3, 4, 1, 2]
    assert torch.equal(*trained) == (name == "resnet18")


def test_batches_of_one_alone_can_not_be_trained_on(generator):
    images, targets = torch.randn(1, 3, 8, 8, generator=generator), torch.randn(1, 4, generator=generator)
    network = build("resnet18", 4, (8, 8), seed=0)
    before = parameters(network)
    with pytest.raises(InferFastError, match="here a batch is one image: raise the batch size to 2"):
        fit(network, Training([(images, targets)] * 3, hard_loss), Schedule("sgd", 0.1, 0.0, 0.0, 3, 3))
    assert torch.equal(parameters(network), before)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2", "convnet", "convnet128", "vgg16"])
@pytest.mark.parametrize("size", [8, 32])
def test_whether_one_image_can_be_trained_on_is_known_without_trying(generator, name, size):
    network, images = build(name, 4, (size, size), seed=0), torch.randn(1, 3, size, size, generator=generator)
    state, random = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    known = takes_one(network, images.expand(5, -1, -1, -1))
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    try:
        network.train()(images)
    except ValueError:
        assert not known
    else:
        assert known


def test_predict_covers_every_position_once():
    network = nn.Identity()
    logits = predict(network, lambda p: p.float().view(-1, 1, 1, 1), 11, batch_size=4)
    assert logits.flatten().tolist() == list(range(11))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet34", "resnet50", "resnet101", "mobilenetv2", "efficientnet_b0", "shufflenet_g2", "vgg16",
     "convnet128", "convnet128-d4", "mobilenet_v3_small", "resnet10t"],
)  # fmt: skip
def test_every_student_of_the_field_takes_a_step(generator, name):
    """Ours, torchvision's and timm's, on 32x32: all weights that a loss reaches change, and stay finite."""
    if name == "resnet10t":
        pytest.importorskip("timm")
    network = build(name, 10, (32, 32), seed=0)
    before = {key: p.detach().clone() for key, p in network.named_parameters()}
    images, targets = torch.randn(2, 3, 32, 32, generator=generator), torch.randn(2, 10, generator=generator)
    schedule = Schedule("sgd", 0.1, 0.0, 0.9, 1, 1)
    fit(network, Training([(images, targets)], soft_loss(4.0)), schedule, Execution(engine="eager"))
    changed = [not torch.equal(before[key], p) for key, p in network.named_parameters()]
    assert sum(changed) >= 0.6 * len(changed)
    assert network(images).isfinite().all() and network(images).shape == (2, 10)
