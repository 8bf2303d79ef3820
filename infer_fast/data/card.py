"""The card of a distilled set: what it is, how it was made, and how good its students got. Kept as card.json."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from infer_fast.data.pixels import Pixels
from infer_fast.files import read_json_as, write_json
from infer_fast.settings import ADDED_LATER, Recipe

CARD = "card.json"


@dataclass(frozen=True)
class DatasetCard:
    """The real dataset: what it is known by, and where its files were (None: fetched by name).

    held_out: training images that were its test images, to choose settings on (0: it was judged on its own).
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: tuple[int, int]
    training_images: int
    test_images: int
    fingerprint: str
    data_path: str | None
    val_dir: str | None
    image_size: int | None
    held_out: int = field(default=0, metadata=ADDED_LATER)

    @property
    def pixels(self) -> Pixels:
        """What its images are normalised with."""
        return Pixels(self.mean, self.std)


@dataclass(frozen=True)
class TeacherCard:
    """A teacher: its test accuracy in percent, and its file, seen from the set's folder."""

    name: str
    accuracy: float
    sha256: str
    path: str


@dataclass(frozen=True)
class ByteCard:
    """What the set weighs, in bytes; dataset: the decoded training images; file: all of distilled.safetensors, where
    the budget counts it; ratio: dataset over that, else over images."""

    images: int
    budget: int
    labels: int
    dataset: int
    ratio: float
    file: int | None = field(default=None, metadata=ADDED_LATER)


@dataclass(frozen=True)
class TaskCard:
    """One solved task, and its loss at the first and the last reading."""

    teacher: str
    index: int
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class ExecutionCard:
    """How the synthesis was run; lanes and chunks of each teacher."""

    precision: str
    engine: str
    backend: str
    device: str
    lanes: tuple[int, ...]
    chunks: tuple[int | None, ...]


@dataclass(frozen=True)
class VersionCard:
    """What made the set."""

    infer_fast: str
    torch: str
    python: str


@dataclass(frozen=True)
class Row:
    """One row of the table: what a student was trained on and how good it got.

    instances: training instances; updates: training steps; image_bytes, label_bytes: what the set weighs; last: test
    accuracy in percent after the last epoch, one per seed; best: the highest of five measurements along the way; top5:
    top-5 accuracy after the last epoch.
    """

    network: str
    trained_on: str
    labels: str
    instances: int
    updates: int
    image_bytes: int
    label_bytes: int
    last: tuple[float, ...]
    best: tuple[float, ...]
    top5: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.last)

    @property
    def std(self) -> float:
        """Sample standard deviation over the seeds (0 for one)."""
        return statistics.stdev(self.last) if len(self.last) > 1 else 0.0


@dataclass(frozen=True)
class Card:
    """What a distilled set is and how it was made: all that is needed to judge it again, or to make it again.

    k: base images per class; seconds: of each stage; table: the students' table as it was printed (None: not validated
    yet), and results, its rows; pixels: SHA-256 of the decoded base images of a coded set; sha256: of
    distilled.safetensors (none: of a set from before it was kept; two, the older first, while labels are renewed).
    """

    recipe_name: str
    recipe: Recipe
    dataset: DatasetCard
    teachers: tuple[TeacherCard, ...]
    k: int
    ipc: int
    bytes: ByteCard
    tasks: tuple[TaskCard, ...]
    how: ExecutionCard
    versions: VersionCard
    device: str
    seconds: dict[str, float]
    table: str | None = None
    results: tuple[Row, ...] = ()
    pixels: str | None = field(default=None, metadata=ADDED_LATER)
    sha256: tuple[str, ...] = field(default=(), metadata=ADDED_LATER)

    def write(self, folder: Path) -> None:
        """Writes card.json atomically. Raises DiskError when the disk is full or the folder not writable."""
        write_json(Path(folder) / CARD, asdict(self))


def read_card(folder: Path) -> Card:
    """The card of the distilled set in `folder`.

    Raises InferFastError when it is missing or damaged, or a field is missing or of another type.
    """
    return read_json_as(Path(folder) / CARD, Card)
