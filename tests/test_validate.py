"""Students and the table."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from infer_fast.data.codec import Codec, encode
from infer_fast.data.distilled import DistilledSet, load, quantise
from infer_fast.data.fkd import read_epoch
from infer_fast.data.label_store import LabelStore
from infer_fast.errors import InferFastError
from infer_fast.export import export
from infer_fast.files import read_tensors
from infer_fast.models import build
from infer_fast.models.teacher import Teacher
from infer_fast.settings import StudentSettings
from infer_fast.students import training as students
from infer_fast.students.candidates import Evaluation, Store, candidates
from infer_fast.students.labels import dynamic_labels, record_labels
from infer_fast.students.results import table, verdict
from infer_fast.validate import validate

STUDENT = StudentSettings(networks=("convnet",), epochs=10, batch_size=8, padding=0, flip=False, temperature=2.0)


@pytest.fixture
def parts(tiny_dataset, generator):
    """A distilled set of the tiny dataset (2 bases per class, 1 teacher) and that teacher, untrained."""
    base = torch.stack([tiny_dataset.train.images[tiny_dataset.train.labels == c][:2] for c in range(4)])
    compensators = quantise(0.01 * torch.randn(1, 2, 3, 8, 8, generator=generator), tiny_dataset.pixels.std)
    logits = (10 * torch.eye(4)).view(4, 1, 1, 4).expand(4, 2, 2, 4).half().contiguous()
    distilled = DistilledSet(base, compensators, logits, tiny_dataset.pixels, tiny_dataset.classes)
    teacher = Teacher("convnet", build("convnet", 4, (8, 8), seed=0).eval(), 25.0, None, "")
    return distilled, tiny_dataset, [teacher]


def rows_of(parts, settings, **options):
    """The table of a set, its dataset and its teachers: one student on the distilled set, unless told otherwise."""
    return validate(Evaluation(*parts, settings, **{"ipc": 3, "compare": "none", "seeds": 1, **options}))


def test_students_learn_from_a_good_set_and_not_from_wrong_labels(parts):
    distilled, dataset, teachers = parts
    settings = replace(STUDENT, epochs=40)
    (good,) = rows_of(parts, settings, seeds=2)
    wrong = replace(distilled, logits=distilled.logits.roll(1, dims=3))
    (bad,) = rows_of((wrong, dataset, teachers), settings, seeds=2)
    assert good.mean > 80 and bad.mean < 20
    assert len(good.last) == len(good.best) == 2 and all(b >= a for a, b in zip(good.last, good.best, strict=True))


def test_every_row_gets_the_same_updates(parts, monkeypatch):
    seen = []
    original = students.fit

    def recording(network, training, schedule, *rest):
        counted = list(training.batches)
        seen.append((len(counted), schedule))
        return original(network, replace(training, batches=iter(counted)), schedule, *rest)

    monkeypatch.setattr(students, "fit", recording)
    distilled = parts[0]
    rows = rows_of(parts, STUDENT, compare="all")
    assert [(r.trained_on, r.labels) for r in rows] == [
        ("distilled", "soft labels"), ("distilled", "hard labels"), ("random real", "soft labels"),
        ("random real", "hard labels"), ("whole dataset", "hard labels"),
    ]  # fmt: skip
    assert len(seen) == 5 and len(set(seen)) == 1 and seen[0][0] == 10 * 2
    assert [r.instances for r in rows] == [16, 16, 12, 12, 48]
    assert rows[0].image_bytes == distilled.image_bytes and rows[2].image_bytes == 3 * 4 * 192
    assert rows[0].label_bytes == 16 * 4 * 2 and rows[2].label_bytes == 12 * 4 * 2 and rows[3].label_bytes == 12


def test_seeds_and_networks_are_fixed_and_finished_students_are_not_trained_again(parts, tmp_path, monkeypatch):
    settings = replace(STUDENT, networks=("convnet", "convnet-silu"), epochs=3)
    arguments = {"compare": "random", "seeds": 2}
    first = rows_of(parts, settings, store=Store(tmp_path), **arguments)
    assert first == rows_of(parts, settings, **arguments)
    assert [r.network for r in first] == ["convnet", "convnet", "convnet-silu", "convnet-silu"]
    assert len(list(tmp_path.iterdir())) == 8
    monkeypatch.setattr(students, "fit", None)
    assert first == rows_of(parts, settings, store=Store(tmp_path), **arguments)


def test_dynamic_labels_make_rows_of_their_own_with_fewer_epochs(parts):
    teachers = parts[2]
    rows = rows_of(parts, replace(STUDENT, labels=("static", "dynamic")), compare="random")
    assert [(r.trained_on, r.labels, r.updates) for r in rows] == [
        ("distilled", "soft labels", 20), ("distilled", "dynamic labels", 10),
        ("random real", "soft labels", 20), ("random real", "dynamic labels", 10),
    ]  # fmt: skip
    weights = sum(t.nbytes for t in teachers[0].network.state_dict().values())
    assert rows[1].label_bytes == rows[3].label_bytes == weights
    (alone,) = rows_of(parts, replace(STUDENT, labels=("dynamic",)))
    assert alone == rows[1]


CHANGED = {
    "lr": 2e-3, "lr_scheduler": "steplr", "lr_warmup_epochs": 3, "weight_decay": 0.5, "optimizer": "sgd",
    "temperature": 9.0, "mix_type": "cutmix", "mix_alpha": 0.1, "padding": 2, "flip": True, "batch_size": 5,
    "epochs": 3, "crop": "resized", "cos": False, "momentum": 0.6,
}  # fmt: skip


@pytest.mark.slow
def test_every_setting_of_a_student_takes_effect(parts, monkeypatch):
    """A student ends with other weights for each setting that is changed, the schedulers' own settings included."""
    ended = []
    original = students.fit

    def recording(network, *args, **kwargs):
        original(network, *args, **kwargs)
        ended.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        return network

    monkeypatch.setattr(students, "fit", recording)
    plain = replace(STUDENT, epochs=6, mix_type="mixup", lr_step_size=2)
    stepped = replace(plain, lr_scheduler="steplr")
    warmed = replace(plain, lr_warmup_epochs=3)
    variants = [plain, *(replace(plain, **{name: value}) for name, value in CHANGED.items())]
    variants += [replace(stepped, lr_step_size=4), replace(stepped, lr_gamma=0.7), replace(warmed, lr_warmup_decay=0.5)]
    variants += [replace(warmed, lr_warmup_method="constant"), replace(plain, optimizer="sgd", momentum=0.3)]
    for settings in variants:
        rows_of(parts, settings)
    for i, one in enumerate(ended):
        assert not any(torch.equal(one, other) for other in ended[:i]), variants[i]


