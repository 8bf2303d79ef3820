"""The solver against the published loop in float64, and against itself in other arrangements."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import memory, published
from infer_fast.data.augment import Augmentation, Sampling
from infer_fast.data.images import draw_of_each_class
from infer_fast.data.resident import Composer, batches
from infer_fast.data.sets import resident_split
from infer_fast.data.sources import load_dataset
from infer_fast.errors import InferFastError, InferFastWarning
from infer_fast.models import MatchedTeacher, build
from infer_fast.models.train import Schedule, Training, fit, hard_loss
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis import NonFiniteLossError, Views, draw_views, solve
from infer_fast.synthesis.problem import Problem, adjusted_teacher, image_prior
from infer_fast.synthesis.solver import Solver
from tests.models.test_surgery import smooth
from tests.synthesis.test_views import only

SETTINGS = SynthesisSettings(
    iterations=20, lr=0.1, r_bn=0.7, r_var=3.0, jitter=2, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
)
CLASSES, SIZE = 4, 8


# SiLU throughout: with ReLU, an input within rounding of 0 changes whole elements of the gradient in any float32 code.
def teacher_and_base(generator, name="convnet-silu", lanes=3, size=SIZE):
    network = build(name, CLASSES, (size, size), seed=1).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network, torch.randn(lanes, CLASSES, 3, size, size, generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_loss_and_gradient_equal_the_published_ones_for_resnet18(generator, dtype, tolerance):
    network, base = teacher_and_base(generator, "resnet18", lanes=2, size=16)
    network, base = smooth(network).to(dtype), base.to(dtype)
    u = 0.1 * torch.randn(2, 1, 3, 16, 16, generator=generator, dtype=dtype)
    shift = torch.randint(0, 5, (2, 2), generator=generator)
    u.requires_grad_(True)
    problem = Problem(MatchedTeacher(network, r_var=SETTINGS.r_var), base, torch.arange(CLASSES), SETTINGS)
    loss = problem.loss(u, only(shift))
    (gradient,) = torch.autograd.grad(loss.sum(), u)

    exact, views = network.double(), Views(shift[None])
    hooks = published.hooks_of(exact, SETTINGS.r_var)
    for lane in range(2):
        own = u[lane].detach().double().requires_grad_(True)
        seen = published.viewed(base[lane].double() + own, published.host_view(views.lane(lane), 0))
        expected = published.objective(exact, hooks, seen, torch.arange(CLASSES), SETTINGS)
        (expected_gradient,) = torch.autograd.grad(expected, own)
        assert loss[lane].item() == pytest.approx(expected.item(), rel=1e-5)
        error = (gradient[lane].double() - expected_gradient).norm() / expected_gradient.norm()
        assert error < tolerance


def test_solve_equals_the_published_loop_in_float64(generator):
    network, base = teacher_and_base(generator, lanes=1)
    settings = replace(SETTINGS, iterations=8)
    views = draw_views(0, 0, [0], iterations=8, jitter=2)
    ours = solve(network, base, settings=settings, views=views)
    exact = published.solve(network.double(), base[0].double(), settings, views)
    assert exact.dtype == torch.float64
    assert (ours[0].double() - exact).norm() / exact.norm() < 1e-4


def test_three_lanes_equal_three_runs_of_one(generator):
    network, base = teacher_and_base(generator)
    views = draw_views(7, 0, [0, 1, 2], iterations=20, jitter=2)
    together = solve(network, base, settings=SETTINGS, views=views)
    for lane in range(3):
        alone = solve(network, base[lane : lane + 1], settings=SETTINGS, views=views.lane(lane))[0]
        assert (together[lane] - alone).norm() / alone.norm() < 1e-4


@pytest.mark.slow
def test_large_images_are_seen_cropped_and_flipped(generator):
    """64x64: the default views have crops; the published loop in float64, on torchvision's crops, ends the same."""
    network, base = teacher_and_base(generator, lanes=2, size=64)
    settings = replace(SETTINGS, iterations=4)
    views = draw_views(settings.seed, 0, [0, 1], iterations=4, jitter=2, size=(64, 64))
    ours = solve(network, base, settings=settings)
    assert torch.equal(ours, solve(network, base, settings=settings, views=views))
    without = solve(network, base, settings=settings, views=Views(views.shift))
    assert (ours - without).norm() > 0.1 * ours.norm()
    exact = published.solve(network.double(), base[1].double(), settings, views.lane(1))
    assert (ours[1].double() - exact).norm() / exact.norm() < 1e-3


