"""The main job, the whole way: dataset -> teachers -> compensators -> soft labels -> distilled set -> students' table.

    python -m infer_fast.distill                                   # digits: under two minutes on two cores, no network
    python -m infer_fast.distill fashion-mnist --data-path DIR     # a recipe on files of your own
    python -m infer_fast.distill cifar100-infer-ipc10 --data-path DIR --dry-run
    python -m infer_fast.distill --list                            # every recipe: tasks, bytes, operations

Finished teachers, tasks and students are kept: the same command goes on where it stopped. On a CPU it ends with the
same bytes; on a GPU cuDNN chooses convolutions by measuring them, so two runs agree within rounding only.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from infer_fast import cli
from infer_fast.data.budget import storage_of
from infer_fast.data.card import CARD, Card, Row, read_card
from infer_fast.data.distilled import DistilledSet
from infer_fast.data.sources import canonical_name
from infer_fast.dry_run import describe, estimate, list_recipes
from infer_fast.errors import InferFastError
from infer_fast.export import export
from infer_fast.files import sweep, write_json
from infer_fast.job import DistillOptions, Job, decide
from infer_fast.models.teacher import Teacher
from infer_fast.progress import Clock
from infer_fast.recipes import RECIPES
from infer_fast.relabel import relabel
from infer_fast.report import write_report
from infer_fast.run_folder import TEACHERS, at_work, clear_judgement, remember_places, writable
from infer_fast.settings import Recipe
from infer_fast.squeeze import squeeze
from infer_fast.students.results import WandbRun
from infer_fast.synthesis.base import base_images
from infer_fast.synthesis.memory import ROOM
from infer_fast.synthesis.tasks import Results, Synthesis, assemble, synthesise
from infer_fast.validate import present, validate

PROG = "python -m infer_fast.distill [RECIPE]"


def distill(options: DistillOptions, recipe_name: str = "digits") -> list[Row]:
    """Runs the whole way and leaves a distilled set in syn_data_path/exp_name; returns the table's rows.

    Raises InferFastError, after saving everything that was finished, for bad input, a task that diverged, or a folder
    that another run is at work in.
    """
    clock, log = Clock(), WandbRun(options.wandb_name)
    log.check()
    with clock.stage("dataset"):
        job = decide(options, recipe_name)
        if options.dry_run:
            seconds = estimate(job.plan, job.recipe, job.dataset)
            print(describe(job.plan, job.dataset, job.recipe.store, job.room, seconds))
            return []
    _open(job.folder)
    with at_work(job.folder, shared=job.shared):
        sweep(job.folder)
        remember_places(options.syn_data_path, (options.data_path, options.val_dir))
        return _run(job, clock, log)


def _open(folder: Path) -> None:
    """Makes a run's folder. Raises InferFastError where it can't be written and there is no finished set in it."""
    if not writable(folder) and not (folder / CARD).is_file():
        raise InferFastError(f"{folder} can't be written: choose a folder that can be with --syn-data-path.")
    folder.mkdir(parents=True, exist_ok=True)


def _run(job: Job, clock: Clock, log: WandbRun) -> list[Row]:
    with clock.stage("squeeze"):
        folder = job.options.syn_data_path / TEACHERS
        teachers = squeeze(job.dataset, job.recipe.arch_name, job.origin, folder)
    with clock.stage("base images"):
        base = base_images(job.dataset, job.recipe, job.plan, job.options.init_path)
        job = job.with_base_images(base.images.shape[1])
    with clock.stage("synthesis"):
        if job.room.kept is not None:
            write_json(job.folder / ROOM, asdict(job.room.kept))  # the run goes on in the room it was planned for
        work = job.synthesis(teachers, base)
        results = synthesise(work, job.folder, job.wanted)
    if results is None:
        done = job.wanted
        print(f"Tasks {done.start}..{done.stop - 1} are solved; run the others, then once without a range.")
        return []
    with clock.stage("relabel"):
        distilled = relabel(assemble(work, storage_of(job.recipe, job.plan.n), results, job.dataset), teachers)
    card = _publish(job, work, results, distilled, clock)
    rows, text = _judge(job, distilled, teachers, clock, log)
    replace(card, table=text, results=tuple(rows)).write(job.folder)
    write_report(job.folder)
    print(f"\nThe distilled set is in {job.folder} (preview.png shows it, report.html tells the rest).")
    return rows


def _publish(job: Job, work: Synthesis, results: Results, distilled: DistilledSet, clock: Clock) -> Card:
    """Writes the set, its card and what is made of both; a run that is finished already is left as it is."""
    former, card = _card_in(job.folder), job.card(work, results, distilled, clock.seconds)
    if former is not None and card == replace(former, seconds=card.seconds, table=None, results=(), sha256=()):
        card = replace(former, sha256=())
    published = distilled.publish(card, job.folder)
    if published != former:
        clear_judgement(job.folder)
        published = replace(published, table=None, results=())
        published.write(job.folder)
        write_report(job.folder)
    if job.options.store_best_images:
        export(distilled, job.folder / "images", "jpg", own=True)
    return published


def _card_in(folder: Path) -> Card | None:
    """The card of the run that was here before, if there is a whole one."""
    try:
        return read_card(folder)
    except InferFastError:
        return None


def _judge(
    job: Job, distilled: DistilledSet, teachers: list[Teacher], clock: Clock, log: WandbRun
) -> tuple[list[Row], str]:
    with clock.stage("validate"):
        evaluation = job.evaluation(distilled, teachers)
        rows = validate(evaluation)
    return rows, present(evaluation, rows, job.folder, log)


@dataclass(frozen=True)
class _Published:
    """The flags of the published scripts that a recipe is chosen by, as they were written."""

    dataset: str | None = None
    ipc: str | None = None
    ipc_end: str | None = None


def _recipe(args: list[str]) -> tuple[str, Recipe, list[str]]:
    """The recipe that is named, or the one that the flags of the published scripts stand for.

    Without a name, --dataset chooses its own INFER recipe if it has one, else digits'; and since those scripts have no
    budget but the last task, an --ipc-end beyond the recipe's ipc sets it, where --ipc does not.
    """
    name, recipe, flags = cli.take_recipe(args)
    if flags is not args:
        return name, recipe, flags
    given = cli.glance(_Published, flags, PROG)
    if given.dataset is not None:
        name = f"{canonical_name(given.dataset).removesuffix('-imagenet')}-infer-ipc10"
        name = name if name in RECIPES else "digits-infer"
        recipe = RECIPES[name]
    last = given.ipc_end
    if last is not None and last.isdecimal() and len(last) < 8 and given.ipc is None:  # longer: out of its range
        recipe = replace(recipe, ipc=max(recipe.ipc, int(last)))
    return name, recipe, flags


def _main(args: list[str]) -> None:
    if "--list" in args:
        print(list_recipes())
        return
    name, recipe, flags = _recipe(args)
    options = cli.parse(
        DistillOptions,
        DistillOptions(recipe),
        flags,
        PROG,
        f"Recipe {name}: from a dataset to a distilled set and the table that judges it.",
    )
    distill(options, name)


if __name__ == "__main__":
    sys.exit(cli.run(_main))
