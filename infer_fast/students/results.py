"""How good students got: kept one by one, shown as a table, logged."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from infer_fast.data.card import Row
from infer_fast.errors import InferFastError, InferFastWarning
from infer_fast.extras import require
from infer_fast.files import read_json_as, write_json, write_text
from infer_fast.students.candidates import DISTILLED, LABELS, RANDOM_CODED, RANDOM_REAL, WHOLE, Store


@dataclass(frozen=True)
class Measured:
    """A finished student: the training instances it had; test accuracy in percent after the last epoch, the best along
    the way, and top-5 after the last epoch."""

    instances: int
    last: float
    best: float
    top5: float


class ResultStore:
    """Finished students, each in a JSON file of its own: an interrupted validation goes on where it stopped, and two
    at once lose nothing of each other's."""

    def __init__(self, store: Store | None):
        self.store = store
        self.values: dict[str, Measured] = {}

    def get(self, key: str) -> Measured | None:
        """The student of that key, or None; one whose file is damaged is trained again, which is said."""
        if key not in self.values and self.store is not None and self.store.resume:
            path = self.store.path(key)
            try:
                if path.is_file():
                    self.values[key] = read_json_as(path, Measured)
            except InferFastError as error:
                warnings.warn(f"{error} The student is trained again.", InferFastWarning, 2)
        return self.values.get(key)

    def put(self, key: str, value: Measured) -> None:
        """Keeps a student, on the disk too if the store keeps any."""
        self.values[key] = value
        if self.store is not None and self.store.keep:
            write_json(self.store.path(key), asdict(value))


def table(rows: Sequence[Row], whole_bytes: int) -> str:
    """The rows as a Markdown table; whole_bytes: the training split's images, what shares are taken of (0: unknown)."""
    seeds = len(rows[0].last)
    head = [
        "| student | trained on | labels | instances | updates | images, bytes | labels, bytes "
        f"| accuracy % (mean ± std, n={seeds}) | best % | top-5 % |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    body = [
        f"| {r.network} | {r.trained_on} | {r.labels} | {r.instances:,} | {r.updates:,} "
        f"| {r.image_bytes:,}{_share(r.image_bytes, whole_bytes)} | {r.label_bytes:,} "
        f"| {r.mean:.2f} ± {r.std:.2f} | {statistics.fmean(r.best):.2f} | {statistics.fmean(r.top5):.2f} |"
        for r in rows
    ]
    return "\n".join(head + body)


def verdict(rows: Sequence[Row]) -> str:
    """What the table says, in words: for each student, how far the distilled set is ahead of random real images.

    Differences of means in points, with their standard error. HLR and IOR are DD-Ranking's (arXiv 2505.13300): what the
    whole dataset is ahead of the distilled set with hard labels, and that with any labels ahead of random real images.
    """
    networks = dict.fromkeys(row.network for row in rows)
    return "\n".join(line for network in networks if (line := _verdict(network, rows)))


def _verdict(network: str, rows: Sequence[Row]) -> str:
    own = {(row.trained_on, row.labels): row for row in rows if row.network == network}
    said = []
    for (trained_on, labels), row in own.items():
        random = next((r for w in (RANDOM_CODED, RANDOM_REAL) if (r := own.get((w, labels))) is not None), None)
        if trained_on == DISTILLED and random is not None:
            said.append(f"{_distance(row, random)} {random.trained_on} ({labels})")
    if not said:
        return ""
    measures = []
    hard, whole = own.get((DISTILLED, LABELS["hard"])), own.get((WHOLE, LABELS["hard"]))
    if hard is not None and whole is not None:
        measures.append(f"HLR {whole.mean - hard.mean:.2f}")
    best, raw = ([r.mean for (w, _), r in own.items() if w == which] for which in (DISTILLED, RANDOM_REAL))
    if raw:
        measures.append(f"IOR {max(best) - max(raw):.2f}")
    n = len(rows[0].last)
    measured = f"; {', '.join(measures)}" if measures else ""
    return f"{network}, n={n}: the distilled set is {', '.join(said)}{measured}."


def _distance(row: Row, other: Row) -> str:
    """How far the first is from the second: points, their standard error (none for one student), and which way."""
    points, students = row.mean - other.mean, len(row.last)
    error = f" ± {math.sqrt((row.std**2 + other.std**2) / students):.2f}" if students > 1 else ""
    return f"{abs(points):.2f}{error} points {'ahead of' if points >= 0 else 'behind'}"


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.3g} %)" if whole else ""


def write_results(folder: Path, text: str, rows: Sequence[Row]) -> None:
    """Writes table.md and results.json into `folder`."""
    write_text(folder / "table.md", text + "\n")
    write_json(folder / "results.json", {"rows": [asdict(r) for r in rows]})


@dataclass(frozen=True)
class WandbRun:
    """A run of Weights & Biases: its name (None: nothing is logged), its project, the key to log in with."""

    name: str | None = None
    project: str = "infer_fast"
    key: str | None = None

    def check(self) -> None:
        """Raises InferFastError if a run is asked for and the package is not there: before the work."""
        if self.name is not None:
            require("wandb", "--wandb-name")

    def log(self, rows: Sequence[Row]) -> None:
        """Each row's accuracies as one step of the run."""
        if self.name is None:
            return
        import wandb

        if self.key is not None:
            wandb.login(key=self.key)
        wandb.init(project=self.project, name=self.name)
        for row in rows:
            wandb.log({**asdict(row), "accuracy": row.mean, "std": row.std})
        wandb.finish()