def test_labels_of_every_crop_are_stored_and_replayed(parts, tmp_path, monkeypatch):
    """All epochs, the teachers' own labels, nothing labelled twice; stored epochs are found again and added to."""
    distilled, _, teachers = parts
    settings = replace(STUDENT, epochs=4, labels=("static", "fkd", "dynamic"), mix_type="cutmix", crop="resized")
    options = {"compare": "random", "labels_folder": tmp_path}
    rows = rows_of(parts, settings, **options)
    assert [(r.trained_on, r.labels, r.updates) for r in rows] == [
        (kind, labels, updates)
        for kind in ("distilled", "random real")
        for labels, updates in (("soft labels", 8), ("labels of every crop (FKD)", 8), ("dynamic labels", 4))
    ]
    (kept,) = (tmp_path / "fkd").iterdir()
    stored = {path.name: path.read_bytes() for path in kept.iterdir()}
    each = 4 + 2 * 4 + 4 * 2 + 4  # position, logits, crop, partner; and for a batch its size, weight and box
    assert rows[1].label_bytes == 4 * (16 * each + 2 * (4 + 4 + 8))
    assert rows[4].label_bytes == 4 * (12 * each + 2 * (4 + 4 + 8))  # 12 instances, 2 batches of them an epoch too
    assert len(stored) == 4 and rows[1].label_bytes < sum(map(len, stored.values())) < rows[1].label_bytes + 4 * 1000
    draws = torch.cat([torch.cat([batch[-1] for batch in read_epoch(path, torch.device("cpu"))])
                       for path in sorted(kept.iterdir())])  # fmt: skip
    assert draws.shape == (4 * 16, 4)

    (kept / "epoch-0001.safetensors").unlink()
    again = replace(settings, labels=("fkd",), epochs=5)
    record_labels(distilled, teachers, again, tmp_path)
    assert {path.name: path.read_bytes() for path in kept.iterdir()}.items() >= stored.items()
    assert len(list(kept.iterdir())) == 5
    monkeypatch.setattr("infer_fast.students.labels.dynamic_labels", None)  # nothing is left to label
    assert record_labels(distilled, teachers, again, tmp_path) == kept
    for wrong, words in ((replace(again, loader="dali"), "dali draws its own"), (again, "needs a labels_folder")):
        with pytest.raises(InferFastError, match=words):
            folder = tmp_path if wrong.loader == "dali" else None
            rows_of(parts, wrong, **{**options, "labels_folder": folder})


