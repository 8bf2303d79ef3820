"""Stage 4: students trained on the distilled set, and the honest table of what else the same bytes could have bought.

    python -m infer_fast.validate --syn-data-path runs/digits
    python -m infer_fast.validate --syn-data-path runs/fashion-mnist --data-path DIR --networks resnet18 --seeds 5
    python -m infer_fast.validate --syn-data-path IMAGES --dataset cifar10 --arch-name resnet18 --arch-path resnet18.pth

Every row trains the same student from the same seeds with the same number of updates and the same schedule; only the
training instances and their labels differ.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from infer_fast import cli
from infer_fast.data.augment import augmentation_of
from infer_fast.data.distilled import CARD, DistilledSet
from infer_fast.data.fkd import epoch_bytes, replay
from infer_fast.data.images import ImageDataset, Split, draw_of_each_class
from infer_fast.data.loader import choose_loader, feed
from infer_fast.data.sets import FileSet, ResidentSet, resident_distilled, resident_split, training_set
from infer_fast.errors import InferFastError
from infer_fast.files import read_json, write_json, write_text
from infer_fast.judged import Compare, Judged, ValidateOptions, what_is_judged
from infer_fast.models import build
from infer_fast.models.checkpoint import recorded
from infer_fast.models.train import Schedule, accuracy, fit, hard_loss, predict, soft_loss
from infer_fast.outlook import weights
from infer_fast.progress import Stage, stage
from infer_fast.recipes import Recipe, StudentSettings, student_of
from infer_fast.relabel import dynamic_labels, label_images, record_labels
from infer_fast.squeeze import Teacher
from infer_fast.tsne import draw

MEASUREMENTS = 5  # accuracies taken along a student's training, the last one at its end
SOFT, DYNAMIC, HARD, EVERY_CROP = "soft labels", "dynamic labels", "hard labels", "labels of every crop (FKD)"
SCHEDULES = {"cosineannealinglr": "cosine", "steplr": "step", "exponentiallr": "exponential"}
REPLAYED_BY = {"auto": None, "fused": None, "torch": "reference"}  # compose's backend for stored crops


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
    source: Callable[[int], ResidentSet | FileSet]
    label: Callable[[torch.Tensor], torch.Tensor] | None = None
    """makes the labels of every batch while the student trains (none where they are static, or replayed)"""
    teachers: tuple[str, ...] = ()
    """hashes of the teachers that label every crop"""
    divided: int = 1
    """what the epochs are divided by"""
    replayed: Path | None = None
    """the folder of stored labels of every crop"""


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
    labels_folder: Path | None = None,
) -> list[Row]:
    """The table for every network in `settings`: students on the distilled set and on what `compare` names.

    dataset: on the device; teachers label the random real images (needed unless compare is none); ipc: images per
    class of the budget, the number of random real images; store: a JSON file of finished students, read and extended;
    labels_folder: where the labels of every crop are kept, made if they are not there (for the labels fkd).
    Raises InferFastError for fewer than 1 seed, or a class with fewer than ipc training images.
    """
    if seeds < 1:
        raise InferFastError(f"{seeds} seeds were asked for: at least 1 is needed.")
    kept = None
    if "fkd" in settings.labels:
        kept = _stored_labels(distilled, teachers, settings, labels_folder, seed)
    candidates = _candidates(distilled, dataset, teachers, ipc, compare, settings, kept)
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


def _stored_labels(
    distilled: DistilledSet, teachers: list[Teacher], settings: StudentSettings, folder: Path | None, seed: int
) -> Path:
    """The folder of the labels of every crop, written now if they are not there."""
    if folder is None:
        raise InferFastError("The labels fkd are kept on the disk: validate needs a labels_folder for them.")
    if settings.loader == "dali":
        raise InferFastError("The labels fkd are those of stored crops, and dali draws its own: choose --loader fused.")
    return record_labels(distilled, teachers, settings, folder, seed)


def table(rows: list[Row], whole_bytes: int) -> str:
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


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.3g} %)" if whole else ""


def _candidates(
    distilled: DistilledSet,
    dataset: ImageDataset,
    teachers: list[Teacher],
    ipc: int,
    compare: Compare,
    settings: StudentSettings,
    kept: Path | None = None,
) -> list[Candidate]:
    device, c = dataset.device, len(dataset.classes)
    per_image = 3 * dataset.size[0] * dataset.size[1]
    label = 1 if c <= 256 else 2  # bytes of a hard label

    def distilled_set(soft: bool) -> Candidate:
        labels, size = (SOFT, distilled.label_bytes) if soft else (HARD, label * len(distilled))
        resident = resident_distilled(distilled, soft=soft).to(device)
        return Candidate("distilled", labels, distilled.image_bytes, size, lambda _: resident)

    def random_real(soft: bool) -> Candidate:
        labels, size = (SOFT, 2 * c) if soft else (HARD, label)
        image_bytes = ipc * c * per_image
        judges = teachers if soft else None
        return Candidate(
            "random real", labels, image_bytes, ipc * c * size, lambda s: _random_real(dataset, ipc, s, judges)
        )

    def whole_dataset() -> Candidate:
        source = training_set(dataset.train, c, dataset.pixels)
        return Candidate("whole dataset", HARD, dataset.train.nbytes, label * len(dataset.train), lambda _: source)

    label_batch = dynamic_labels(teachers, settings.precision) if set(settings.labels) & {"dynamic", "fkd"} else None
    hashes = tuple(t.sha256 for t in teachers)

    def with_soft_labels(candidate: Candidate, instances: int, replayed: Path | None) -> list[Candidate]:
        """The candidate once for each kind of soft labels that the settings ask for.

        Labels of every crop are replayed where they are stored; elsewhere the teachers give the same ones on the spot.
        """
        made = {"static": candidate}
        if label_batch is not None:
            weight = sum(t.weight_bytes for t in teachers)
            divided = len(teachers) + 1
            made["dynamic"] = replace(
                candidate, labels=DYNAMIC, label_bytes=weight, label=label_batch, teachers=hashes, divided=divided
            )
            updates = settings.epochs * -(-len(distilled) // settings.batch_size)  # every candidate's
            epochs = -(-updates // -(-instances // settings.batch_size))
            stored = epochs * epoch_bytes(instances, settings.batch_size, c, augmentation_of(settings))
            on_the_spot = label_batch if replayed is None else None
            made["fkd"] = replace(
                candidate, labels=EVERY_CROP, label_bytes=stored, label=on_the_spot, teachers=hashes, replayed=replayed
            )
        return [made[kind] for kind in dict.fromkeys(settings.labels)]

    ours = with_soft_labels(distilled_set(True), len(distilled), kept)
    real = with_soft_labels(random_real(True), ipc * c, None)
    rows = {
        "none": ours,
        "random": [*ours, *real],
        "all": [*ours, distilled_set(False), *real, random_real(False), whole_dataset()],
    }
    return rows[compare]


def _updates(candidate: Candidate, settings: StudentSettings, per_epoch: int) -> int:
    return per_epoch * max(1, settings.epochs // candidate.divided)


def _random_real(dataset: ImageDataset, ipc: int, seed: int, teachers: list[Teacher] | None) -> ResidentSet:
    """ipc random training images of every class, drawn anew for each seed."""
    positions = draw_of_each_class(dataset, ipc, torch.Generator().manual_seed(seed)).flatten()
    split = Split(dataset.train.at(positions), dataset.train.labels[positions.to(dataset.device)])
    logits = None if teachers is None else label_images(split.images, dataset.pixels, teachers)
    return resident_split(split, len(dataset.classes), dataset.pixels, logits)


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
    source = candidate.source(seed)
    key = _key(candidate, source, dataset, network, settings, seed)
    result = results.get(key)
    if result is None:
        _, measured = _train(candidate, source, dataset, network, settings, per_epoch, seed, running)
        best = max(top1 for top1, _ in measured)
        result = {"instances": len(source), "last": measured[-1][0], "best": best, "top5": measured[-1][1]}
        results.put(key, result)
    else:
        running.advance(_updates(candidate, settings, per_epoch))
    return result


def _train(
    candidate: Candidate,
    source: ResidentSet | FileSet,
    dataset: ImageDataset,
    name: str,
    settings: StudentSettings,
    per_epoch: int,
    seed: int,
    running: Stage,
) -> tuple[nn.Module, list[tuple[float, float]]]:
    """A trained student, and its top-1 and top-5 test accuracies in percent along the way, the last ones at its end."""
    updates = _updates(candidate, settings, per_epoch)
    network = build(name, len(dataset.classes), dataset.size, seed=seed).to(dataset.device)
    moments = {-(-updates * part // MEASUREMENTS) for part in range(1, MEASUREMENTS + 1)}
    measured = []

    def measure(done: int) -> None:
        running.advance()
        if done in moments:
            test = dataset.test
            logits = predict(network, lambda p: dataset.pixels.normalise(test.at(p)), len(test))
            measured.append((accuracy(logits, test.labels), accuracy(logits, test.labels, top=5)))

    if candidate.replayed is not None:
        stream, make = replay(candidate.replayed, source, updates, REPLAYED_BY[settings.loader])
    else:
        stream, make = feed(
            settings.loader,
            source,
            batch_size=settings.batch_size,
            updates=updates,
            augmentation=augmentation_of(settings),
            generator=torch.Generator().manual_seed(seed),
            workers=settings.workers,
        )
    schedule = _schedule(settings, updates, per_epoch)
    loss = soft_loss(settings.temperature) if source.soft else hard_loss
    how = {"precision": settings.precision, "engine": settings.engine}
    fit(network, stream, loss, schedule, make=make, label=candidate.label, on_update=measure, **how)
    return network, measured


def _schedule(settings: StudentSettings, updates: int, per_epoch: int) -> Schedule:
    """The optimiser and schedule that the settings ask for: a momentum asks for SGD."""
    chosen = settings.optimizer
    if chosen == "auto":
        chosen = "adamw" if settings.momentum is None else "sgd"
    kind = SCHEDULES[settings.lr_scheduler]
    return Schedule(
        chosen,
        settings.lr,
        settings.weight_decay,
        0.9 if settings.momentum is None else settings.momentum,
        updates,
        per_epoch,
        settings.lr_warmup_epochs,
        settings.lr_warmup_decay,
        settings.lr_warmup_method,
        "linear" if kind == "cosine" and not settings.cos else kind,
        settings.lr_step_size,
        settings.lr_gamma,
    )


def tsne(judged: Judged, settings: StudentSettings, path: Path) -> Path:
    """Trains a student on the distilled set and one on random real images of its bytes, and draws what both see."""
    settings = replace(settings, labels=("static",))
    candidates = _candidates(judged.distilled, judged.dataset, judged.teachers, judged.ipc, "all", settings)
    pair = [next(c for c in candidates if c.trained_on == kind) for kind in ("distilled", "random real")]
    per_epoch = -(-len(judged.distilled) // settings.batch_size)
    networks = {}
    with stage("t-SNE", sum(_updates(c, settings, per_epoch) for c in pair), "updates") as running:
        for candidate in pair:
            source = candidate.source(judged.seed)
            network, measured = _train(
                candidate, source, judged.dataset, settings.networks[0], settings, per_epoch, judged.seed, running
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
    source: ResidentSet | FileSet,
    dataset: ImageDataset,
    network: str,
    settings: StudentSettings,
    seed: int,
) -> str:
    """What a student's accuracy depends on, as a hash."""
    digest = hashlib.sha256(dataset.fingerprint.encode())
    if isinstance(source, ResidentSet):  # else the dataset's fingerprint says it all
        tensors = [source.base, source.base_index, source.compensator_index, source.targets]
        for tensor in [*tensors, *(source.compensators or ())]:
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    training = {k: v for k, v in asdict(settings).items() if k not in ("networks", "labels")}
    training["loader"] = choose_loader(settings.loader, source)
    digest.update(json.dumps([network, training, candidate.labels, seed], sort_keys=True).encode())
    digest.update("".join(candidate.teachers).encode())
    return digest.hexdigest()[:24]


