"""What the solver is given: refused in one sentence where it can't work, and the cause named where a loss is NaN."""

from dataclasses import replace

import pytest
import torch

from infer_fast.errors import InferFastError
from infer_fast.models import build
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis import NonFiniteLossError, draw_views, solve
from infer_fast.synthesis.arguments import blame, check_logits, check_targets, check_tasks, check_teacher
from infer_fast.synthesis.problem import adjusted_teacher

SETTINGS = SynthesisSettings(iterations=2, jitter=1)
CPU = torch.device("cpu")


def network(classes=4):
    return build("convnet", classes, (8, 8), seed=0).eval()


def with_value(name, value, generator):
    """A network with one value somewhere in the tensor `name`."""
    teacher = network()
    tensor = teacher.state_dict()[name].view(-1)
    tensor[int(torch.randint(0, len(tensor), (1,), generator=generator))] = value
    return teacher


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("stages.2.1.running_var", float("nan"), "stages.2.1.running_var holds NaN"),
        ("stages.2.1.running_var", -1e-6, "stages.2.1.running_var holds a variance below 0"),
        ("stages.0.1.running_mean", float("inf"), "stages.0.1.running_mean holds infinity"),
        ("classifier.weight", float("-inf"), "classifier.weight holds infinity"),
        ("stages.4.0.weight", float("nan"), "stages.4.0.weight holds NaN"),
    ],
)
def test_weights_and_statistics_that_are_no_numbers_are_refused(generator, name, value, words):
    with pytest.raises(InferFastError, match=f"ConvNet: {words}"):
        solve(with_value(name, value, generator), torch.zeros(1, 4, 3, 8, 8), settings=SETTINGS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_teachers_of_another_precision_are_refused(dtype):
    with pytest.raises(InferFastError, match=f"ConvNet: stages.0.0.weight is {dtype}, solve takes float32"):
        check_teacher(network().to(dtype))


def test_what_is_no_plain_module_is_refused():
    with pytest.raises(InferFastError, match="a torch.nn.Module, not function"):
        check_teacher(lambda images: images)


@pytest.mark.parametrize("shape", [(0, 4, 3, 8, 8), (1, 0, 3, 8, 8), (1, 4, 3, 0, 8)])
def test_tasks_of_nothing_are_refused(shape):
    with pytest.raises(InferFastError, match="at least one task, image and pixel"):
        check_tasks(torch.zeros(shape), None, 2, CPU)


def test_tasks_of_another_kind_or_device_are_refused():
    with pytest.raises(InferFastError, match=r"\(L, C, 3, H, W\), not torch.float64"):
        check_tasks(torch.zeros(1, 4, 3, 8, 8).double(), None, 2, CPU)
    with pytest.raises(InferFastError, match=r"\(L, C, 3, H, W\), not list"):
        check_tasks([0.0], None, 2, CPU)
    with pytest.raises(InferFastError, match="base is on meta and the teacher on cpu"):
        check_tasks(torch.zeros(1, 4, 3, 8, 8, device="meta"), None, 2, CPU)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (torch.arange(3), "int64 .4,., one class for each image"),
        (torch.arange(4).int(), "not torch.int32"),
        (torch.tensor([0, 1, 2, -1]), "holds class -1"),
        (torch.zeros(4), "not torch.float32"),
    ],
)
def test_targets_that_are_no_classes_are_refused(targets, words):
    assert check_targets(torch.tensor([5, 0, 0, 1]), 4) == 6
    with pytest.raises(InferFastError, match=words):
        check_targets(targets, 4)


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (torch.zeros(4, 3), "has 3 outputs, and the images' classes are 0 to 3"),
        (torch.zeros(4, 4, 1, 1), r"gives \(4, 4, 1, 1\) for 4 images"),
        (torch.zeros(1, 4), r"gives \(1, 4\) for 4 images"),
        ((torch.zeros(4, 4), torch.zeros(4)), "gives a tuple for 4 images"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(logits, words):
    good = torch.zeros(4, 9)
    assert check_logits(good, 4, 4) is good
    with pytest.raises(InferFastError, match=words):
        check_logits(logits, 4, 4)


def test_weights_are_not_adjusted_by_outputs_that_are_no_logits():
    views = draw_views(0, 0, [0], iterations=2, jitter=1)
    with pytest.raises(InferFastError, match="has 3 outputs"):
        adjusted_teacher(network(3), torch.zeros(1, 4, 3, 8, 8), torch.arange(4), replace(SETTINGS, steps=1), views, 4)


def test_the_cause_of_a_nan_is_looked_for_before_the_rate(generator):
    images = torch.randn(4, 3, 8, 8, generator=generator)
    assert blame(images, SETTINGS, 5) == "lower --lr or --r-bn"
    assert blame(images, SETTINGS, 0) == (
        "before the first step, so lower --r-bn, --r-var or --first-bn-multiplier, or take another teacher"
    )
    assert "lower --rho, --r-bn" in blame(images, replace(SETTINGS, steps=1), 0)
    assert blame(images * 0 + 2e20, SETTINGS, 5).startswith("its images reach 2e+20")
    for bad in (float("nan"), float("inf"), float("-inf")):
        broken = images.clone()
        broken.view(-1)[int(torch.randint(0, broken.numel(), (1,), generator=generator))] = bad
        assert blame(broken, SETTINGS, 0) == "its images hold NaN or infinity"


def test_each_lane_has_a_cause_of_its_own(generator):
    base = torch.randn(3, 4, 3, 8, 8, generator=generator)
    base[0, 0, 0, 0, 0], base[2] = float("inf"), 1e30
    with pytest.raises(NonFiniteLossError) as caught:
        solve(network(), base, settings=SETTINGS)
    assert set(caught.value.causes) == {0, 2} and caught.value.result[1].isfinite().all()
    assert "lane 0 at iteration 0 (its images hold NaN or infinity)" in str(caught.value)
    assert "lane 2 at iteration 0 (its images reach 1e+30" in str(caught.value)
