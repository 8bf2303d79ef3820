"""Stage 4: students trained on the distilled set, and the honest table of what else the same bytes could have bought.

    python -m infer_fast.validate --syn-data-path runs/digits
    python -m infer_fast.validate --syn-data-path runs/fashion-mnist --data-path DIR --networks resnet18 --seeds 5
    python -m infer_fast.validate --syn-data-path IMAGES --dataset cifar10 --arch-name resnet18 --arch-path resnet18.pth

Every row trains the same student from the same seeds with the same number of updates and the same schedule; only the
training instances and their labels differ.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn
from tyro.conf import arg

from infer_fast import cli
from infer_fast.data.distilled import CARD, TENSORS, DistilledSet, load
from infer_fast.data.files import read_json, write_json
from infer_fast.data.images import ImageDataset, Split, draw_of_each_class, normalise
from infer_fast.data.loader import Augmentation, ResidentSet, choose_loader, feed, resident_distilled, resident_split
from infer_fast.data.sources import load_dataset, read_image_set
from infer_fast.errors import InferFastError
from infer_fast.models import build
from infer_fast.models.train import Schedule, accuracy, fit, hard_loss, predict, soft_loss
from infer_fast.outlook import weights
from infer_fast.progress import Stage, stage
from infer_fast.recipes import Recipe, SqueezeSettings, StudentSettings
from infer_fast.relabel import dynamic_labels, label_images, relabel, teachers_of
from infer_fast.squeeze import Teacher, squeeze
from infer_fast.tsne import draw

MEASUREMENTS = 5  # accuracies taken along a student's training, the last one at its end
SOFT, DYNAMIC, HARD = "soft labels", "dynamic labels", "hard labels"
SCHEDULES = {"cosineannealinglr": "cosine", "steplr": "step", "exponentiallr": "exponential"}
Compare = Literal["none", "random", "all"]


@dataclass(frozen=True)
class Row:
    """One row of the table: what a student was trained on and how good it got.

    instances: training instances; updates: training steps; image_bytes, label_bytes: what the set weighs; last: test
    accuracy in percent after the last epoch, one per seed; best: the highest of the MEASUREMENTS along the way; top5:
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
class Candidate:
    """Something to train a student on: a name, its labels, its bytes, and the set itself for a given seed."""

    trained_on: str
    labels: str
    image_bytes: int
    label_bytes: int
    resident: Callable[[int], ResidentSet]
    label: Callable[[torch.Tensor], torch.Tensor] | None = None
    """makes the labels of every batch while the student trains (dynamic labels)"""
    teachers: tuple[str, ...] = ()
    """hashes of the teachers that label dynamically, for whose number the epochs are divided"""


class ResultStore:
    """Finished students' accuracies in one JSON file, so that an interrupted validation goes on where it stopped."""

    def __init__(self, path: Path | None):
        self.path = path
        self.values: dict[str, dict] = read_json(path) if path is not None and path.is_file() else {}

    def get(self, key: str) -> dict | None:
        return self.values.get(key)

    def put(self, key: str, value: dict) -> None:
        self.values[key] = value
        if self.path is not None:
            write_json(self.path, self.values)


