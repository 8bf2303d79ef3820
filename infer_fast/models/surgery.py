"""BatchNorm surgery: a copy of a frozen teacher made for matching.

Every BatchNorm2d, the residual add after it and the activation after that become one bn_match, which also gives the
statistics penalty; every convolution keeps nothing but its weight for backward, every max-pooling a byte an output.
What came out is held against the teacher on a few images; a teacher that this changes is matched as it runs, slower.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from infer_fast.errors import InferFastError, InferFastWarning, first_line, out_of_memory
from infer_fast.models.census import TOLERANCE, Census, Owners, apart, census, difference, layers_of, weighed
from infer_fast.models.copies import frozen_copy, in_layout
from infer_fast.models.execution import at_precision
from infer_fast.models.frozen import FrozenConv2d, FrozenLinear, freeze
from infer_fast.models.fuse import Norm, fuse
from infer_fast.models.layout import noise_for
from infer_fast.models.matching import AsItRuns, Layer, MatchedBatchNorm, Pass
from infer_fast.models.pool import freeze_pooling
from infer_fast.models.weights import faulty
from infer_fast.ops.bn_match import Statistics

PROBED = 2  # images of noise


class MatchedTeacher(nn.Module):
    """A frozen, eval-mode copy of `teacher` that gives its logits and sum_l w_l * penalty_l (the loss of INFER, eq. 5).

    w_l is first_bn_multiplier for the first BatchNorm2d in module order, 0 for the positions in skip_bn, else 1.
    The copy's weights are channels_last. The caller's teacher is not touched.
    Raises InferFastError if it has no BatchNorm2d with running statistics.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        first_bn_multiplier: float = 10.0,
        r_var: float = 1.0,
        skip_bn: tuple[int, ...] = (),
        backend: str | None = None,
    ):
        super().__init__()
        if any(isinstance(module, torch.jit.ScriptModule) for module in teacher.modules()):
            kind = type(teacher).__name__
            raise InferFastError(f"{kind} is TorchScript, whose BatchNorms are out of reach: give the nn.Module.")
        plain = frozen_copy(teacher)
        self.mixes_images = False
        layers, self.shared, self.kind = layers_of(plain), Pass(r_var, backend), type(plain).__name__
        _check(self.kind, layers, skip_bn)
        self._layer_weights = {
            name: 0.0 if i in skip_bn else first_bn_multiplier if i == 0 else 1.0 for i, name in enumerate(layers)
        }
        self._plain = [plain]  # until it was compared; in a list it is no part of this module
        self._noise: list[torch.Tensor] = []  # what it was compared on
        self._taken = False
        self._forms = self._every_form(plain)
        self.network, self._weights = next(self._forms)

    def _every_form(self, plain: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
        """The networks that may do what `plain` does, the fastest first; each with what shares its weights' memory."""
        network = in_layout(frozen_copy(plain), torch.channels_last)
        owners = Owners(network)

        def matched(norm: Norm, activation: str) -> MatchedBatchNorm:
            assert norm.running_mean is not None  # _check has seen to it
            name = str(owners.of(norm.running_mean))
            return MatchedBatchNorm(norm, self.shared, Layer(name, self._layer_weights[name]), activation)

        weights = list(network.parameters())
        fused = fuse(network, matched, twice=True)
        if fused is not None:
            yield freeze_pooling(freeze(fused), self.shared.backend), weights
        for copying in (False, True):
            yield self._as_it_runs(plain, copying=copying)

    def _as_it_runs(self, plain: nn.Module, *, copying: bool) -> tuple[nn.Module, list[nn.Parameter]]:
        return AsItRuns(plain, self.shared, self._layer_weights, copying=copying), list(plain.parameters())

    def check(self, images: torch.Tensor) -> None:
        """Holds this copy against the teacher on noise of the shape of `images` (B, 3, H, W), once.

        The logits must be the same and every BatchNorm met as often; where they are not, the teacher is matched as it
        runs, and a warning says so. forward does it by itself on its first images. Raises InferFastError, naming the
        layer, for a teacher that can't be matched at all.
        """
        if not self._plain or images.is_meta:
            return
        (plain,) = self._plain
        fault = faulty(plain.state_dict())
        if fault is not None:
            raise InferFastError(f"{self.kind}: {fault}, so no loss of it would be a number: load its weights again.")
        with _unnoticed(images.device):
            noise, expected = _probe(plain, images)
            if not expected.met:
                raise InferFastError(f"{self.kind} calls none of its BatchNorm layers on images: it can't be matched.")
            reasons = [self._difference(noise, expected)]
            while reasons[-1] is not None and (form := next(self._forms, None)) is not None:
                self.network, self._weights = form
                reasons.append(self._difference(noise, expected))
        if reasons[-1] is not None:
            raise InferFastError(f"{self.kind} can't be matched: {reasons[-1]}.")
        with _unnoticed(images.device):
            self.mixes_images = self._mixes(noise)
        self._plain, self._forms, self._noise = [], iter(()), [noise]
        if isinstance(self.network, AsItRuns):
            _say(f"{self.kind} is matched as it runs, slower: {reasons[0] or 'its code cannot be rewritten'}.")
        unmet = [name for name in self._layer_weights if name not in expected.counts()]
        if unmet:
            share = f"{len(unmet)} of its {len(self._layer_weights)}"
            _say(f"{self.kind} does not call {share} BatchNorms on images: {unmet[0]} is not matched.")

    def _difference(self, images: torch.Tensor, expected: Census) -> str | None:
        """In words, what is not the same with the network that is there now; None where all is."""
        self.shared.met, own = [], images.clone().requires_grad_(True)
        try:
            logits, penalty = self._run(own, 1, None)
            (gradient,) = torch.autograd.grad(weighed(logits), own, retain_graph=True)
            torch.autograd.grad(penalty.sum(), own, allow_unused=True)
            found = Census(logits.detach(), self.shared.met, gradient)
            if isinstance(self.network, AsItRuns):  # its own code: rounding is left, which some amplify without bound
                return difference(found, expected._replace(gradient=None), 20 * TOLERANCE)
            return difference(found, expected)
        except Exception as error:  # whatever the network's own code raises
            if out_of_memory(error):
                raise
            return f"{type(error).__name__}: {first_line(error)}"
        finally:
            self.shared.met = None

    @torch.no_grad()
    def _mixes(self, noise: torch.Tensor) -> bool:
        """Whether an image's logits depend on the images beside it."""
        half = PROBED // 2
        logits, _ = self._run(noise, 1, None)
        return apart(self._run(noise[:half], 1, None)[0], logits[:half], TOLERANCE)

    def take(self, teacher: nn.Module) -> None:
        """Takes over the weights of `teacher`, the network it was made of with others, in the tensors that are there.

        So what an engine captured or compiled goes on being of use. Statistics are those it was made with. The first
        time it is held against that teacher too, and matched as it runs where some of its weights are still the old.
        """
        with torch.no_grad():
            for own, given in zip(self._weights, teacher.parameters(), strict=True):
                own.copy_(given)
        for module in self.modules():
            if isinstance(module, (FrozenConv2d, FrozenLinear)):
                module.cast_again()
        if self._noise and not self._taken:
            self._taken, plain = True, frozen_copy(teacher)
            with _unnoticed(self._noise[0].device):
                if self._difference(self._noise[0], census(plain, self._noise[0])) is not None:
                    self.network, self._weights = self._as_it_runs(plain, copying=True)
                    _say(
                        f"{self.kind} is matched as it runs, slower: its code keeps weights that were those of before."
                    )

    def forward(
        self, x: torch.Tensor, lanes: int = 1, whole: Sequence[Statistics] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (lanes*B, 3, H, W), normalised -> logits (lanes*B, C) and the weighted penalty, (lanes,).

        whole: what `statistics` gave for the larger batch that x is a chunk of (see bn_match).
        """
        if self._plain and not torch.compiler.is_compiling():
            self.check(x)
        return self._run(x, lanes, whole)

    def _run(
        self, x: torch.Tensor, lanes: int, whole: Sequence[Statistics] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.shared.begin(lanes, whole)
        logits = self.network(x.contiguous(memory_format=torch.channels_last))
        total, _ = self.shared.end()
        return logits, torch.zeros(lanes, device=x.device) if total is None else total

    @torch.no_grad()
    def statistics(self, x: torch.Tensor, lanes: int = 1) -> list[Statistics]:
        """The statistics of every BatchNorm's input, in the order of the calls; keeps nothing for backward."""
        if self._plain and not torch.compiler.is_compiling():
            self.check(x)
        self.shared.begin(lanes, statistics_only=True)
        self.network(x.contiguous(memory_format=torch.channels_last))
        return self.shared.end()[1]


@contextmanager
def _unnoticed(device: torch.device) -> Iterator[None]:
    """In float32 and with gradients, whatever the caller's mode; nobody else hears what is kept for backward."""
    hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    with torch.inference_mode(False), torch.enable_grad(), at_precision(device, "float32"), hooks:
        yield


def _probe(plain: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, Census]:
    """Noise, and what the teacher makes of it; of the images themselves if it gives finite logits for them alone."""
    noise = noise_for(plain, (PROBED, *images.shape[1:])).to(images.device)
    expected = census(plain, noise)
    given = images[:PROBED].detach().to(noise.dtype)
    if len(given) == PROBED and expected.logits.isnan().any():
        of_images = census(plain, given)
        if not of_images.logits.isnan().any():
            return given, of_images
    return noise, expected


def _say(sentence: str) -> None:
    warnings.warn(sentence, InferFastWarning, stacklevel=3)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _check(kind: str, layers: dict[str, nn.Module], skip_bn: tuple[int, ...]) -> None:
    if not layers:
        raise InferFastError(
            f"{kind} has no BatchNorm2d, whose statistics are what images are matched to: choose another teacher."
        )
    for position, norm in enumerate(layers.values()):
        mean, variance = norm.running_mean, norm.running_var
        if not isinstance(mean, torch.Tensor) or not isinstance(variance, torch.Tensor):
            raise InferFastError(f"{kind}: BatchNorm2d layer {position} keeps no running statistics to match.")
    beyond = [p for p in skip_bn if not 0 <= p < len(layers)]
    if beyond:
        raise InferFastError(
            f"skip_bn names BatchNorm layer {beyond[0]}, but {kind} has {len(layers)} (0 is the first)."
        )