def recipe_of(card: dict) -> Recipe:
    """The recipe stored in a distilled set's card."""
    stored = card["recipe"]
    kept = {k: stored[k] for k in ("dataset", "ipc", "seeds", "compare")}
    return replace(Recipe(), **kept, student=student_of(stored))


def _main(args: list[str]) -> None:
    folder = Path(cli.value_of(args, "--syn-data-path", "--train-dir") or "runs/digits")
    card = read_json(folder / CARD) if (folder / CARD).is_file() else None
    recipe = Recipe() if card is None else recipe_of(card)
    default = ValidateOptions(folder, seeds=recipe.seeds, compare=recipe.compare, student=recipe.student)
    options = cli.parse(
        ValidateOptions, default, args, "python -m infer_fast.validate", "Students on a distilled set, and the table."
    )
    if options.check_ckpt is not None:
        print(recorded(options.check_ckpt))
        return
    check_wandb(options.wandb_name)
    judged = what_is_judged(options, recipe)
    output = options.output_dir or options.syn_data_path
    if not options.resume:
        (output / "students.json").unlink(missing_ok=True)
    rows = validate(
        judged.distilled,
        judged.dataset,
        judged.teachers,
        options.student,
        ipc=judged.ipc,
        compare=judged.compare,
        seeds=options.seeds,
        seed=judged.seed,
        store=output / "students.json",
        labels_folder=judged.folder,
    )
    text = table(rows, judged.dataset.train.nbytes)
    write_results(output, text, rows)
    print(text)
    if options.wandb_name is not None:
        log_to_wandb(rows, options.wandb_name, options.wandb_project, options.wandb_api_key)
    if options.tsne:
        print(f"\n{tsne(judged, options.student, output / 'tsne.png')}")
    print("\n" + weights(judged.distilled, judged.teachers, options.student, judged.dataset.train.nbytes))


def write_results(folder: Path, text: str, rows: list[Row]) -> None:
    """Writes table.md and results.json into `folder`."""
    write_text(folder / "table.md", text + "\n")
    write_json(folder / "results.json", {"rows": [asdict(r) for r in rows]})


def check_wandb(name: str | None) -> None:
    """Raises InferFastError if a run of Weights & Biases is asked for and its package is not there: before the work."""
    if name is not None and importlib.util.find_spec("wandb") is None:
        raise InferFastError("--wandb-name needs the package wandb: pip install wandb, or leave it out.")


def log_to_wandb(rows: list[Row], name: str, project: str = "infer_fast", key: str | None = None) -> None:
    """Each row's accuracies as one step of a Weights & Biases run."""
    import wandb

    if key is not None:
        wandb.login(key=key)
    wandb.init(project=project, name=name)
    for row in rows:
        wandb.log({**asdict(row), "accuracy": row.mean, "std": row.std})
    wandb.finish()


if __name__ == "__main__":
    sys.exit(cli.run(_main))
