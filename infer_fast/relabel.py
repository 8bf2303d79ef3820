"""Stage 3: static soft labels, the teachers' logits averaged on every clean instance; or those of every crop.

python -m infer_fast.relabel --syn-data-path runs/digits          # labels a distilled set again with its own teachers
python -m infer_fast.relabel --syn-data-path runs/digits --fkd    # stores the labels of every epoch's batches
python -m infer_fast.validate --syn-data-path runs/digits --labels fkd    # ... and replays them
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from infer_fast import cli
from infer_fast.data.distilled import TENSORS, DistilledSet, load
from infer_fast.errors import InferFastError
from infer_fast.files import file_hash
from infer_fast.models.teacher import Teacher, device_of, load_teacher
from infer_fast.progress import stage
from infer_fast.report import write_report
from infer_fast.run_folder import at_work, clear_judgement, teacher_in_card
from infer_fast.students.labels import averaged_logits, record_labels


def relabel(distilled: DistilledSet, teachers: Sequence[Teacher]) -> DistilledSet:
    """The same set with logits float16 (C, k, M+1, C) averaged over `teachers` (INFER, arXiv 2408.06927, section 3.3).

    With a share of the truth, where the set's label store has one. The labels are those of the instances as stored:
    after quantisation, as a student will see them; and they are what will be read of them. Raises InferFastError for a
    teacher whose logits float16 can't hold.
    """
    on = device_of(teachers)
    with stage("relabel", len(teachers), "teachers") as running:
        logits = averaged_logits(
            teachers, lambda p: distilled.instances(p).to(on), len(distilled), on_teacher=running.advance
        )
    shape = distilled.logits.shape
    classes = distilled.labels().view(shape[:-1])
    return replace(distilled, logits=distilled.label_store.of(logits.cpu().view(shape), classes))


def teachers_of(distilled: DistilledSet, folder: Path) -> list[Teacher]:
    """The teachers named in the card of the distilled set in `folder`, on the stages' device."""
    teachers = [
        load_teacher(t.name, teacher_in_card(folder, t.path), len(distilled.classes), distilled.size, t.sha256)
        for t in distilled.made.teachers
    ]
    for teacher in teachers:
        teacher.network.to(cli.device())
    return teachers


@dataclass(frozen=True)
class RelabelOptions:
    """Flags of python -m infer_fast.relabel."""

    syn_data_path: Path = Path("runs/digits")
    """the distilled set's folder"""
    fkd: bool = False
    """store the labels of every batch of every epoch of the set's own students, in the set's folder fkd/"""
    epochs: int | None = None
    """epochs to store (with --fkd); None: those of the set's recipe"""


def _main(args: list[str]) -> None:
    options = cli.parse(
        RelabelOptions, RelabelOptions(), args, "python -m infer_fast.relabel", "Soft labels for a distilled set."
    )
    if not options.syn_data_path.is_dir():
        raise InferFastError(f"{options.syn_data_path} does not exist: name the folder of a distilled set.")
    with at_work(options.syn_data_path):
        _label(options)


def _label(options: RelabelOptions) -> None:
    folder = options.syn_data_path
    distilled = load(folder)
    teachers = teachers_of(distilled, folder)
    if options.fkd:
        recipe = distilled.made.recipe
        epochs = recipe.student.epochs if options.epochs is None else options.epochs
        student = replace(recipe.student, epochs=epochs)
        kept = record_labels(distilled, teachers, student, folder, recipe.synthesis.seed)
        weight = sum(file.stat().st_size for file in kept.iterdir())
        print(
            f"{student.epochs} epochs' labels are in {kept}: {weight:,} bytes, {weight / distilled.label_bytes:.0f} "
            f"times the {distilled.label_bytes:,} bytes of the static labels."
        )
        return
    relabelled = relabel(distilled, teachers)
    changed = not torch.equal(relabelled.logits, distilled.logits)
    if changed:  # what was measured with the old labels is void
        clear_judgement(folder)
        card = replace(distilled.made, table=None, results=(), sha256=(file_hash(folder / TENSORS),))
        relabelled.publish(card, folder)
        write_report(folder)
    print(f"{len(relabelled)} instances labelled, {'labels changed' if changed else 'same labels as before'}.")


if __name__ == "__main__":
    sys.exit(cli.run(_main))
