"""What is optimised: the INFER objective, for several tasks of one teacher side by side.

For a task with base batch X (C, 3, H, W) and a frozen teacher f,

    L(u) = CE(f(view(X + u)), classes) + r_bn * sum_l w_l * ( r_var * ||var_l - running_var_l||_2
                                                            + ||mean_l - running_mean_l||_2 )

(INFER, arXiv 2408.06927, eq. 5 and 6). In image mode (SRe2L, arXiv 2306.13092; DWA, arXiv 2409.17612) the images
themselves are optimised in place of u.

A batch that doesn't fit the device is passed in chunks, and the result is the same: one pass of every chunk gives the
whole batch's statistics, a second one the gradients. So one compensator serves all classes on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from infer_fast.data.pixels import Pixels
from infer_fast.errors import InferFastError
from infer_fast.models.copies import frozen_copy
from infer_fast.models.execution import at_precision, dtype_of
from infer_fast.models.surgery import MatchedTeacher
from infer_fast.ops import enlarged, enlarging, lane_loss, perturb_
from infer_fast.ops.bn_match import Statistics, pooled
from infer_fast.settings import SynthesisSettings
from infer_fast.synthesis.arguments import check_logits, check_outputs
from infer_fast.synthesis.views import View, Views, apply_view, seen


@dataclass
class Problem:
    """L tasks of one teacher.

    base: float32 (L, C, 3, H, W), normalised, on the device; targets: int64 (C,), the class of each image of a lane;
    teacher: the matched teacher all lanes share; precision: of its pass, as choose_precision returns it (losses and
    what is optimised stay float32); chunk: images of each lane that are passed together, None for all C; backend: of
    the views, None for the fastest; classes: outputs that the targets need of the teacher.
    """

    teacher: MatchedTeacher
    base: torch.Tensor
    targets: torch.Tensor
    settings: SynthesisSettings
    precision: str = "float32"
    chunk: int | None = None
    backend: str | None = None
    classes: int = 1

    def __post_init__(self) -> None:
        """bounds: image mode keeps the images in the normalised range of [0,1] pixels; a compensator has none.

        shares: float32 (L,) for each span, its part of the images; made here, so that no iteration fills them; arrived:
        int32 (L,), the counters of lane_loss; enlarging: what takes a smaller compensator to the images' size;
        outputs: how many the teacher has, None before its first pass.
        """
        self.outputs: int | None = None
        images = self.settings.optimise == "images"
        self.bounds = pixels_of(self.settings).bounds(self.base.device) if images else None
        lanes, count, _, *size = self.base.shape
        side = self.settings.compensator_size
        self.enlarging = None if images or side is None else enlarging(side, size, self.base)
        shares = [(span.stop - span.start) / count for span in self._spans()]
        self.shares = [torch.full((lanes,), share, device=self.base.device) for share in shares]
        self.arrived = torch.zeros(lanes, dtype=torch.int32, device=self.base.device)

    def require(self, classes: int) -> None:
        """Other targets need so many outputs. Raises InferFastError where the teacher is known to have fewer."""
        self.classes = classes
        if self.outputs is not None:
            check_outputs(self.outputs, classes)

    def start(self) -> torch.Tensor:
        """The tensor that is optimised, at iteration 0: zeros (L, 1, 3, H, W), or the base images (L, C, 3, H, W).

        Zeros are (L, 1, 3, s, s) where the settings' compensator_size is s.
        """
        if self.settings.optimise == "images":
            return self.base.clone()
        lanes, _, channels, *size = self.base.shape
        side = self.settings.compensator_size
        return torch.zeros(lanes, 1, channels, *(size if side is None else (side, side)), device=self.base.device)

    def seen(
        self, optimised: torch.Tensor, view: View, span: slice = slice(None), dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """This iteration's view of the images of `span`, (L, C', 3, H, W); in `dtype` where a kernel makes it."""
        if self.settings.optimise == "images":
            return seen(optimised[:, span], None, view, dtype, self.backend)
        added = optimised if self.enlarging is None else enlarged(optimised, self.enlarging)
        return seen(self.base[:, span], added, view, dtype, self.backend)

    def loss(
        self,
        optimised: torch.Tensor,
        view: View,
        span: slice = slice(None),
        whole: Sequence[Statistics] | None = None,
    ) -> torch.Tensor:
        """Each lane's loss, float32 (L,), over the images of `span`, without the image prior.

        whole: every layer's statistics over all images, if the span is a chunk of them.
        """
        images = self.seen(optimised, view, span, dtype_of(self.precision))
        with at_precision(images.device, self.precision):
            logits, penalty = self.teacher(images.flatten(0, 1), len(images), whole)
        logits = check_logits(logits, images.shape[0] * images.shape[1], self.classes)
        self.outputs = logits.shape[1]
        return lane_loss(logits, self.targets[span], penalty, self.settings.r_bn, self.arrived)

    def loss_and_gradient(self, optimised: torch.Tensor, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Each lane's loss, float32 (L,), and the gradient of what is optimised."""
        spans = self._spans()
        whole = self._statistics(optimised, view, spans) if len(spans) > 1 else None
        prior_wanted = bool(self.settings.tv_l2 or self.settings.l2_scale)
        if len(spans) == 1 and not prior_wanted:
            return self._part(optimised, view, spans[0], None, self.shares[0])
        total = torch.zeros(len(optimised), device=optimised.device)
        gradient = torch.zeros_like(optimised)
        for span, share in zip(spans, self.shares, strict=True):
            loss, part = self._part(optimised, view, span, whole, share)
            gradient += part
            total += loss * share
        if prior_wanted:
            own = optimised.detach().requires_grad_(True)
            prior = image_prior(self.seen(own, view), self.settings.tv_l2, self.settings.l2_scale)
            gradient += torch.autograd.grad(prior.sum(), own)[0]
            total += prior.detach()
        return total, gradient

    def _part(
        self,
        optimised: torch.Tensor,
        view: View,
        span: slice,
        whole: Sequence[Statistics] | None,
        share: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each lane's loss over the images of `span`, float32 (L,), and the gradient of share (L,) times that."""
        own = optimised.detach().requires_grad_(True)
        loss = self.loss(own, view, span, whole)
        return loss.detach(), torch.autograd.grad(loss, own, grad_outputs=share)[0]

    def _spans(self) -> list[slice]:
        count = self.base.shape[1]
        chunk = count if self.chunk is None else self.chunk
        return [slice(low, min(low + chunk, count)) for low in range(0, count, chunk)]

    @torch.no_grad()
    def _statistics(self, optimised: torch.Tensor, view: View, spans: list[slice]) -> list[Statistics]:
        """Every layer's statistics over all images of a lane: one pass for each span, nothing kept."""
        parts = []
        for span in spans:
            images = self.seen(optimised, view, span, dtype_of(self.precision))
            with at_precision(images.device, self.precision):
                parts.append(self.teacher.statistics(images.flatten(0, 1), len(images)))
        counts = [span.stop - span.start for span in spans]
        return [pooled(layer, counts) for layer in zip(*parts, strict=True)]


def image_prior(images: torch.Tensor, tv_l2: float, l2_scale: float) -> torch.Tensor:
    """Each lane's prior, (L,), of images (L, C, 3, H, W): tv_l2 * TV + l2_scale * mean_i ||x_i||_2.

    TV adds the L2 norms of the differences between neighbours over the whole lane, in four directions: right, down and
    both diagonals (DeepInversion, arXiv 1912.08795, eq. 2, as SRe2L takes it over).
    """
    right = images[..., :, 1:] - images[..., :, :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    variation = sum(torch.linalg.vector_norm(d.flatten(1), dim=1) for d in (right, down, falling, rising))
    size = torch.linalg.vector_norm(images.flatten(2), dim=2).mean(dim=1)
    return tv_l2 * variation + l2_scale * size


def pixels_of(settings: SynthesisSettings) -> Pixels:
    """What the settings' images are normalised with. Raises InferFastError where they don't say."""
    if settings.mean is None or settings.std is None:
        raise InferFastError("Images are clamped to [0,1] pixels: give the settings the dataset's mean and std.")
    return Pixels(settings.mean, settings.std)


def with_statistics(settings: SynthesisSettings, pixels: Pixels) -> SynthesisSettings:
    """The settings with the dataset's mean and standard deviation, where they have none of their own."""
    mean = pixels.mean if settings.mean is None else settings.mean
    return replace(settings, mean=mean, std=pixels.std if settings.std is None else settings.std)


def adjusted_teacher(
    teacher: nn.Module,
    base: torch.Tensor,
    targets: torch.Tensor,
    settings: SynthesisSettings,
    views: Views,
    classes: int = 1,
) -> nn.Module:
    """A copy of `teacher` with directed weight adjustment for one task (DWA, arXiv 2409.17612, algorithm 1).

    `settings.steps` times: g = grad_theta CE(f(view(X))), theta += (rho/steps) * g/||g||_2. base: (1, C, 3, H, W);
    step s takes the view of iteration s (modulo the iterations). The given teacher is not touched.
    classes: outputs that the targets need. Raises InferFastError for a teacher that has fewer.
    """
    copied = frozen_copy(teacher).requires_grad_(True)
    params = list(copied.parameters())
    for step in range(settings.steps):
        position = torch.tensor([step % len(views.shift)], device=base.device)
        images = apply_view(base, views.at(position))
        with at_precision(base.device, "float32"):
            logits = check_logits(copied(images[0]), len(targets), classes)
            loss = F.cross_entropy(logits.float(), targets)
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        perturb_(params, grads, settings.rho / settings.steps)
    return copied.requires_grad_(False)
