"""How a distilled set's soft labels are stored: as float16 rows, in 8 bits, or the top ones of each row in 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

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
    """The store that pack's tensors and description came from."""
    top = tensors["logit_classes"].shape[-1] if how.get("how") == "top" else 0
    temperature, truth = (float(how.get(name, default)) for name, default in (("temperature", 1), ("truth", 0)))
    return LabelStore(how.get("how", "float16"), top, temperature, truth)


def unpack(tensors: dict[str, torch.Tensor], how: dict[str, Any]) -> torch.Tensor:
    """What pack gave, as float16 logits (..., C). Raises KeyError for what is missing."""
    values = tensors["logits"]
    if "span" not in how:
        return values.half()
    low, high = how["span"]
    restored = values.float() * ((high - low) / STEPS) + low
    if "classes" in how:
        top, rest = restored[..., :-1], restored[..., -1:]
        spread = rest.expand(*rest.shape[:-1], how["classes"])
        restored = spread.scatter(-1, tensors["logit_classes"].long(), top)
    return restored.half()


def _quantised(values: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """uint8 steps, and the values of step 0 and of step 255: float16's, so that what was read is stored alike again."""
    low, high = values.min().half().item(), values.max().half().item()
    step = (high - low) / STEPS or 1.0
    return ((values - low) / step).round().clamp(0, STEPS).to(torch.uint8), (low, high)