def test_a_smaller_compensator_is_enlarged_in_the_view(generator):
    """Its gradient is that of the published loss of base + interpolate(u), and solving lowers that loss."""
    network, base = teacher_and_base(generator, lanes=1)
    settings = replace(SETTINGS, iterations=60, compensator_size=3)
    u = 0.1 * torch.randn(1, 1, 3, 3, 3, generator=generator)
    shift = torch.randint(0, 3, (1, 2), generator=generator)
    problem = Problem(MatchedTeacher(network, r_var=settings.r_var), base, torch.arange(CLASSES), settings)
    loss, gradient = problem.loss_and_gradient(u, only(shift))
    result = solve(network, base, settings=settings)
    assert problem.start().shape == u.shape and result.shape == (1, 3, 3, 3)

    exact, view = network.double(), published.host_view(Views(shift[None]), 0)
    hooks = published.hooks_of(exact, settings.r_var)

    def expected(small):
        seen = published.viewed(base[0].double() + F.interpolate(small, (SIZE, SIZE), mode="bilinear"), view)
        return published.objective(exact, hooks, seen, torch.arange(CLASSES), settings)

    own = u[0].double().requires_grad_(True)
    (exact_gradient,) = torch.autograd.grad(expected(own), own)
    assert loss.item() == pytest.approx(expected(own).item(), rel=1e-5)
    assert (gradient[0].double() - exact_gradient).norm() / exact_gradient.norm() < 1e-4
    assert expected(result.double()) < 0.9 * expected(torch.zeros_like(own))


