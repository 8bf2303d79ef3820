"""The settings of every stage, as frozen dataclasses: what a recipe gives values to, and what each flag means.

A method is not a class but a point in a small space: what is optimised (one compensator shared by all classes, or the
images), where it starts (real images or noise), which teachers are matched, whether their weights are nudged first,
and the weights of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

try:
    from tyro.conf import arg
except ImportError:  # programs and benchmarks read the recipes too, and need no parser of flags

    def arg(**_: object) -> None:  # type: ignore[no-redef]
        """What only a parser of flags would read is left out."""


ADDED_LATER = {"added later": True}  # of a field: files written before it was there are read with its default
Precision = Literal["auto", "fast", "float32", "tf32", "bfloat16"]
Compare = Literal["none", "coded", "random", "all"]  # see infer_fast.students.candidates
Engine = Literal["auto", "eager", "compile", "graph", "graph-compile"]  # see infer_fast.models.engine


def asked(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass, without those that were added later and have their default: for keys of what is kept,
    so that what was made before them is found."""
    own = {field.name: field for field in fields(settings)}
    values = {name: getattr(settings, name) for name in own}
    return {n: v for n, v in values.items() if own[n].metadata != ADDED_LATER or v != own[n].default}


@dataclass(frozen=True)
class SqueezeSettings:
    """How a teacher is trained on the dataset (SGD with Nesterov off, cosine per epoch)."""

    epochs: int = 200
    """passes over the dataset"""
    batch_size: int = 128
    """images per step; an epoch's last batch is left out where it is one image and BatchNorm can't take it"""
    lr: float = 0.1
    """initial learning rate of SGD, cosine to 0"""
    momentum: float = 0.9
    """momentum of SGD"""
    weight_decay: float = 5e-4
    """weight decay of SGD"""
    padding: int = 4
    """random crop: pixels of black padding on each side"""
    flip: bool = True
    """random horizontal flip (off for digits, where a mirror image is another thing)"""
    loader: Literal["auto", "fused", "dali", "torch"] = "auto"
    """what makes the batches; auto: fused for a set in memory, dali for files on the disk (torch without DALI)"""
    workers: int = 4
    """threads of dali, and of the decoding of files"""
    engine: Engine = "auto"
    """how a training step is run; auto: a CUDA graph on a GPU, eager elsewhere"""
    precision: Precision = "auto"
    """of the network's passes, weights stay float32; auto: bfloat16 on a GPU, float32 elsewhere; fast: bfloat16 also on
    a processor with instructions for it"""


@dataclass(frozen=True)
class SynthesisSettings:
    """What is optimised and how (design of the loss: see infer_fast.synthesis.problem)."""

    optimise: Literal["compensator", "images"] = "compensator"
    """compensator: one tensor shared by all classes (INFER); images: every image itself (DWA, SRe2L)"""
    start: Literal["real", "noise"] = "real"
    """where the optimisation starts: real images (plus a zero compensator), or Gaussian noise"""
    iterations: Annotated[int, arg(name="iteration")] = 1000
    """Adam iterations per task"""
    batch_size: int = 100
    """images of one task's batch; a compensator is matched on all classes as one batch whatever this is, in passes of
    so many images"""
    lr: float = 0.25
    """initial learning rate of Adam (normalised pixels), cosine to 0"""
    r_bn: float = 1.0
    """weight of the BatchNorm-statistics penalty against the cross-entropy"""
    r_var: float = 1.0
    """weight of the variance term against the mean term inside the penalty"""
    first_bn_multiplier: float = 10.0
    """weight of the first BatchNorm layer's penalty (1 for the others)"""
    jitter: int = 4
    """pixels: each view is shifted circularly by 0..jitter in both directions"""
    steps: int = 0
    """DWA: gradient-ascent steps on the teacher's weights before a task (0 = off)"""
    rho: float = 15e-3
    """DWA: total length of those steps, in units of the normalised gradient"""
    tv_l2: float = 0.0
    """weight of the images' total variation (SRe2L's optional prior)"""
    l2_scale: float = 0.0
    """weight of the images' L2 norm (SRe2L's optional prior)"""
    seed: int = 0
    """seed of everything random: teachers, base images, views, noise, students"""
    skip_bn: tuple[int, ...] = ()
    """BatchNorm layers left out of the penalty, by position in module order (added to the recipe's own)"""
    mean: tuple[float, float, float] | None = None
    """channel means in [0,1] pixels; None: the dataset's own"""
    std: tuple[float, float, float] | None = None
    """channel standard deviations in [0,1] pixels; None: the dataset's own"""
    compensator_size: int | None = field(default=None, metadata=ADDED_LATER)
    """pixels of a compensator's side, stored and optimised so, and enlarged in every view; None: the images' own"""


