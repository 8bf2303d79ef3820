"""Soft labels of every epoch's batches, stored once and replayed (FKD, arXiv 2112.01528; as SRe2L uses it).

A folder of one file per epoch: which instances, their crops, flips and mixes, and the teachers' float16 logits of the
batches that come of them. A student that replays them needs no teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from infer_fast.data.augment import Augmentation, Draw
from infer_fast.data.resident import Composer
from infer_fast.data.sets import ResidentSet
from infer_fast.errors import InferFastError
from infer_fast.files import read_tensors, write_tensors

FOLDER = "fkd"
STORED_AS = {  # the smallest types that hold the numbers: an image has fewer than 2^15 pixels a side
    "positions": torch.int32,
    "shift": torch.int16,
    "crop": torch.int16,
    "flip": torch.uint8,
    "weight": torch.float32,
    "partner": torch.int32,
    "box": torch.int16,
}
READ_AS = {"flip": torch.bool, "weight": torch.float32}  # the rest: int64


def epoch_path(folder: Path, epoch: int) -> Path:
    """Where the labels of `epoch`, counted from 0, lie in `folder`."""
    return folder / f"epoch-{epoch:04d}.safetensors"


def write_epoch(path: Path, draws: list[Draw], logits: list[torch.Tensor]) -> None:
    """Stores the batches of one epoch and their logits (B, C), one tensor for each kind of number."""
    tensors = {"logits": torch.cat([each.half().cpu() for each in logits])}
    tensors["sizes"] = torch.tensor([len(draw.positions) for draw in draws], dtype=torch.int32)
    for name, kind in STORED_AS.items():
        parts = [getattr(draw, name) for draw in draws]
        if parts[0] is not None:
            per_batch = name in ("weight", "box")  # one for a batch, the others one for an instance
            tensors[name] = (torch.stack(parts) if per_batch else torch.cat(parts)).cpu().to(kind)
    write_tensors(path, tensors)


def read_epoch(path: Path, device: torch.device) -> Iterator[tuple]:
    """The batches of one epoch on `device`: a Draw's parts, then logits float32 (B, C).

    Raises InferFastError for a missing or damaged file, or labels that are not finite.
    """
    tensors, _ = read_tensors(path)
    whole = {"logits", "sizes", "positions"} <= set(tensors)
    if not whole or not bool(tensors["logits"].isfinite().all()):
        what = "NaN or infinite labels" if whole else "no labels of an epoch"
        raise InferFastError(f"{path} holds {what}: delete it and run relabel --fkd again.")
    sizes = tensors.pop("sizes").tolist()
    moved = {name: t.to(device, READ_AS.get(name, torch.int64)) for name, t in tensors.items() if name != "logits"}
    logits = tensors["logits"].to(device).float().split(sizes)
    parts = {
        name: t.unbind() if name in ("weight", "box") else t.split(sizes) for name, t in moved.items()
    }  # one for each batch
    for number in range(len(sizes)):
        yield *(parts[name][number] if name in parts else None for name in Draw._fields), logits[number]


def replay(
    folder: Path, resident: ResidentSet, updates: int, backend: str | None = None
) -> tuple[Iterator[tuple], Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """(batches, make) for infer_fast.models.train.fit: `updates` stored batches of `resident`, epoch after epoch."""
    composer = Composer(resident, backend)

    def stored() -> Iterator[tuple]:
        done, epoch = 0, 0
        while done < updates:
            for batch in read_epoch(epoch_path(folder, epoch), resident.base.device):
                yield batch
                done += 1
                if done == updates:
                    return
            epoch += 1

    def make(positions: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        *draw, logits = others
        assert logits is not None  # read_epoch ends each batch with them
        return composer(positions, *draw)[0], logits

    return stored(), make


def epoch_bytes(instances: int, batch_size: int, classes: int, augmentation: Augmentation) -> int:
    """What one epoch's labels weigh on the disk, without the file's header."""
    spans = -(-instances // batch_size)
    mixes = augmentation.mix != "none" and augmentation.mix_alpha > 0
    size = {name: torch.empty(0, dtype=kind).element_size() for name, kind in STORED_AS.items()}
    each = size["positions"] + 2 * classes + size["flip"] * augmentation.flip + size["partner"] * mixes
    if augmentation.resized:
        each += 4 * size["crop"]
    elif augmentation.padding:
        each += 2 * size["shift"]
    batch = 4 + size["weight"] * mixes + 4 * size["box"] * (augmentation.mix == "cutmix" and mixes)
    return instances * each + spans * batch
