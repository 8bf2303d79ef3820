"""How a distilled set's soft labels are stored: as float16 rows, in 8 bits, or the top ones of each row in 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from infer_fast.errors import InferFastError

STEPS = 255


@dataclass(frozen=True)
class LabelStore:
    """float16: rows of logits; uint8: the same in 8 bits; top: in each row the `top` largest, in 8 bits, with their
    classes, and one value for the rest, which has the rest's whole probability at `temperature`, spread evenly.

    truth: share that an image's own class has in its label beside what the teachers say, 0 to less than 1.
    """

    how: str = "float16"
    top: int = 0
    temperature: float = 1.0
    truth: float = 0.0

    def of(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Labels float16 (..., C), as they will be read, of images of int64 `classes` (...) with the teachers' logits.

        With a truth, softmax(label / T) = truth * onehot(class) + (1 - truth) * softmax(logits / T) at temperature T;
        with T = 1 it is the weighted sum of both losses of Hinton et al. (arXiv 1503.02531, section 2).
        """
        if self.truth:
            log_p = (logits.float() / self.temperature).log_softmax(dim=-1) + math.log1p(-self.truth)
            own = log_p.gather(-1, classes[..., None])
            own = torch.logaddexp(own, torch.full_like(own, math.log(self.truth)))
            logits = self.temperature * log_p.scatter(-1, classes[..., None], own)
        return self.rounded(logits.half())

    def in_16_bits(self) -> LabelStore:
        """The same labels, not compressed."""
        return replace(self, how="float16", top=0)

    def pack(self, logits: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Logits (..., C) as tensors to be stored, and what else it takes to read them.

        8 bits stand for 256 even steps between the least and the largest value of all rows.
        """
        mixed = {"truth": self.truth, "temperature": self.temperature} if self.truth else {}
        if self.how == "float16":
            return {"logits": logits.half()}, mixed
        wide = logits.float()
        if self.how == "uint8" or self.top >= wide.shape[-1] - 1:
            values, span = _quantised(wide)
            return {"logits": values}, {"how": "uint8", "span": span, **mixed}
        largest = wide.topk(self.top, dim=-1)
        others = wide.scatter(-1, largest.indices, -torch.inf)
        left = wide.shape[-1] - self.top
        rest = (others / self.temperature).logsumexp(dim=-1, keepdim=True) - torch.tensor(float(left)).log()
        values, span = _quantised(torch.cat([largest.values, self.temperature * rest], dim=-1))
        classes = largest.indices.to(torch.uint8 if wide.shape[-1] <= 256 else torch.int16)
        how = {"how": "top", "temperature": self.temperature, "classes": wide.shape[-1], "span": span, **mixed}
        return {"logits": values, "logit_classes": classes}, how

    def rounded(self, logits: torch.Tensor) -> torch.Tensor:
        """float16 logits (..., C) as they will be read."""
        return unpack(*self.pack(logits))

    def nbytes(self, logits: torch.Tensor) -> int:
        """Bytes of stored logits."""
        return sum(tensor.nbytes for tensor in self.pack(logits)[0].values())


AS_FLOAT16 = LabelStore()


def store_of(how: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LabelStore:
    """The store that pack's tensors and description came from. Raises InferFastError for one that can't be."""
    top = tensors["logit_classes"].shape[-1] if how.get("how") == "top" else 0
    temperature, truth = (float(how.get(name, default)) for name, default in (("temperature", 1), ("truth", 0)))
    if not (0 < temperature < math.inf and 0 <= truth < 1):
        raise InferFastError(
            f"the labels have a temperature of {temperature:g} and {truth:g} of the truth, which can't be."
        )
    return LabelStore(how.get("how", "float16"), top, temperature, truth)


def unpack(
    tensors: dict[str, torch.Tensor], how: dict[str, Any], expected: tuple[int, ...] | None = None
) -> torch.Tensor:
    """What pack gave, as float16 logits (..., C); expected: their shape, where it is known.

    Raises KeyError for what is missing, InferFastError for another shape, before room is made for it, or for values
    that are not finite.
    """
    values = tensors["logits"]
    classes = how["classes"] if "classes" in how else values.shape[-1] if values.ndim else 0
    if expected is not None and (*values.shape[:-1], classes) != expected:
        raise InferFastError(f"the logits are {(*values.shape[:-1], classes)}, the images call for {expected}.")
    restored = values
    if "span" in how:
        low, high = (float(value) for value in how["span"])
        restored = values.float() * ((high - low) / STEPS) + low
    if "classes" in how:
        restored = _spread(restored, tensors["logit_classes"], classes)
    if not bool(restored.half().isfinite().all()):
        raise InferFastError("the logits hold NaN or infinite values: label the set again, or fetch it anew.")
    return restored.half()


def _spread(rows: torch.Tensor, columns: torch.Tensor, classes: int) -> torch.Tensor:
    """Rows (..., top + 1) of the largest logits and that of the rest, as (..., classes)."""
    columns = columns.long() & 0xFFFF if columns.dtype == torch.int16 else columns.long()
    if columns.shape != (*rows.shape[:-1], rows.shape[-1] - 1):
        raise InferFastError(
            f"logit_classes is {tuple(columns.shape)}, and does not fit logits of {tuple(rows.shape)}."
        )
    if not bool(((columns >= 0) & (columns < classes)).all()):
        raise InferFastError(f"logit_classes names a class that there is not: {classes} classes are 0..{classes - 1}.")
    return rows[..., -1:].expand(*rows.shape[:-1], classes).scatter(-1, columns, rows[..., :-1])


def _quantised(values: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """uint8 steps, and the values of step 0 and of step 255: float16's, so that what was read is stored alike again."""
    low, high = values.min().half().item(), values.max().half().item()
    step = (high - low) / STEPS or 1.0
    return ((values - low) / step).round().clamp(0, STEPS).to(torch.uint8), (low, high)
