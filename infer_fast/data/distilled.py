"""The distilled set: base images, compensators and soft labels, in memory and on disk.

On disk it is a folder: distilled.safetensors, card.json (how it was made), README.md (a dataset card), preview.png.
Images and labels are stored raw, as the papers count them, or coded: decoded once on loading, they are as before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from infer_fast.data.card import Card, read_card
from infer_fast.data.codec import Coded, coded_from, decode
from infer_fast.data.label_store import AS_FLOAT16, LabelStore, store_of, unpack
from infer_fast.data.pixels import AS_STORED, Pixels
from infer_fast.errors import InferFastError, first_line
from infer_fast.files import file_hash, read_tensors, stored_bytes, write_tensors
from infer_fast.ops import Quantised, compose, enlarged, enlarging

TENSORS = "distilled.safetensors"
MOSAIC = "mosaic_"
COMPENSATORS = ("compensators", "compensator_scale", "compensator_offset")
QUANTISATION_BYTES = 2 * 3 * 2  # a float16 scale and offset for each of 3 channels


def quantise(compensators: torch.Tensor, std: tuple[float, ...]) -> Quantised:
    """float32 (M, k, 3, H, W), normalised -> bytes with a float16 scale and offset per compensator and channel.

    Values are first limited to -1..1 pixel, beyond which a pixel is black or white anyway; the error is at most half
    a step of the channel's range (plus float16's rounding of the offset).
    """
    pixels = (compensators * torch.tensor(std).view(3, 1, 1)).clamp(-1, 1)
    low, high = pixels.amin(dim=(3, 4)), pixels.amax(dim=(3, 4))  # (M, k, 3)
    offset = low.half()
    # The scale is rounded up so that 255 steps reach the highest value after float16's rounding too.
    scale = ((high - offset.float()).clamp(min=0) / 255).half()
    scale = torch.where(scale == 0, torch.full_like(scale, 2.0**-24), scale * (1 + 2**-10))
    steps = (pixels - offset.float()[..., None, None]) / scale.float()[..., None, None]
    return Quantised(steps.round().clamp(0, 255).to(torch.uint8), scale, offset)


def full_size(small: Quantised, size: tuple[int, int]) -> Quantised:
    """Compensators (M, n, 3, s, s) as those of images of `size` (H, W), enlarged bilinearly as synthesis saw them.

    Raises InferFastError for compensators that are larger than the images, or no squares.
    """
    height, width = small.values.shape[-2:]
    if (height, width) == size:
        return small
    if height != width or height > min(size):
        raise InferFastError(f"the compensators are of {width}x{height}, the base images of {size[1]}x{size[0]}.")
    pixels = small.values * small.scale.float()[..., None, None] + small.offset.float()[..., None, None]
    return quantise(enlarged(pixels, enlarging(pixels.shape[-1], size)), AS_STORED.std)


@dataclass(frozen=True)
class DistilledSet(Dataset):
    """A distilled set as a torch Dataset of (instance float32 (3, H, W) normalised, logits float32 (C,), class).

    base: uint8 (C, k, 3, H, W); stored_compensators: bytes (M, n, 3, s, s) with scale and offset (M, n, 3), or None
    without any; logits: float16 (C, k, M+1, C); pixels: of the dataset; card: how it was made (None: not kept yet);
    coded: what base was decoded from (None: stored raw); label_store: how the logits are stored.
    Instance (c, j, 0) is base image j of class c bare; (c, j, 1+m) has teacher m's compensator j modulo n added.
    """

    base: torch.Tensor
    stored_compensators: Quantised | None
    logits: torch.Tensor
    pixels: Pixels
    classes: tuple[str, ...]
    card: Card | None = None
    coded: Coded | None = None
    label_store: LabelStore = AS_FLOAT16

    @cached_property
    def compensators(self) -> Quantised | None:
        """Compensators as large as the images, (M, n, 3, H, W). Raises InferFastError where they can't be enlarged."""
        return None if self.stored_compensators is None else full_size(self.stored_compensators, self.size)

    @property
    def compensator_bytes(self) -> int:
        """Bytes of the compensators as stored, their scales and offsets."""
        return sum(t.nbytes for t in self.stored_compensators or ())

    @property
    def views_per_base(self) -> int:
        """M + 1 instances are made of each base image."""
        return 1 if self.stored_compensators is None else 1 + len(self.stored_compensators.values)

    @property
    def image_bytes(self) -> int:
        """Bytes of the base images as stored, and of compensators, scales and offsets."""
        return (self.base.nbytes if self.coded is None else self.coded.nbytes) + self.compensator_bytes

    @property
    def label_bytes(self) -> int:
        """Bytes of the soft labels as stored."""
        return self.label_store.nbytes(self.logits)

    @property
    def file_bytes(self) -> int:
        """Bytes of distilled.safetensors, the container included."""
        return stored_bytes(*self._parts())

    def __len__(self) -> int:
        return self.base.shape[0] * self.base.shape[1] * self.views_per_base

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of a distilled set of {len(self)} instances")
        position %= len(self)
        logits = self.logits.reshape(len(self), -1)[position].float()
        label = position // (len(self) // self.base.shape[0])
        return self.instances(torch.tensor([position]))[0], logits, label

    def labels(self) -> torch.Tensor:
        """The class of every instance, int64 (len,)."""
        return torch.arange(self.base.shape[0]).repeat_interleave(len(self) // self.base.shape[0])

    def instances(self, positions: torch.Tensor) -> torch.Tensor:
        """The clean instances at int64 positions (N,), float32 (N, 3, H, W), normalised."""
        return compose(*self.sources(positions), mean=self.pixels.mean, std=self.pixels.std)

    def sources(self, positions: torch.Tensor) -> tuple:
        """What compose takes for these positions: base (C*k, ...), base_index, compensators (M*k, ...), their index."""
        k = self.base.shape[1]
        view = positions % self.views_per_base
        base_index = positions // self.views_per_base  # c * k + j
        flat = None if self.compensators is None else Quantised(*(t.flatten(0, 1) for t in self.compensators))
        n = 0 if self.compensators is None else self.compensators.values.shape[1]
        index = torch.where(view == 0, -1, (view - 1) * n + base_index % k % max(n, 1))
        return self.base.flatten(0, 1), base_index, flat, None if flat is None else index

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of every image."""
        return self.base.shape[3], self.base.shape[4]

    @property
    def made(self) -> Card:
        """The card. Raises InferFastError for a set that has none."""
        if self.card is None:
            raise InferFastError("This distilled set has no card: it was not read from a folder.")
        return self.card

    def part(self, k: int, teachers: int) -> DistilledSet:
        """The first k base images of each class, with the compensators of the first `teachers` teachers; stored raw."""
        added = self.stored_compensators if teachers else None
        return replace(
            self,
            base=self.base[:, :k],
            stored_compensators=None if added is None else Quantised(*(t[:teachers, :k] for t in added)),
            logits=self.logits[:, :k, : teachers + 1],
            coded=self.coded if k == self.base.shape[1] else None,
        )

    def save(self, folder: Path) -> Path:
        """Writes distilled.safetensors atomically: the same set always gives the same bytes (not the card)."""
        path = Path(folder) / TENSORS
        write_tensors(path, *self._parts())
        return path

    def publish(self, card: Card, folder: Path) -> Card:
        """Writes the set and its card, which it returns with the file's hash; hashes that it has stay good until then.

        The card goes first: whenever this is cut short, what a reader finds fits together, or it is told that it does
        not. Raises DiskError when the disk is full or the folder not writable.
        """
        path = Path(folder) / TENSORS
        write_tensors(path, *self._parts(), lambda new: replace(card, sha256=(*card.sha256, new)).write(folder))
        published = replace(card, sha256=(file_hash(path),))
        published.write(folder)
        return published

    def _parts(self) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """The tensors of distilled.safetensors, and its header's card: how coded images and labels are to be read."""
        tensors, labels = self.label_store.pack(self.logits)
        if self.coded is not None:
            tensors |= {f"{MOSAIC}{position:04d}": part for position, part in enumerate(self.coded.parts)}
        else:
            tensors["images" if self.stored_compensators is None else "base"] = self.base
        if self.stored_compensators is not None:
            tensors |= dict(zip(COMPENSATORS, self.stored_compensators, strict=True))
        images = {} if self.coded is None else self.coded.layout()
        return tensors, {"images": images, "labels": labels} if images or labels else None


def load(path: str | Path) -> DistilledSet:
    """Reads a distilled set from its folder (or from the distilled.safetensors in it).

    Returns a torch Dataset of (instance, logits, class). Raises InferFastError when a file is missing, damaged or
    another than the card tells of, or the parts don't fit together; sizes are checked before anything is decoded.
    """
    path = Path(path)
    folder = path.parent if path.name == TENSORS else path
    if not (folder / TENSORS).is_file():
        raise InferFastError(f"{folder} holds no distilled set: {TENSORS} is not there.")
    tensors, stored = read_tensors(folder / TENSORS)
    card = read_card(folder)
    if card.sha256 and file_hash(folder / TENSORS) not in card.sha256:
        raise InferFastError(
            f"{folder / TENSORS} is not the file that card.json tells of (its SHA-256 differs): run the command that "
            "made the set again, or fetch both files anew."
        )
    try:
        distilled = read_set(tensors, stored, card)
    except InferFastError as error:
        raise InferFastError(f"{folder / TENSORS}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InferFastError(
            f"{folder} is no whole distilled set: {first_line(error)} is missing or damaged."
        ) from error
    return distilled


def read_set(tensors: dict[str, torch.Tensor], stored: dict[str, Any], card: Card) -> DistilledSet:
    """The set of a file's tensors and header. Raises InferFastError, without the file's name, where they don't fit;
    KeyError, TypeError, ValueError, OverflowError or AttributeError for a header that lacks a field, or has a strange
    one."""
    coded, labels = None, stored.get("labels", {})
    if stored.get("images"):
        coded = coded_from(stored["images"], tuple(t for name, t in tensors.items() if name.startswith(MOSAIC)))
        if coded.shape[:1] != (len(card.dataset.classes),):
            raise InferFastError(f"the card names {len(card.dataset.classes)} classes, the images have {coded.shape}.")
    there = COMPENSATORS[0] in tensors
    base = decode(coded) if coded is not None else tensors["base" if there else "images"]
    compensators = Quantised(*(tensors[name] for name in COMPENSATORS)) if there else None
    if card.pixels != (None if coded is None else coded.digest):
        raise InferFastError(f"the card is that of other base images than {TENSORS} has.")
    _check_images(base, compensators, card)
    views = 1 if compensators is None else 1 + len(compensators.values)
    logits = unpack(tensors, labels, (*base.shape[:2], views, base.shape[0]))
    return DistilledSet(
        base, compensators, logits, card.dataset.pixels, card.dataset.classes, card, coded, store_of(labels, tensors)
    )


def _check_images(base: torch.Tensor, compensators: Quantised | None, card: Card) -> None:
    """Raises InferFastError, without the file's name, where images, compensators and card don't fit together."""
    if base.ndim != 5 or base.dtype != torch.uint8 or base.shape[2] != 3 or not base.numel():
        raise InferFastError(
            f"the images are {tuple(base.shape)} of {base.dtype}, expected (classes, k, 3, H, W) of torch.uint8."
        )
    classes, k, *image = base.shape
    if len(card.dataset.classes) != classes:
        raise InferFastError(f"the card names {len(card.dataset.classes)} classes, the images have {classes}.")
    if min(card.dataset.std) <= 0:
        raise InferFastError(f"the card's standard deviations are {card.dataset.std}: they must be above 0.")
    if compensators is None:
        return
    values, scale, offset = compensators
    m, n, *shape = values.shape if values.ndim == 5 else (0, 0)
    small = shape[:1] == [3] and shape[1:] != image[1:]
    if (not small and shape != image) or not m or not 0 < n <= k or values.dtype != torch.uint8:
        raise InferFastError(
            f"the compensators are {tuple(values.shape)} of {values.dtype}, the base images {tuple(base.shape)}."
        )
    if small and (shape[1] != shape[2] or not 0 < shape[1] <= min(image[1:])):
        raise InferFastError(
            f"the compensators are of {shape[2]}x{shape[1]}, the base images of {image[2]}x{image[1]}."
        )
    for name, tensor in zip(COMPENSATORS[1:], (scale, offset), strict=True):
        if tuple(tensor.shape) != (m, n, 3) or not tensor.is_floating_point():
            raise InferFastError(f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, expected {(m, n, 3)} of float16.")
        if not bool(tensor.isfinite().all()):
            raise InferFastError(f"{name} holds NaN or infinite values: the set is damaged.")