@pytest.mark.parametrize("optimise", ["compensator", "images"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_give_what_the_whole_batch_gives(generator, optimise, chunk):
    network, base = teacher_and_base(generator, lanes=2)
    settings = replace(SETTINGS, optimise=optimise)
    whole = solve(network, base, settings=settings)
    chunked = Solver(network, settings=settings, chunk=chunk).solve(base)
    assert (chunked - whole).norm() / whole.norm() < 1e-4
    assert not torch.equal(chunked, whole)  # it did take the other way


@pytest.mark.slow
def test_smaller_chunks_take_less_memory():
    """Bytes that one iteration adds to a process, 128 images in passes of 128, 32 and 8."""
    peaks = [memory.in_a_fresh_process("convnet", 128, "float32", chunk) for chunk in (None, 32, 8)]
    assert peaks[1] < 0.6 * peaks[0] and peaks[2] < 0.6 * peaks[1], peaks


class Bounded(nn.Module):
    """A teacher on a device that holds `most` images."""

    def __init__(self, network, most):
        super().__init__()
        self.network, self.most = network, most

    def forward(self, x):
        if x.shape[0] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.network(x)


@pytest.mark.slow
def test_out_of_memory_halves_the_lanes_then_the_chunk_and_says_so(generator):
    network, base = teacher_and_base(generator)
    expected = solve(network, base, settings=SETTINGS)
    for most, said in (
        (8, ["3 lanes: going on with 1"]),
        (2, ["3 lanes: going on with 1", "4 images in one pass: going on with chunks of 2 images"]),
    ):
        solver = Solver(Bounded(network, most), settings=SETTINGS)
        with pytest.warns(InferFastWarning) as caught:
            result = solver.solve(base)
        told = [str(w.message) for w in caught if "matched as it runs" not in str(w.message)]
        assert [text.removeprefix("Out of memory with ").split(",")[0].rstrip(".") for text in told] == said
        assert (result - expected).norm() / expected.norm() < 1e-4
    with pytest.raises(torch.OutOfMemoryError):
        solve(Bounded(network, 0), base, settings=SETTINGS)


@pytest.mark.slow
def test_a_kept_solver_gives_what_a_fresh_one_gives(generator):
    network, base = teacher_and_base(generator)
    solver = Solver(network, settings=SETTINGS)
    views = draw_views(3, 0, [0, 1, 2], iterations=20, jitter=2)
    solver.solve(base.flip(0))
    assert torch.equal(solver.solve(base, views), solve(network, base, settings=SETTINGS, views=views))
    kept = solver.solve(base)
    solver.solve(base.flip(0))
    assert torch.equal(kept, solve(network, base, settings=SETTINGS))  # a later batch does not write into it


@pytest.mark.slow
def test_replaying_views_is_bit_exact_and_defaults_are_the_tasks_own(generator):
    network, base = teacher_and_base(generator)
    views = draw_views(SETTINGS.seed, 0, [0, 1, 2], iterations=20, jitter=2)
    first, second = (solve(network, base, settings=SETTINGS, views=views) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, solve(network, base, settings=SETTINGS))
    other = solve(network, base, settings=replace(SETTINGS, seed=SETTINGS.seed + 1))
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_the_loss_falls(generator):
    network, base = teacher_and_base(generator)
    losses = []
    settings = replace(SETTINGS, iterations=100, lr=0.05)
    Solver(network, settings=settings).solve(base, on_iteration=lambda _, *report: losses.append(report))
    start = solve_loss(network, base, torch.zeros(3, 1, 3, SIZE, SIZE), settings)
    assert [done for done, _ in losses] == [50, 100]
    assert (losses[-1][1] < start).all()


def solve_loss(network, base, u, settings):
    problem = Problem(MatchedTeacher(network, r_var=settings.r_var), base, torch.arange(base.shape[1]), settings)
    with torch.no_grad():
        return problem.loss(u, only(torch.zeros(len(base), 2, dtype=torch.int64)))


@pytest.mark.slow
def test_bfloat16_ends_within_2_percent_of_float32_on_digits():
    """A teacher trained on real digits, and 3 tasks of 60 iterations; both results are judged in float32."""
    dataset = load_dataset("digits")
    size, classes = dataset.size, len(dataset.classes)
    network = build("convnet", classes, size, seed=0)
    split = resident_split(dataset.train, classes, dataset.pixels)
    generator = torch.Generator().manual_seed(0)
    schedule = Schedule("sgd", lr=0.05, weight_decay=5e-4, momentum=0.9, updates=60, updates_per_epoch=20)
    drawn = batches(split, Sampling(64, 60, Augmentation(padding=1), generator))
    fit(network, Training(drawn, hard_loss, Composer(split)), schedule)
    base = dataset.train.images[draw_of_each_class(dataset, 3, generator)].transpose(0, 1)  # (3, 10, 3, 8, 8)
    base = dataset.pixels.normalise(base)
    settings = SynthesisSettings(iterations=60, lr=0.02, jitter=1)
    ends = [
        solve_loss(network, base, solve(network, base, settings=settings, precision=p)[:, None], settings)
        for p in ("float32", "bfloat16")
    ]
    start = solve_loss(network, base, torch.zeros(3, 1, 3, *size), settings)
    assert (ends[0] < 0.9 * start).all()
    torch.testing.assert_close(ends[1], ends[0], rtol=0.02, atol=0)


def test_image_mode_optimises_and_clamps_the_images(generator):
    network, base = teacher_and_base(generator)
    settings = replace(SETTINGS, optimise="images")
    images = solve(network, base, settings=settings)
    assert images.shape == base.shape
    assert images.min() >= -2.0001 and images.max() <= 2.0001 and base.abs().max() > 2.1
    with pytest.raises(InferFastError, match="mean and std"):
        solve(network, base, settings=replace(settings, mean=None))


def test_image_priors_are_added_to_the_loss_whatever_the_chunks(generator):
    """Total variation and L2 against loops over pixels, and a heavy prior smooths the result."""
    x = torch.rand(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    for lane in range(2):
        squares = dict.fromkeys(((0, 1), (1, 0), (1, 1), (1, -1)), 0.0)
        for (dy, dx), _ in list(squares.items()):
            for y in range(4):
                for z in range(5):
                    if y + dy < 4 and 0 <= z + dx < 5:
                        squares[dy, dx] += ((x[lane, :, :, y, z] - x[lane, :, :, y + dy, z + dx]) ** 2).sum().item()
        expected = 0.3 * sum(v**0.5 for v in squares.values()) + 0.7 * sum(i.norm().item() for i in x[lane]) / 2
        assert image_prior(x, 0.3, 0.7)[lane].item() == pytest.approx(expected)

    network, base = teacher_and_base(generator)
    settings = replace(SETTINGS, optimise="images", tv_l2=10.0, l2_scale=0.1)
    smooth_images = solve(network, base, settings=settings)
    chunked = Solver(network, settings=settings, chunk=3).solve(base)
    assert (chunked - smooth_images).norm() / smooth_images.norm() < 1e-4
    plain = solve(network, base, settings=replace(settings, tv_l2=0.0, l2_scale=0.0))
    assert image_prior(smooth_images, 1.0, 0.0).sum() < 0.7 * image_prior(plain, 1.0, 0.0).sum()


def test_adjusted_weights_serve_one_task_alone_and_leak_nowhere(generator):
    network, base = teacher_and_base(generator)
    settings = replace(SETTINGS, steps=3, rho=0.5, iterations=5)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    views = draw_views(0, 0, [0, 1, 2], iterations=5, jitter=2)
    together = solve(network, base, settings=settings, views=views)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    alone = solve(network, base[1:2], settings=settings, views=views.lane(1))[0]
    assert torch.equal(together[1], alone)
    assert not torch.allclose(together[1], solve(network, base, settings=replace(settings, steps=0), views=views)[1])


def test_weight_adjustment_equals_the_published_one_in_float64(generator):
    network, base = teacher_and_base(generator, lanes=1)
    settings = replace(SETTINGS, steps=12, rho=15e-3)
    views = draw_views(0, 0, [0], iterations=20, jitter=2)
    adjusted = adjusted_teacher(network.double(), base.double(), torch.arange(CLASSES), settings, views)
    plain = build("convnet-silu", CLASSES, (SIZE, SIZE), seed=1).eval().double()
    plain.load_state_dict(network.state_dict())
    for step in range(12):
        plain.zero_grad()
        seen = published.viewed(base[0].double(), published.host_view(views, step))
        F.cross_entropy(plain(seen), torch.arange(CLASSES)).backward()
        params = list(plain.parameters())
        published.perturb(params, [p.grad for p in params], settings.rho / 12)
    for (name, ours), theirs in zip(adjusted.named_parameters(), plain.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_a_diverging_lane_is_named_and_the_others_go_on(generator):
    network, base = teacher_and_base(generator)
    views = draw_views(7, 0, [0, 1, 2], iterations=20, jitter=2)
    expected = solve(network, base, settings=SETTINGS, views=views)
    broken = base.clone()
    broken[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(
        NonFiniteLossError, match=r"lane 1 at iteration 0 \(its images hold NaN or infinity\)"
    ) as caught:
        solve(network, broken, settings=SETTINGS, views=views)
    assert caught.value.failures == {1: 0}
    assert torch.equal(caught.value.result[[0, 2]], expected[[0, 2]])


def test_no_host_value_is_read_between_logs(generator, monkeypatch):
    """Between two logs nothing calls item(), cpu(), tolist() or a truth value of a tensor."""
    network, base = teacher_and_base(generator, lanes=2)
    reads = []
    for name in ("item", "cpu", "tolist", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)

        def recording(self, *args, _original=original, _name=name, **kwargs):
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, recording)
    counts = []
    for iterations in (10, 40):
        reads.clear()
        views = Views(torch.zeros(iterations, 2, 2, dtype=torch.int64))
        solve(network, base, settings=replace(SETTINGS, iterations=iterations), views=views)
        counts.append(len(reads))
    assert counts[0] == counts[1]


def test_arguments_that_do_not_fit_are_errors(generator):
    network, base = teacher_and_base(generator)
    with pytest.raises(InferFastError, match=r"\(L, C, 3, H, W\)"):
        solve(network, base[0], settings=SETTINGS)
    with pytest.raises(InferFastError, match=r"\(20, 3, 2\)"):
        solve(network, base, settings=SETTINGS, views=draw_views(0, 0, [0], iterations=20, jitter=2))
    with pytest.raises(InferFastError, match="not an engine"):
        solve(network, base, settings=SETTINGS, engine="warp")
    with pytest.raises(TypeError, match="egine"):
        solve(network, base, settings=SETTINGS, egine="eager")
    with pytest.raises(InferFastError, match="chunk"):
        Solver(network, settings=SETTINGS, chunk=0)
    if not torch.cuda.is_available():
        with pytest.raises(InferFastError, match="graph needs a CUDA device"):
            solve(network, base, settings=SETTINGS, engine="graph")
        with pytest.raises(InferFastError, match="tf32 is a mode of CUDA"):
            solve(network, base, settings=SETTINGS, precision="tf32")
    with pytest.raises(InferFastError, match="not a precision"):
        solve(network, base, settings=SETTINGS, precision="int8")
    with pytest.raises(InferFastError, match="SynthesisSettings.iterations is 0: .* from 1"):
        solve(network, base, settings=replace(SETTINGS, iterations=0))
    with pytest.raises(InferFastError, match="no BatchNorm2d"):
        solve(nn.Flatten(), base, settings=SETTINGS)
    with pytest.raises(InferFastError, match="targets"):
        solve(network, base, settings=SETTINGS, targets=torch.arange(3))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_teacher_without_an_output_for_each_class_is_an_error(generator, steps):
    """From the start, and for later tasks of a kept solver, whose loop asks nothing any more."""
    network, base = teacher_and_base(generator, lanes=1)
    settings = replace(SETTINGS, iterations=2, steps=steps)
    few = build("convnet-silu", CLASSES - 1, (SIZE, SIZE), seed=1)
    with pytest.raises(InferFastError, match="has 3 outputs, and the images' classes are 0 to 3"):
        solve(few, base, settings=settings)
    solver = Solver(network, settings=settings)
    solver.solve(base)
    with pytest.raises(InferFastError, match="has 4 outputs, and the images' classes are 0 to 7"):
        solver.solve(base, targets=torch.tensor([0, 1, 2, 7]))
    assert solver.solve(base, targets=torch.tensor([0, 0, 0, 0])).isfinite().all()


CHANGED = {
    "iterations": 5, "lr": 0.2, "r_bn": 0.1, "r_var": 1.0, "first_bn_multiplier": 3.0, "jitter": 0, "steps": 2,
    "seed": 4, "skip_bn": (1,), "optimise": "images", "tv_l2": 0.1, "l2_scale": 0.1,
}  # fmt: skip


@pytest.mark.slow
def test_every_setting_of_a_synthesis_takes_effect(generator):
    """A task ends with another tensor for each setting that is changed, those of image mode and DWA included."""
    network, base = teacher_and_base(generator, lanes=1)
    plain = replace(SETTINGS, iterations=4)
    images, adjusted = replace(plain, optimise="images"), replace(plain, steps=2)
    variants = [plain, *(replace(plain, **{name: value}) for name, value in CHANGED.items())]
    variants += [
        replace(adjusted, rho=0.5),
        replace(images, mean=(0.4, 0.4, 0.4)),
        replace(images, std=(0.1, 0.1, 0.1)),
    ]
    ends = [solve(network, base, settings=settings) for settings in variants]
    for i, one in enumerate(ends):
        assert not any(torch.equal(one, other) for other in ends[:i]), variants[i]
