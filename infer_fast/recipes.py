"""Every recipe as one frozen value, the published ones and ours: the only home of hyper-parameters.

What each setting means is in infer_fast.settings. Sources: INFER (arXiv 2408.06927), DWA (arXiv 2409.17612), SRe2L
(arXiv 2306.13092).
"""

from __future__ import annotations

from dataclasses import replace

from infer_fast.settings import Recipe, SqueezeSettings, StoreSettings, StudentSettings, SynthesisSettings

# The published CIFAR run leaves the second BatchNorm of the EfficientNet teacher out of the penalty.
SKIPPED_BATCHNORMS: dict[str, tuple[int, ...]] = {"efficientnet_b0": (1,)}

# torchvision's RandomResizedCrop, as the published runs use it: share of the image, width over height.
CROP_AREA, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)

IMAGENET_WEIGHTS = "IMAGENET1K_V1"  # torchvision's, which the published ImageNet runs take for teachers
IMAGENET_TEACHERS = ("resnet18", "mobilenet_v2", "efficientnet_b0")
INFER_TEACHERS = ("resnet18", "mobilenetv2", "efficientnet_b0", "shufflenet_g2")
CONVNET_TEACHERS = ("convnet", "convnet-residual", "convnet-separable", "convnet-silu")

# INFER, counted as the papers count, on small sets. 8x8 images: a shift by 4 would be half the image.
DIGITS_INFER = Recipe(
    dataset="digits",
    arch_name=CONVNET_TEACHERS,
    ipc=10,
    squeeze=SqueezeSettings(epochs=20, batch_size=64, lr=0.05, padding=1, flip=False),
    synthesis=SynthesisSettings(iterations=150, lr=0.02, jitter=1),
    compare="all",
    student=StudentSettings(
        networks=("convnet",), epochs=130, lr=3e-3, temperature=4.0, mix_type="none", padding=1, flip=False
    ),
)

FASHION_MNIST_INFER = Recipe(
    dataset="fashion-mnist",
    arch_name=CONVNET_TEACHERS,
    ipc=10,
    squeeze=SqueezeSettings(epochs=4, batch_size=128, lr=0.05, padding=2, precision="fast"),
    synthesis=SynthesisSettings(iterations=200, lr=0.1, jitter=2),
    compare="all",
    student=StudentSettings(
        networks=("convnet",),
        epochs=200,
        lr=3e-3,
        temperature=4.0,
        mix_type="none",
        padding=2,
        precision="fast",
    ),
)

# What makes the best students of a file's bytes, chosen on held-out training images; docs/results.md has what lost.
DIGITS = replace(
    DIGITS_INFER,
    store=StoreSettings("bytes", "webp", 100, "uint8", label_truth=0.5, compensators=0),
)
FASHION_MNIST = replace(
    FASHION_MNIST_INFER,
    store=StoreSettings("bytes", "avif", 45, "uint8", compensators=0),
    student=replace(FASHION_MNIST_INFER.student, epochs=49, temperature=2.0),
)
CIFAR100_SMALL = Recipe(
    dataset="cifar100",
    arch_name=CONVNET_TEACHERS,
    ipc=10,
    squeeze=SqueezeSettings(epochs=8, batch_size=128, lr=0.05, precision="fast"),
    synthesis=SynthesisSettings(iterations=200, lr=0.1),
    store=StoreSettings("bytes", "avif", 45, "top", label_top=10, label_truth=0.6, compensators=0),
    student=StudentSettings(
        networks=("convnet",), epochs=16, lr=1e-2, temperature=1.0, mix_type="none", precision="fast"
    ),
)


METHODS = ("infer", "dwa", "sre2l")
DATASETS: dict[str, tuple[int, tuple[int, int]]] = {  # classes and image size of the recipes' datasets
    "digits": (10, (8, 8)),
    "fashion-mnist": (10, (32, 32)),
    "cifar10": (10, (32, 32)),
    "cifar100": (100, (32, 32)),
    "tiny-imagenet": (200, (64, 64)),
    "imagenet": (1000, (224, 224)),
}