@dataclass(frozen=True)
class StudentSettings:
    """How a student is trained on the distilled set, and on everything it is compared with."""

    networks: Annotated[tuple[str, ...], arg(aliases=["--model"])] = ("resnet18",)
    """students, by name"""
    epochs: int = 400
    """passes over the distilled set; the compared sets get the same number of updates and the same schedule"""
    batch_size: int = 64
    """instances per step; an epoch's last batch is left out where it is one and BatchNorm can't take it"""
    optimizer: Literal["auto", "adamw", "sgd"] = "auto"
    """optimiser of the student; auto: sgd where a momentum is given, else adamw"""
    lr: float = 1e-3
    """initial learning rate, cosine to 0 per epoch"""
    momentum: float | None = None
    """momentum of sgd (0.9 where sgd is asked for without one)"""
    weight_decay: float = 0.01
    """weight decay"""
    lr_scheduler: Literal["cosineannealinglr", "steplr", "exponentiallr"] = "cosineannealinglr"
    """how the learning rate falls, once per epoch"""
    cos: bool = True
    """cosineannealinglr falls as a cosine; with --no-cos linearly, as the published ImageNet script without --cos"""
    lr_step_size: int = 30
    """epochs between two steps (steplr only)"""
    lr_gamma: float = 0.1
    """factor of a step (steplr), or of an epoch (exponentiallr)"""
    lr_warmup_epochs: int = 0
    """epochs before that, in which the learning rate rises from lr_warmup_decay times lr"""
    lr_warmup_decay: float = 0.01
    """where that rise starts, as a share of the learning rate"""
    lr_warmup_method: Literal["linear", "constant"] = "linear"
    """linear: it rises to lr; constant: it stays at lr_warmup_decay times lr"""
    temperature: Annotated[float, arg(aliases=["-T"])] = 30.0
    """softmax temperature of the soft-label loss"""
    mix_type: Literal["mixup", "cutmix", "none"] = "mixup"
    """mixing of pairs of instances (inputs and labels with the same weight)"""
    mix_alpha: float = 0.8
    """MixUp's and CutMix's Beta(alpha, alpha)"""
    labels: tuple[Literal["static", "dynamic", "fkd"], ...] = ("static",)
    """soft labels: static, stored once per instance; dynamic, the teachers label every augmented and mixed batch (for
    epochs divided by teachers + 1); fkd, those labels of every epoch stored and replayed; each makes a row"""
    crop: Literal["padded", "resized"] = "padded"
    """random crop: of the image with a black border, or RandomResizedCrop (area 0.08..1, ratio 3/4..4/3)"""
    padding: int = 4
    """padded crop: pixels of black padding on each side"""
    flip: bool = True
    """random horizontal flip"""
    loader: Literal["auto", "fused", "dali", "torch"] = "auto"
    """what makes the batches; auto: fused, one kernel from the stored bytes"""
    workers: Annotated[int, arg(aliases=["-j"])] = 4
    """threads of dali, and of the decoding of files"""
    engine: Engine = "auto"
    """how a training step is run; auto: a CUDA graph on a GPU, eager elsewhere"""
    precision: Precision = "auto"
    """of the network's passes, weights stay float32; auto: bfloat16 on a GPU, float32 elsewhere; fast: bfloat16 also on
    a processor with instructions for it"""


@dataclass(frozen=True)
class StoreSettings:
    """What fills the budget, and how it is stored."""

    budget: Literal["images", "bytes"] = "images"
    """what classes x ipc x 3*H*W bytes hold: the stored images, raw, as the papers count; or the whole file, labels and
    headers too"""
    codec: Literal["raw", "webp", "avif", "jpeg"] = "raw"
    """what base images are coded with, many in one mosaic; grey images as one channel"""
    quality: int = 60
    """of the codec, 0 to 100 (webp: 100 is lossless)"""
    label_bits: Literal["float16", "uint8", "top"] = "float16"
    """how soft labels are stored: whole rows in 16 or in 8 bits, or the top ones of each row in 8 bits"""
    label_top: int = 10
    """logits of a row that top keeps; the rest's probability is spread evenly"""
    label_truth: float = field(default=0.0, metadata=ADDED_LATER)
    """share of an image's own class in its stored soft label; the teachers' probabilities at the students' temperature
    have the rest"""
    compensators: int | None = None
    """for each teacher; None: one for each base image of a class, as INFER"""


@dataclass(frozen=True)
class Recipe:
    """One published (or bundled) way from a dataset to a distilled set and the table that judges it."""

    dataset: str = "digits"
    """digits, a torchvision name (cifar10, cifar100, fashion-mnist, mnist, kmnist, svhn), or any with --data-path"""
    arch_name: tuple[str, ...] = ("resnet18",)
    """teachers, by name"""
    arch_weights: str | None = None
    """torchvision's weights to take in place of training, such as IMAGENET1K_V1 (downloaded; --arch-path goes first)"""
    ipc: int = 10
    """images per class of the budget: classes x ipc x 3*H*W bytes"""
    seeds: int = 3
    """independent students per row of the table"""
    compare: Compare = "random"
    """rows beside the distilled set's: none; random real images of the same bytes (coded: through the set's codec
    alone); all (and the whole dataset)"""
    squeeze: SqueezeSettings = field(default_factory=SqueezeSettings)
    synthesis: Annotated[SynthesisSettings, arg(name="")] = field(default_factory=SynthesisSettings)
    store: Annotated[StoreSettings, arg(name="")] = field(default_factory=StoreSettings, metadata=ADDED_LATER)
    student: StudentSettings = field(default_factory=StudentSettings)
