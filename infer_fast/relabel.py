"""Stage 3: static soft labels, the teachers' logits averaged on every clean instance.

python -m infer_fast.relabel --syn-data-path runs/digits      # labels a distilled set again with its own teachers
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from infer_fast import cli
from infer_fast.data.distilled import CARD, DistilledSet, load
from infer_fast.data.files import write_json
from infer_fast.data.images import normalise
from infer_fast.models.train import at_precision, predict
from infer_fast.progress import stage
from infer_fast.squeeze import Teacher, load_teacher


def relabel(distilled: DistilledSet, teachers: list[Teacher]) -> DistilledSet:
    """The same set with logits float16 (C, k, M+1, C) averaged over `teachers` (INFER, arXiv 2408.06927, section 3.3).

    The labels are those of the instances as stored: after quantisation, as a student will see them.
    """
    on = next(teachers[0].network.parameters()).device
    with stage("relabel", len(teachers), "teachers") as running:
        total = torch.zeros(distilled.logits.shape).flatten(0, 2)
        for teacher in teachers:
            logits = predict(teacher.network, lambda p: distilled.instances(p).to(on), len(distilled))
            total += logits.cpu()
            running.advance()
    return replace(distilled, logits=(total / len(teachers)).half().view(distilled.logits.shape))


def label_images(images: torch.Tensor, mean: tuple, std: tuple, teachers: list[Teacher]) -> torch.Tensor:
    """The teachers' averaged logits float32 (N, C) for real images uint8 (N, 3, H, W), rounded to float16 as stored."""
    total = sum(predict(t.network, lambda p: normalise(images[p], mean, std), len(images)) for t in teachers)
    return (total / len(teachers)).half().float()


def dynamic_labels(teachers: list[Teacher], precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that labels a batch as a student sees it: the teachers' averaged logits, float32 (B, C).

    The "dynamic" labels of INFER (arXiv 2408.06927, section 4.1): nothing is stored but the teachers.
    """
    networks = [copy.deepcopy(t.network).eval().to(memory_format=torch.channels_last) for t in teachers]

    @torch.no_grad()
    def label(images: torch.Tensor) -> torch.Tensor:
        with at_precision(images.device, precision):
            return sum(network(images).float() for network in networks) / len(networks)

    return label


def teachers_of(distilled: DistilledSet, folder: Path) -> list[Teacher]:
    """The teachers named in the card of the distilled set in `folder`, on the stages' device."""
    size = tuple(distilled.base.shape[-2:])
    teachers = [
        load_teacher(t["name"], folder / t["path"], len(distilled.classes), size, t["sha256"])
        for t in distilled.card["teachers"]
    ]
    for teacher in teachers:
        teacher.network.to(cli.device())
    return teachers


@dataclass(frozen=True)
class RelabelOptions:
    """Flags of python -m infer_fast.relabel."""

    syn_data_path: Path = Path("runs/digits")
    """the distilled set's folder"""


def _main(args: list[str]) -> None:
    options = cli.parse(
        RelabelOptions, RelabelOptions(), args, "python -m infer_fast.relabel", "Soft labels for a distilled set."
    )
    distilled = load(options.syn_data_path)
    relabelled = relabel(distilled, teachers_of(distilled, options.syn_data_path))
    relabelled.save(options.syn_data_path)
    changed = not torch.equal(relabelled.logits, distilled.logits)
    if changed:
        # Results were measured with the old labels.
        write_json(options.syn_data_path / CARD, {**distilled.card, "results": []})
    print(f"{len(relabelled)} instances labelled, {'labels changed' if changed else 'same labels as before'}.")


if __name__ == "__main__":
    sys.exit(cli.run(_main))