def _published(dataset: str, method: str, ipc: int) -> Recipe:
    """The published setting of a method on CIFAR-10/100 or Tiny-ImageNet (200 classes of 64x64)."""
    tiny, infer = dataset == "tiny-imagenet", method == "infer"
    shared = SynthesisSettings(
        iterations=2000 if tiny else 1000,
        lr=0.1 if tiny else 0.25,
        batch_size=DATASETS[dataset][0],
        r_bn=1.0 if infer else 0.01,
    )
    synthesis = {
        "infer": shared,
        "dwa": replace(shared, optimise="images", steps=12, rho=15e-3, r_var=11.0),
        "sre2l": replace(shared, optimise="images", start="noise"),
    }[method]
    student = StudentSettings()
    if tiny and method == "dwa":
        student = StudentSettings(
            epochs=200, lr=0.2, momentum=0.9, weight_decay=1e-4, lr_warmup_epochs=5, lr_warmup_decay=0.01
        )
    teachers = INFER_TEACHERS if infer else ("resnet18",)
    return Recipe(dataset=dataset, arch_name=teachers, ipc=ipc, synthesis=synthesis, student=student)


def _imagenet(method: str, ipc: int) -> Recipe:
    """The published setting of a method on ImageNet-1K: torchvision's own weights, no training of teachers.

    Image mode's labels are FKD's (SRe2L, DWA); teachers asked for without weights are trained as torchvision's were.
    """
    infer = method == "infer"
    shared = SynthesisSettings(iterations=2000, lr=0.25, batch_size=1000 if infer else 100, r_bn=0.01, jitter=32)
    synthesis = {
        "infer": shared,
        "dwa": replace(shared, optimise="images", steps=15, rho=15e-3, r_var=2.0),
        "sre2l": replace(shared, optimise="images", start="noise"),
    }[method]
    student = StudentSettings(
        epochs=300,
        batch_size=128,
        temperature=20.0,
        mix_type="cutmix",
        mix_alpha=1.0,
        crop="resized",
        labels=("static",) if infer else ("fkd",),
    )
    return Recipe(
        dataset="imagenet",
        arch_name=IMAGENET_TEACHERS if infer else ("resnet18",),
        arch_weights=IMAGENET_WEIGHTS,
        ipc=ipc,
        seeds=1,
        squeeze=SqueezeSettings(epochs=90, batch_size=256, weight_decay=1e-4),
        synthesis=synthesis,
        student=student,
    )


def _best(dataset: str, ipc: int) -> Recipe:
    """INFER's teachers and students with the bytes spent as on CIFAR100_SMALL: the whole file counts."""
    few = DATASETS[dataset][0] <= 10
    store = StoreSettings("bytes", "avif", 45, "uint8" if few else "top", label_top=10, compensators=0)
    published = _imagenet("infer", ipc) if dataset == "imagenet" else _published(dataset, "infer", ipc)
    return replace(published, store=store)


RECIPES: dict[str, Recipe] = {
    "digits": DIGITS,
    "fashion-mnist": FASHION_MNIST,
    "cifar100-small": CIFAR100_SMALL,
    "digits-infer": DIGITS_INFER,
    "fashion-mnist-infer": FASHION_MNIST_INFER,
    **{
        f"{dataset.removesuffix('-imagenet')}-{method}-ipc{ipc}": _published(dataset, method, ipc)
        for dataset in ("cifar10", "cifar100", "tiny-imagenet")
        for method in METHODS
        for ipc in (10, 50, 100)
    },
    **{f"imagenet-{method}-ipc{ipc}": _imagenet(method, ipc) for method in METHODS for ipc in (10, 50)},
    **{
        f"{dataset.removesuffix('-imagenet')}-best-ipc{ipc}": _best(dataset, ipc)
        for dataset in ("cifar10", "cifar100", "tiny-imagenet", "imagenet")
        for ipc in (10, 50)
    },
}


def base_images_per_class(ipc: int, teachers: int, classes: int) -> int:
    """k = int(ipc / (M/C + 1)): base images per class such that k*(C+M) stored images fit in ipc*C (INFER, section 4).

    Exact in integers: int(ipc * C / (M + C)).
    """
    return ipc * classes // (teachers + classes)


__all__ = [
    "CROP_AREA",
    "CROP_RATIO",
    "DATASETS",
    "IMAGENET_TEACHERS",
    "IMAGENET_WEIGHTS",
    "INFER_TEACHERS",
    "RECIPES",
    "SKIPPED_BATCHNORMS",
    "base_images_per_class",
]
