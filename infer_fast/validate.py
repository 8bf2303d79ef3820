"""Stage 4: students trained on the distilled set, and the honest table of what else the same bytes could have bought.

    python -m infer_fast.validate --syn-data-path runs/digits
    python -m infer_fast.validate --syn-data-path runs/fashion-mnist --data-path DIR --networks resnet18 --seeds 5
    python -m infer_fast.validate --syn-data-path IMAGES --dataset cifar10 --arch-name resnet18 --arch-path resnet18.pth

Every row trains the same student from the same seeds with the same number of updates and the same schedule; only the
training instances and their labels differ.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from infer_fast import cli
from infer_fast.curve import check_curve, points, write_curve
from infer_fast.data.card import CARD, Row, read_card
from infer_fast.dry_run import byte_table
from infer_fast.errors import InferFastError, InferFastWarning
from infer_fast.extras import require
from infer_fast.judging import ValidateOptions, evaluation_of
from infer_fast.models.checkpoint import recorded
from infer_fast.progress import stage
from infer_fast.ranges import check, check_counts
from infer_fast.run_folder import at_work, writable
from infer_fast.settings import Recipe
from infer_fast.students import tsne
from infer_fast.students.candidates import Candidate, Evaluation, candidates
from infer_fast.students.labels import record_labels
from infer_fast.students.results import Measured, ResultStore, WandbRun, table, verdict, write_results
from infer_fast.students.training import check_students, measured_student

PROG = "python -m infer_fast.validate"


def validate(evaluation: Evaluation) -> list[Row]:
    """The table: students of every network on the distilled set, and on what it is compared with.

    Raises InferFastError for a setting out of its range, or a class with fewer than ipc training images.
    """
    settings, seeds = evaluation.settings, evaluation.seeds
    check(settings)
    check_counts(seeds=seeds, seed=evaluation.seed)
    check_students(settings, len(evaluation.dataset.classes), evaluation.dataset.size)
    replayed = _stored_labels(evaluation) if "fkd" in settings.labels else None
    made = candidates(evaluation, replayed)
    results = ResultStore(evaluation.store)
    rows = []
    total = len(settings.networks) * seeds * sum(c.updates for c in made)
    with stage("validate", total, "updates") as running:
        for network in settings.networks:
            for candidate in made:
                each = [
                    measured_student(candidate, evaluation, network, seed, results, running)
                    for seed in range(evaluation.seed, evaluation.seed + seeds)
                ]
                rows.append(_row(network, candidate, each))
    return rows


def _stored_labels(evaluation: Evaluation) -> Path:
    """The folder of the labels of every crop, written now if they are not there."""
    if evaluation.labels_folder is None:
        raise InferFastError("The labels fkd are kept on the disk: validate needs a labels_folder for them.")
    if evaluation.settings.loader == "dali":
        raise InferFastError("The labels fkd are those of stored crops, and dali draws its own: choose --loader fused.")
    return record_labels(
        evaluation.distilled, evaluation.teachers, evaluation.settings, evaluation.labels_folder, evaluation.seed
    )


def _row(network: str, candidate: Candidate, each: list[Measured]) -> Row:
    return Row(
        network,
        candidate.trained_on,
        candidate.labels,
        each[0].instances,
        candidate.updates,
        candidate.image_bytes,
        candidate.label_bytes,
        tuple(e.last for e in each),
        tuple(e.best for e in each),
        tuple(e.top5 for e in each),
    )


def present(evaluation: Evaluation, rows: list[Row], folder: Path | None, log: WandbRun) -> str:
    """Prints the table and what each part weighs, writes table.md and results.json into `folder` (None: nowhere), logs
    the rows. Returns the table.
    """
    whole = evaluation.dataset.train.nbytes
    text = "\n\n".join(part for part in (table(rows, whole), _shipped(evaluation), verdict(rows)) if part)
    print(text)
    print("\n" + byte_table(evaluation.distilled, evaluation.teachers, evaluation.settings, whole))
    if folder is not None:
        write_results(folder, text, rows)
    log.log(rows)
    return text


def _shipped(evaluation: Evaluation) -> str:
    """What a user could ship in place of a set: the smallest teacher."""
    if not evaluation.teachers:
        return ""
    least = min(evaluation.teachers, key=lambda teacher: teacher.weight_bytes)
    return (
        f"The smallest teacher, {least.name}, weighs {least.weight_bytes:,} bytes and reaches {least.accuracy:.2f} %."
    )


@dataclass(frozen=True)
class _Where:
    """The flag that says which set it is, and so what the others default to."""

    syn_data_path: Annotated[Path, arg(aliases=["--train-dir"])] = Path("runs/digits")


def _main(args: list[str]) -> None:
    folder = cli.glance(_Where, args, PROG).syn_data_path
    recipe = read_card(folder).recipe if (folder / CARD).is_file() else Recipe()
    default = ValidateOptions(folder, seeds=recipe.seeds, compare=recipe.compare, student=recipe.student)
    options = cli.parse(ValidateOptions, default, args, PROG, "Students on a distilled set, and the table.")
    if options.check_ckpt is not None:
        print(recorded(options.check_ckpt))
        return
    log = WandbRun(options.wandb_name, options.wandb_project, options.wandb_api_key)
    log.check()
    if options.tsne:
        require("matplotlib", "--tsne")
    shares = check_curve(options.budgets) if options.budgets else []
    if folder.is_dir():
        with at_work(folder, shared=True):
            _judge(options, recipe, shares, log)
    else:
        _judge(options, recipe, shares, log)  # which says that it is not there


def _judge(options: ValidateOptions, recipe: Recipe, shares: list[float], log: WandbRun) -> None:
    evaluation, output = evaluation_of(options, recipe), options.output
    if not writable(output):
        if shares or options.tsne:
            raise InferFastError(f"{output} can't be written: say where pictures go with --output-dir.")
        warnings.warn(
            f"{output} can't be written: the table is printed and nothing is kept (--output-dir names another place).",
            InferFastWarning,
            2,
        )
    present(evaluation, validate(evaluation), output if writable(output) else None, log)
    if shares:
        print(f"\n{write_curve(points(evaluation, recipe, shares, validate), output)}")
    if options.tsne:
        print(f"\n{tsne.picture(evaluation, output / 'tsne.png')}")


if __name__ == "__main__":
    sys.exit(cli.run(_main))
