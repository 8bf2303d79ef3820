"""Is a recipe's set worth more than random real images through the same codec? Several draws of its base images tell.

    python -m bench.draws digits --draws 5 --seeds 3
    python -m bench.draws fashion-mnist --data-path DIR --held-out 10000 --compensators 1 --output draws.json

Each draw makes a set anew, by a seed of its own, and random real images of the same bytes, drawn anew for each student;
the teachers stay. What is said in the end is the mean difference and its standard error over the draws. Flags are those
of infer_fast.distill; settings are chosen with --held-out, never on the test images.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from bench import measure
from infer_fast import cli
from infer_fast.data.card import Card, Row, read_card
from infer_fast.distill import DistillOptions, distill
from infer_fast.errors import InferFastError
from infer_fast.students.candidates import DISTILLED, RANDOM_CODED

PROG = "python -m bench.draws [RECIPE]"
SEEDS_APART = 100  # a draw's students are seeded from its own seed on: no two draws share one


@dataclass(frozen=True)
class DrawOptions:
    """Flags of python -m bench.draws: the main job's, and how often."""

    distill: Annotated[DistillOptions, arg(name="")]
    draws: int = 5
    """sets that are made, each from other base images"""
    output: Path | None = None
    """JSON file of the draws (None: none)"""


@dataclass(frozen=True)
class Draw:
    """One draw: mean accuracy in percent of each kind's students, and how many each has."""

    labels: str
    distilled: float
    random_coded: float
    students: int

    @property
    def ahead(self) -> float:
        """Points by which the distilled set is ahead."""
        return self.distilled - self.random_coded


def draws_of(options: DrawOptions, name: str) -> list[Draw]:
    """All draws of a recipe, for each kind of labels. Raises InferFastError where distill does, and for one draw."""
    if options.draws < 2:
        raise InferFastError(f"--draws {options.draws}: a standard error takes at least 2.")
    own, found = options.distill, []
    folder, root = own.exp_name or f"{name}-draws", own.syn_data_path
    for position in range(options.draws):
        seed = own.recipe.synthesis.seed + position * SEEDS_APART
        recipe = replace(own.recipe, synthesis=replace(own.recipe.synthesis, seed=seed), compare="coded")
        given = own.arch_path
        if position > 0 and not given:  # those of the first draw
            given = _teachers(read_card(root / folder / "0"), root / folder / "0")
        rows = distill(replace(own, recipe=recipe, arch_path=given, exp_name=f"{folder}/{position}"), name)
        found += compared(rows)
    return found


def _teachers(card: Card, folder: Path) -> tuple[Path, ...]:
    return tuple(folder / teacher.path for teacher in card.teachers)


def compared(rows: Sequence[Row]) -> list[Draw]:
    """A table's distilled rows, each with that of random real images through the same codec."""
    other = {(row.network, row.labels): row for row in rows if row.trained_on == RANDOM_CODED}
    return [
        Draw(row.labels, row.mean, other[row.network, row.labels].mean, len(row.last))
        for row in rows
        if row.trained_on == DISTILLED
    ]


def verdict(draws: Sequence[Draw]) -> str:
    """The mean difference of each kind of labels, in points, with its standard error over the draws."""
    said = []
    for labels in dict.fromkeys(draw.labels for draw in draws):
        own = [draw for draw in draws if draw.labels == labels]
        ahead = [draw.ahead for draw in own]
        error = statistics.stdev(ahead) / math.sqrt(len(ahead))
        said.append(
            f"{labels}: distilled {statistics.fmean(d.distilled for d in own):.2f} %, random real, coded "
            f"{statistics.fmean(d.random_coded for d in own):.2f} %, difference {statistics.fmean(ahead):+.2f} ± "
            f"{error:.2f} points (standard error; {len(own)} draws of {own[0].students} students)"
        )
    return "\n".join(said)


def _main(args: list[str]) -> None:
    name, recipe, flags = cli.take_recipe(args)
    default = DrawOptions(DistillOptions(recipe))
    options = cli.parse(DrawOptions, default, flags, PROG, f"Recipe {name}: draws of its base images.")
    draws = draws_of(options, name)
    rows = [{**vars(draw), "ahead": draw.ahead} for draw in draws]
    print(f"\n{measure.table(rows)}\n\n{verdict(draws)}")
    measure.write(options.output, rows, recipe=name, verdict=verdict(draws))


if __name__ == "__main__":
    sys.exit(cli.run(_main))
