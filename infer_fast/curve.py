"""A curve, not a point: accuracy against bytes, of the distilled set and of random real images.

Used by python -m infer_fast.validate --budgets 25% 50% 100% 200%. At each budget the set is filled anew with base
images by its recipe, its compensators stay, and all points' students get as many updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from infer_fast.data.budget import Storage, filled, unlabelled
from infer_fast.data.card import Row
from infer_fast.data.images import smallest_class
from infer_fast.errors import InferFastError
from infer_fast.extras import require
from infer_fast.files import write_atomically, write_json
from infer_fast.relabel import relabel
from infer_fast.settings import Recipe
from infer_fast.students.candidates import Evaluation
from infer_fast.synthesis.base import drawn

Judge = Callable[[Evaluation], list[Row]]


def shares_of(words: Sequence[str]) -> list[float]:
    """Budgets in percent ("50%", "50") as shares. Raises InferFastError for what is none."""
    shares = []
    for word in words:
        try:
            share = float(word.removesuffix("%")) / 100
        except ValueError:
            share = 0.0
        if not 0 < share < float("inf"):
            raise InferFastError(f"--budgets {word}: a budget is a share of the set's own, such as 50%.")
        shares.append(share)
    return shares


def points(evaluation: Evaluation, recipe: Recipe, shares: Sequence[float], judge: Judge) -> dict[int, list[Row]]:
    """Each budget's rows, by its bytes; judge: infer_fast.validate.validate.

    Raises InferFastError for a set whose budget does not count bytes, and a budget that holds too little.
    """
    distilled, budget = evaluation.distilled, evaluation.budget
    if budget is None or distilled.coded is None:
        raise InferFastError("--budgets needs a set whose budget counts bytes (distill --budget bytes).")
    dataset, settings = evaluation.dataset, evaluation.settings
    updates = evaluation.updates_per_epoch * settings.epochs
    added = distilled.stored_compensators
    teachers, compensators, _, side, _ = (0, 0, 0, 0, 0) if added is None else added.values.shape
    storage = Storage(distilled.coded.codec, distilled.label_store, teachers, compensators, side)
    draw, most = drawn(dataset, recipe), smallest_class(dataset)
    found = {}
    for share in shares:
        base = filled(draw, most, storage, int(share * budget))
        own = unlabelled(base, added, distilled.label_store, dataset)
        there = replace(
            evaluation,
            distilled=relabel(own, evaluation.teachers),
            budget=int(share * budget),
            compare="all" if evaluation.compare == "all" else "random",
        )
        epochs = max(1, round(updates / there.updates_per_epoch))
        found[int(share * budget)] = judge(replace(there, settings=replace(settings, epochs=epochs)))
    return found


def write_curve(found: dict[int, list[Row]], folder: Path) -> Path:
    """Writes curve.json and curve.png into `folder`; the picture's path."""
    made = [{"budget": budget, "rows": [asdict(row) for row in rows]} for budget, rows in found.items()]
    write_json(folder / "curve.json", {"points": made})
    path = folder / "curve.png"
    write_atomically(path, lambda temporary: _picture(found, temporary))
    return path


def check_curve(words: Sequence[str]) -> list[float]:
    """The budgets' shares, and whether they can be drawn: before the work. Raises InferFastError."""
    require("matplotlib", "--budgets")
    return shares_of(words)


def _picture(found: dict[int, list[Row]], path: Path) -> None:
    """Mean accuracy against the budget, one line for each row, with bars of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    budgets = sorted(found)
    lines: dict[str, list[tuple[int, Row]]] = {}
    for budget in budgets:
        for row in found[budget]:
            lines.setdefault(f"{row.network}: {row.trained_on}, {row.labels}", []).append((budget, row))
    figure, axis = plt.subplots(figsize=(8, 5))
    for name, line in lines.items():
        axis.errorbar(
            [budget for budget, _ in line],
            [row.mean for _, row in line],
            yerr=[row.std for _, row in line],
            marker="o",
            capsize=3,
            label=name,
        )
    axis.set_xscale("log")
    axis.set_xlabel("bytes of the whole file")
    axis.set_ylabel("test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