def validate(
    distilled: DistilledSet,
    dataset: ImageDataset,
    teachers: list[Teacher],
    settings: StudentSettings,
    *,
    ipc: int,
    compare: Compare = "random",
    seeds: int = 3,
    seed: int = 0,
    store: Path | None = None,
) -> list[Row]:
    """The table for every network in `settings`: students on the distilled set and on what `compare` names.

    dataset: on the device; teachers label the random real images (needed unless compare is none); ipc: images per
    class of the budget, the number of random real images; store: a JSON file of finished students, read and extended.
    Raises InferFastError for fewer than 1 seed, or a class with fewer than ipc training images.
    """
    if seeds < 1:
        raise InferFastError(f"{seeds} seeds were asked for: at least 1 is needed.")
    candidates = _candidates(distilled, dataset, teachers, ipc, compare, settings)
    per_epoch = -(-len(distilled) // settings.batch_size)
    results = ResultStore(store)
    rows = []
    total = len(settings.networks) * seeds * sum(_updates(c, settings, per_epoch) for c in candidates)
    with stage("validate", total, "updates") as running:
        for network in settings.networks:
            for candidate in candidates:
                each = []
                for s in range(seed, seed + seeds):
                    each.append(_student(candidate, dataset, network, settings, per_epoch, s, results, running))
                rows.append(_row(network, candidate, each, _updates(candidate, settings, per_epoch)))
    return rows


def table(rows: list[Row], whole_bytes: int) -> str:
    """The rows as a Markdown table; whole_bytes: the training split's images, what shares are taken of."""
    seeds = len(rows[0].last)
    head = [
        "| student | trained on | labels | instances | updates | images, bytes | labels, bytes "
        f"| accuracy % (mean ± std, n={seeds}) | best % | top-5 % |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    body = [
        f"| {r.network} | {r.trained_on} | {r.labels} | {r.instances:,} | {r.updates:,} "
        f"| {r.image_bytes:,} ({100 * r.image_bytes / whole_bytes:.3g} %) | {r.label_bytes:,} "
        f"| {r.mean:.2f} ± {r.std:.2f} | {statistics.fmean(r.best):.2f} | {statistics.fmean(r.top5):.2f} |"
        for r in rows
    ]
    return "\n".join(head + body)


def _candidates(
    distilled: DistilledSet,
    dataset: ImageDataset,
    teachers: list[Teacher],
    ipc: int,
    compare: Compare,
    settings: StudentSettings,
) -> list[Candidate]:
    device, c = dataset.train.images.device, len(dataset.classes)
    label = 1 if c <= 256 else 2  # bytes of a hard label

    def distilled_set(soft: bool) -> Candidate:
        labels, size = (SOFT, distilled.label_bytes) if soft else (HARD, label * len(distilled))
        resident = resident_distilled(distilled, soft=soft).to(device)
        return Candidate("distilled", labels, distilled.image_bytes, size, lambda _: resident)

    def random_real(soft: bool) -> Candidate:
        labels, size = (SOFT, 2 * c) if soft else (HARD, label)
        image_bytes = ipc * c * dataset.train.images[0].nbytes
        judges = teachers if soft else None
        return Candidate(
            "random real", labels, image_bytes, ipc * c * size, lambda s: _random_real(dataset, ipc, s, judges)
        )

    def whole_dataset() -> Candidate:
        resident = resident_split(dataset.train, c, dataset.mean, dataset.std)
        return Candidate(
            "whole dataset", HARD, dataset.train.images.nbytes, label * len(dataset.train), lambda _: resident
        )

    label_batch = dynamic_labels(teachers, settings.precision) if "dynamic" in settings.labels else None

    def with_soft_labels(candidate: Candidate) -> list[Candidate]:
        """The candidate itself for static labels, and once more for dynamic ones, as the settings ask."""
        made = {"static": candidate}
        if label_batch is not None:
            made["dynamic"] = replace(
                candidate,
                labels=DYNAMIC,
                label_bytes=sum(t.weight_bytes for t in teachers),
                label=label_batch,
                teachers=tuple(t.sha256 for t in teachers),
            )
        return [made[kind] for kind in dict.fromkeys(settings.labels)]

    ours, real = (with_soft_labels(made) for made in (distilled_set(True), random_real(True)))
    rows = {
        "none": ours,
        "random": [*ours, *real],
        "all": [*ours, distilled_set(False), *real, random_real(False), whole_dataset()],
    }
    return rows[compare]


def _updates(candidate: Candidate, settings: StudentSettings, per_epoch: int) -> int:
    return per_epoch * max(1, settings.epochs // (len(candidate.teachers) + 1))


def _random_real(dataset: ImageDataset, ipc: int, seed: int, teachers: list[Teacher] | None) -> ResidentSet:
    """ipc random training images of every class, drawn anew for each seed."""
    positions = draw_of_each_class(dataset, ipc, torch.Generator().manual_seed(seed)).flatten()
    positions = positions.to(dataset.train.images.device)
    split = Split(dataset.train.images[positions], dataset.train.labels[positions])
    logits = None if teachers is None else label_images(split.images, dataset.mean, dataset.std, teachers)
    return resident_split(split, len(dataset.classes), dataset.mean, dataset.std, logits)


def _student(
    candidate: Candidate,
    dataset: ImageDataset,
    network: str,
    settings: StudentSettings,
    per_epoch: int,
    seed: int,
    results: ResultStore,
    running: Stage,
) -> dict:
    """{"instances", "last", "best", "top5"} of one student, from the store if it is there."""
    resident = candidate.resident(seed)
    key = _key(candidate, resident, dataset, network, settings, seed)
    result = results.get(key)
    if result is None:
        _, measured = _train(candidate, resident, dataset, network, settings, per_epoch, seed, running)
        best = max(top1 for top1, _ in measured)
        result = {"instances": len(resident), "last": measured[-1][0], "best": best, "top5": measured[-1][1]}
        results.put(key, result)
    else:
        running.advance(_updates(candidate, settings, per_epoch))
    return result


def _train(
    candidate: Candidate,
    resident: ResidentSet,
    dataset: ImageDataset,
    name: str,
    settings: StudentSettings,
    per_epoch: int,
    seed: int,
    running: Stage,
) -> tuple[nn.Module, list[tuple[float, float]]]:
    """A trained student, and its top-1 and top-5 test accuracies in percent along the way, the last ones at its end."""
    updates = _updates(candidate, settings, per_epoch)
    device = dataset.train.images.device
    network = build(name, len(dataset.classes), dataset.size, seed=seed).to(device)
    moments = {-(-updates * part // MEASUREMENTS) for part in range(1, MEASUREMENTS + 1)}
    measured = []

    def measure(done: int) -> None:
        running.advance()
        if done in moments:
            test = dataset.test
            logits = predict(network, lambda p: normalise(test.images[p], dataset.mean, dataset.std), len(test))
            measured.append((accuracy(logits, test.labels), accuracy(logits, test.labels, top=5)))

    stream, make = feed(
        settings.loader,
        resident,
        batch_size=settings.batch_size,
        updates=updates,
        augmentation=Augmentation(settings.padding, settings.flip, settings.mix_type, settings.mix_alpha),
        generator=torch.Generator().manual_seed(seed),
        workers=settings.workers,
    )
    schedule = Schedule(
        settings.optimizer,
        settings.lr,
        settings.weight_decay,
        settings.momentum,
        updates,
        per_epoch,
        settings.lr_warmup_epochs,
        settings.lr_warmup_decay,
        settings.lr_warmup_method,
        SCHEDULES[settings.lr_scheduler],
        settings.lr_step_size,
        settings.lr_gamma,
    )
    loss = soft_loss(settings.temperature) if resident.soft else hard_loss
    how = {"precision": settings.precision, "engine": settings.engine}
    fit(network, stream, loss, schedule, make=make, label=candidate.label, on_update=measure, **how)
    return network, measured


def tsne(judged: Judged, settings: StudentSettings, path: Path) -> Path:
    """Trains a student on the distilled set and one on random real images of its bytes, and draws what both see."""
    candidates = _candidates(judged.distilled, judged.dataset, judged.teachers, judged.ipc, "all", settings)
    pair = [next(c for c in candidates if c.trained_on == kind) for kind in ("distilled", "random real")]
    per_epoch = -(-len(judged.distilled) // settings.batch_size)
    networks = {}
    with stage("t-SNE", sum(_updates(c, settings, per_epoch) for c in pair), "updates") as running:
        for candidate in pair:
            resident = candidate.resident(judged.seed)
            network, measured = _train(
                candidate, resident, judged.dataset, settings.networks[0], settings, per_epoch, judged.seed, running
            )
            networks[f"trained on {candidate.trained_on}, {candidate.labels}: {measured[-1][0]:.1f} %"] = network
    return draw(networks, judged.dataset, path, judged.seed)


def _row(network: str, candidate: Candidate, each: list[dict], updates: int) -> Row:
    return Row(
        network,
        candidate.trained_on,
        candidate.labels,
        each[0]["instances"],
        updates,
        candidate.image_bytes,
        candidate.label_bytes,
        tuple(e["last"] for e in each),
        tuple(e["best"] for e in each),
        tuple(e["top5"] for e in each),
    )


def _key(
    candidate: Candidate,
    resident: ResidentSet,
    dataset: ImageDataset,
    network: str,
    settings: StudentSettings,
    seed: int,
) -> str:
    """What a student's accuracy depends on, as a hash."""
    digest = hashlib.sha256(dataset.fingerprint.encode())
    tensors = [resident.base, resident.base_index, resident.compensator_index, resident.targets]
    for tensor in [*tensors, *(resident.compensators or ())]:
        if tensor is not None:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    training = {k: v for k, v in asdict(settings).items() if k not in ("networks", "labels")}
    training["loader"] = choose_loader(settings.loader)
    digest.update(json.dumps([network, training, candidate.labels, seed], sort_keys=True).encode())
    if candidate.label is not None:
        digest.update("".join(candidate.teachers).encode())
    return digest.hexdigest()[:24]


@dataclass(frozen=True)
class ValidateOptions:
    """Flags of python -m infer_fast.validate."""

    syn_data_path: Path
    """the distilled set's folder, or class folders of images that anyone wrote (newCCC, or named as the classes)"""
    dataset: str | None = None
    """the real dataset's name; None: the one the set was distilled from (class folders of images need it)"""
    arch_name: Annotated[tuple[str, ...], arg(aliases=["--teacher-model"])] = ()
    """teachers that label class folders of images"""
    arch_path: tuple[Path, ...] = ()
    """their checkpoints, one for each"""
    data_path: Path | None = None
    """the real dataset's folder (the test images, and what is compared)"""
    image_size: int | None = None
    """resize and centre-crop files to this many pixels squared"""
    seeds: int = 3
    """independent students per row"""
    compare: Compare = "random"
    """rows beside the distilled set's: none; random real images of the same bytes; all (and the whole dataset)"""
    tsne: bool = False
    """also draw t-SNE of a student's features, distilled-trained beside random-trained: tsne.png"""
    output_dir: Path | None = None
    """where table.md and students.json go; None: the distilled set's folder"""
    student: Annotated[StudentSettings, arg(name="")] = field(default_factory=StudentSettings)


def recipe_of(card: dict) -> Recipe:
    """The recipe stored in a distilled set's card."""
    stored = dict(card["recipe"])
    student = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["student"].items()}
    return replace(
        Recipe(), **{k: stored[k] for k in ("dataset", "ipc", "seeds", "compare")}, student=StudentSettings(**student)
    )


def _main(args: list[str]) -> None:
    folder = _folder(args)
    card = read_json(folder / CARD) if (folder / CARD).is_file() else None
    recipe = Recipe() if card is None else recipe_of(card)
    default = ValidateOptions(folder, seeds=recipe.seeds, compare=recipe.compare, student=recipe.student)
    options = cli.parse(
        ValidateOptions, default, args, "python -m infer_fast.validate", "Students on a distilled set, and the table."
    )
    judged = _images_of_others(options) if _is_image_set(folder) else _our_set(options, recipe)
    output = options.output_dir or options.syn_data_path
    rows = validate(
        judged.distilled,
        judged.dataset,
        judged.teachers,
        options.student,
        ipc=judged.ipc,
        compare=options.compare,
        seeds=options.seeds,
        seed=judged.seed,
        store=output / "students.json",
    )
    text = table(rows, judged.dataset.train.images.nbytes)
    write_results(output, text, rows)
    print(text)
    if options.tsne:
        print(f"\n{tsne(judged, options.student, output / 'tsne.png')}")
    print("\n" + weights(judged.distilled, judged.teachers, options.student.epochs, judged.dataset.train.images.nbytes))


@dataclass(frozen=True)
class Judged:
    """A distilled set, the dataset it stands for (on the device), its teachers; ipc and the first student's seed."""

    distilled: DistilledSet
    dataset: ImageDataset
    teachers: list[Teacher]
    ipc: int
    seed: int


def _is_image_set(folder: Path) -> bool:
    return folder.is_dir() and not (folder / TENSORS).exists() and any(p.is_dir() for p in folder.iterdir())


def _our_set(options: ValidateOptions, recipe: Recipe) -> Judged:
    distilled = load(options.syn_data_path)
    data = distilled.card["dataset"]
    data_path = options.data_path or (Path(data["data_path"]) if data.get("data_path") else None)
    image_size = options.image_size or data.get("image_size")
    dataset = load_dataset(options.dataset or data["name"], data_path, image_size=image_size)
    if dataset.fingerprint != data["fingerprint"]:
        raise InferFastError(
            f"{data['name']} is not the dataset this set was distilled from (its fingerprint differs)."
        )
    needed = options.compare != "none" or options.tsne or "dynamic" in options.student.labels
    teachers = teachers_of(distilled, options.syn_data_path) if needed else []
    seed = distilled.card["recipe"]["synthesis"]["seed"]
    return Judged(distilled, dataset.to(cli.device()), teachers, recipe.ipc, seed)


def _images_of_others(options: ValidateOptions) -> Judged:
    """Class folders of images, labelled by the given teachers."""
    folder = options.syn_data_path
    if options.dataset is None or not options.arch_name or len(options.arch_name) != len(options.arch_path):
        raise InferFastError(
            f"{folder} holds class folders of images: name the dataset they stand for (--dataset, --data-path) and the "
            "teachers that label them (--arch-name, and a checkpoint for each with --arch-path)."
        )
    dataset = load_dataset(options.dataset, options.data_path, image_size=options.image_size).to(cli.device())
    images = read_image_set(folder, dataset.classes, options.image_size)
    if tuple(images.shape[-2:]) != dataset.size:
        raise InferFastError(
            f"{folder} holds images of {images.shape[-1]}x{images.shape[-2]}, {dataset.name} of "
            f"{dataset.size[1]}x{dataset.size[0]}: --image-size N brings both to NxN."
        )
    kept = (options.output_dir or folder.parent) / "teachers"
    teachers = squeeze(
        dataset, options.arch_name, SqueezeSettings(), seed=0, folder=kept, checkpoints=options.arch_path
    )
    logits = torch.zeros(len(dataset.classes), images.shape[1], 1, len(dataset.classes), dtype=torch.float16)
    unlabelled = DistilledSet(images, None, logits, dataset.mean, dataset.std, dataset.classes)
    return Judged(relabel(unlabelled, teachers), dataset, teachers, images.shape[1], 0)


def write_results(folder: Path, text: str, rows: list[Row]) -> None:
    """Writes table.md and results.json into `folder`."""
    from infer_fast.data.files import write_text

    write_text(folder / "table.md", text + "\n")
    write_json(folder / "results.json", {"rows": [asdict(r) for r in rows]})


def _folder(args: list[str]) -> Path:
    """--syn-data-path's value, needed before parsing: the set's card holds the other flags' defaults."""
    for position, word in enumerate(args):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == "--syn-data-path":
            return Path(value if equals else args[position + 1] if position + 1 < len(args) else "")
    return Path("runs/digits")


if __name__ == "__main__":
    sys.exit(cli.run(_main))