def test_a_part_of_a_set_is_its_first_base_images_and_teachers(parts):
    distilled, _, _ = parts
    part = distilled.part(1, 1)
    assert len(part) == 4 * 2 and part.views_per_base == 2
    for c in range(4):
        for view in range(2):
            (ours, logits, label), (whole, expected, _) = part[c * 2 + view], distilled[c * 4 + view]
            assert torch.equal(ours, whole) and torch.equal(logits, expected) and label == c
    bare = distilled.part(2, 0)
    assert len(bare) == 8 and bare.compensators is None and torch.equal(bare[3][0], distilled[3 * 2][0])


def test_dynamic_labels_are_the_teachers_averaged_logits(generator):
    networks = [build("convnet", 4, (8, 8), seed=seed).eval() for seed in (0, 1)]
    images = torch.randn(5, 3, 8, 8, generator=generator)
    label = dynamic_labels([Teacher("convnet", n, 0.0, None, "") for n in networks], "float32", (8, 8))
    torch.testing.assert_close(label(images), (networks[0](images) + networks[1](images)) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_students_learn_through_every_loader(parts, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    (row,) = rows_of(parts, replace(STUDENT, epochs=30, loader=loader))
    assert row.mean > 80


def test_random_images_differ_between_seeds_and_are_ipc_per_class(parts):
    evaluation = Evaluation(*parts, STUDENT, ipc=3, compare="all")
    real = next(c for c in candidates(evaluation) if (c.trained_on, c.labels) == ("random real", "hard labels"))
    one, two = (real.source(seed) for seed in (1, 2))
    assert torch.bincount(one.targets).tolist() == [3] * 4 and not torch.equal(one.base, two.base)
    with pytest.raises(InferFastError, match="12 training images, fewer than the 13"):
        rows_of(parts, STUDENT, ipc=13, compare="random")


def test_the_table_has_mean_and_sample_deviation(parts):
    rows = rows_of(parts, replace(STUDENT, epochs=1), seeds=3)
    last = torch.tensor(rows[0].last, dtype=torch.float64)
    assert f"{last.mean():.2f} ± {last.std():.2f}" in table(rows, 1000) and "n=3" in table(rows, 1000)


@pytest.mark.slow
def test_the_command_line_on_a_finished_run(tmp_path, run_module, copied_run):
    done = run_module(
        "validate", "--syn-data-path", "runs/digits", "--compare=random", "--seeds=2", "--epochs=1",
        "--networks", "convnet-silu", "--output-dir", "out", "-T", "3", "--tsne",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tsne.png").stat().st_size > 5000
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(r["network"], r["trained_on"], len(r["last"])) for r in rows] == [
        ("convnet-silu", "distilled", 2), ("convnet-silu", "random real", 2),
    ]  # fmt: skip
    card = json.loads((copied_run / "card.json").read_text())
    (copied_run / "damaged.safetensors").write_bytes(b"damaged")
    for path, words in (
        ("damaged.safetensors", "damaged.safetensors is damaged"),
        ("../../damaged.safetensors", "names the teacher '../../damaged.safetensors', which is out of its folder"),
    ):
        card["teachers"][1]["path"] = path
        (copied_run / "card.json").write_text(json.dumps(card))
        broken = run_module("validate", "--syn-data-path", "runs/digits", "--compare=random")
        assert broken.returncode == 1 and words in broken.stderr
    assert run_module("validate", "--syn-data-path", "nowhere").returncode == 1


@pytest.mark.slow
def test_the_published_flags_of_validation(tmp_path, call_module, copied_run, monkeypatch):
    """--ipc, --M, --teacher-model, --val-dir, --no-resume, --check-ckpt, --wandb-name, relabel --fkd: each does it."""
    shared = ["validate", "--syn-data-path", "runs/digits", "--compare=none", "--seeds=1", "--epochs=1"]

    def rows(*flags):
        done = call_module(*shared, "--output-dir", "out", *flags)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "out" / "results.json").read_text())["rows"]

    assert rows()[0]["instances"] == 10 * 3 * 3
    assert rows("--ipc=2", "--M=1")[0]["instances"] == 10 * 1 * 2
    assert rows("--M=0")[0]["instances"] == 10 * 3
    kept = tmp_path / "out" / "students"
    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    rows("--M=0")
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == before and len(before) == 3
    for path in kept.iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), "last": -1.0}))
    assert rows("--M=0")[0]["last"] == [-1.0]
    assert rows("--M=0", "--no-resume")[0]["last"] != [-1.0] and len(list(kept.iterdir())) == 3

    for c in range(10):  # a held-out set of black images: every student gets 1 class of 10 right
        (tmp_path / "val" / str(c)).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "val" / str(c) / "0.png")
    assert rows("--val-dir", "val")[0]["last"] == [10.0]

    teacher = json.loads((copied_run / "card.json").read_text())["teachers"][1]
    one = call_module(*shared, "--output-dir", "out", "--teacher-model", teacher["name"])
    assert one.returncode == 0 and "relabel: 1/1 teachers" in one.stderr
    checked = call_module("validate", "--check-ckpt", f"runs/digits/{teacher['path']}").stdout
    assert f"accuracy {teacher['accuracy']:.6g}" in checked and "epoch not recorded" in checked

    said = []
    wandb = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    for what in ("login", "init", "log", "finish"):
        setattr(wandb, what, lambda *args, what=what, **named: said.append((what, args, named)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert call_module(*shared, "--wandb-name", "mine", "--wandb-api-key", "secret").returncode == 0
    assert [what for what, _, _ in said] == ["login", "init", "log", "finish"] and said[0][2] == {"key": "secret"}
    assert said[1][2] == {"project": "infer_fast", "name": "mine"} and said[2][1][0]["trained_on"] == "distilled"

    stored = call_module("relabel", "--fkd", "--epochs=2")
    assert stored.returncode == 0 and "2 epochs' labels are in runs/digits/fkd" in stored.stdout
    shutil.rmtree(kept)
    replayed = call_module(*shared, "--output-dir", "out", "--labels", "fkd")
    assert replayed.returncode == 0 and "relabel (FKD)" not in replayed.stderr
    assert "labels of every crop (FKD)" in replayed.stdout

    for flags, words in {
        ("--ipc=90",): "stands for 75 base images per class, the set has 3",
        ("--M=3",): "the set has compensators of 2 teachers",
        ("--teacher-model", "resnet18"): "resnet18 is none of this set's teachers",
        ("--val-dir", "nowhere"): "nowhere does not exist",
        ("--check-ckpt", "none.pth"): "none.pth does not exist",
    }.items():
        wrong = call_module(*shared, *flags)
        assert wrong.returncode == 1 and words in wrong.stderr, wrong.stderr


@pytest.mark.slow
def test_modules_run_without_a_warning():
    for module in ("distill", "validate", "squeeze", "relabel", "report", "export"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", f"infer_fast.{module}", "--help"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_folders_of_images_made_by_anyone_are_labelled_and_judged(tmp_path, call_module, copied_run, finished):
    """Our own export, read back as if it were another's, with a teacher from a checkpoint; then broken three ways."""
    card = json.loads((copied_run / "card.json").read_text())["teachers"][0]
    state, _ = read_tensors(finished[0] / "runs" / "digits" / card["path"])
    torch.save({"state_dict": state}, tmp_path / "t.pth")
    export(load(copied_run), tmp_path / "others", "png")
    flags = ["--dataset", "digits", "--arch-name", card["name"], "--arch-path", "t.pth", "--epochs=1", "--seeds=1"]
    flags += ["--networks", "convnet", "--padding=1", "--output-dir", "out"]
    done = call_module("validate", "--syn-data-path", "others", *flags)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(r["trained_on"], r["instances"]) for r in rows] == [("distilled", 90), ("random real", 90)]

    unnamed = call_module("validate", "--syn-data-path", "others")
    assert unnamed.returncode == 1 and "name the dataset they stand for" in unnamed.stderr
    next((tmp_path / "others" / "new003").iterdir()).unlink()
    uneven = call_module("validate", "--syn-data-path", "others", *flags)
    assert uneven.returncode == 1 and "new003 holds 8 images and" in uneven.stderr
    shutil.rmtree(tmp_path / "others" / "new003")
    missing = call_module("validate", "--syn-data-path", "others", *flags)
    assert missing.returncode == 1 and "9 class folders for 10 classes: none for '3'" in missing.stderr


def test_at_a_budget_of_bytes_everything_fills_it(parts):
    """Random real images, raw and through the set's codec, weigh what the set may weigh, labels included."""
    plain, dataset, teachers = parts
    store = LabelStore("uint8")
    coded, base = encode(plain.base, Codec("webp", 100))
    distilled = replace(plain, base=base, coded=coded, label_store=store, logits=store.rounded(plain.logits))
    budget = 3 * 4 * 3 * 8 * 8
    evaluation = Evaluation(distilled, dataset, teachers, STUDENT, 3, "all", 2, budget=budget)
    made = candidates(evaluation)
    assert [(c.trained_on, c.labels) for c in made] == [
        ("distilled", "soft labels"), ("distilled", "hard labels"), ("random real, coded", "soft labels"),
        ("random real, coded", "hard labels"), ("random real", "soft labels"), ("random real", "hard labels"),
        ("whole dataset", "hard labels"),
    ]  # fmt: skip
    assert len({c.updates for c in made}) == 1
    ours, _, through, through_hard, raw, raw_hard, _ = made
    assert (ours.image_bytes, ours.label_bytes) == (coded.nbytes + 2 * 3 * 64 + 2 * 12, 16 * 4)
    for candidate in (through, through_hard, raw, raw_hard):
        assert candidate.image_bytes + candidate.label_bytes <= budget
    one, two = (through.source(seed) for seed in (0, 1))
    assert len(one) % 4 == 0 and len(one) == through.label_bytes // 4
    assert torch.equal(through_hard.source(0).base, one.base) and not torch.equal(one.base, two.base)
    assert torch.equal(store.rounded(one.targets), one.targets.half())
    assert len(raw.source(0)) == budget // (192 + 8) and len(raw_hard.source(0)) == budget // 193
    assert raw_hard.source(0).targets.bincount(minlength=4).tolist() == [3, 3, 3, 2]
    rows = validate(evaluation)
    assert "points" in verdict(rows) and "random real, coded (hard labels)" in verdict(rows)


@pytest.mark.parametrize("nothing", ["networks", "labels"])
def test_a_table_of_no_students_is_refused(parts, nothing):
    with pytest.raises(InferFastError, match=f"{nothing} is empty: give at least one"):
        rows_of(parts, replace(STUDENT, **{nothing: ()}))
