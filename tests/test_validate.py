"""Students and the table."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from infer_fast.data.distilled import DistilledSet, load, quantise
from infer_fast.data.files import read_tensors
from infer_fast.errors import InferFastError
from infer_fast.export import export
from infer_fast.models import build
from infer_fast.recipes import StudentSettings
from infer_fast.relabel import dynamic_labels
from infer_fast.squeeze import Teacher
from infer_fast.validate import table, validate

STUDENT = StudentSettings(networks=("convnet",), epochs=10, batch_size=8, padding=0, flip=False, temperature=2.0)


@pytest.fixture
def parts(tiny_dataset, generator):
    """A distilled set of the tiny dataset (2 bases per class, 1 teacher) and that teacher, untrained."""
    base = torch.stack([tiny_dataset.train.images[tiny_dataset.train.labels == c][:2] for c in range(4)])
    compensators = quantise(0.01 * torch.randn(1, 2, 3, 8, 8, generator=generator), tiny_dataset.std)
    logits = (10 * torch.eye(4)).view(4, 1, 1, 4).expand(4, 2, 2, 4).half().contiguous()
    distilled = DistilledSet(base, compensators, logits, tiny_dataset.mean, tiny_dataset.std, tiny_dataset.classes)
    teacher = Teacher("convnet", build("convnet", 4, (8, 8), seed=0).eval(), 25.0, None, "")
    return distilled, tiny_dataset, [teacher]


def test_students_learn_from_a_good_set_and_not_from_wrong_labels(parts):
    distilled, dataset, teachers = parts
    settings = replace(STUDENT, epochs=40)
    (good,) = validate(distilled, dataset, teachers, settings, ipc=3, compare="none", seeds=2)
    wrong = replace(distilled, logits=distilled.logits.roll(1, dims=3))
    (bad,) = validate(wrong, dataset, teachers, settings, ipc=3, compare="none", seeds=2)
    assert good.mean > 80 and bad.mean < 20
    assert len(good.last) == len(good.best) == 2 and all(b >= a for a, b in zip(good.last, good.best, strict=True))


def test_every_row_gets_the_same_updates(parts, monkeypatch):
    from infer_fast import validate as module

    seen = []
    original = module.fit

    def recording(network, stream, loss, schedule, **kwargs):
        counted = list(stream)
        seen.append((len(counted), schedule))
        return original(network, iter(counted), loss, schedule, **kwargs)

    monkeypatch.setattr(module, "fit", recording)
    distilled, dataset, teachers = parts
    rows = validate(distilled, dataset, teachers, STUDENT, ipc=3, compare="all", seeds=1)
    assert [(r.trained_on, r.labels) for r in rows] == [
        ("distilled", "soft labels"), ("distilled", "hard labels"), ("random real", "soft labels"),
        ("random real", "hard labels"), ("whole dataset", "hard labels"),
    ]  # fmt: skip
    assert len(seen) == 5 and len(set(seen)) == 1 and seen[0][0] == 10 * 2
    assert [r.instances for r in rows] == [16, 16, 12, 12, 48]
    assert rows[0].image_bytes == distilled.image_bytes and rows[2].image_bytes == 3 * 4 * 192
    assert rows[0].label_bytes == 16 * 4 * 2 and rows[2].label_bytes == 12 * 4 * 2 and rows[3].label_bytes == 12


def test_seeds_and_networks_are_fixed_and_finished_students_are_not_trained_again(parts, tmp_path, monkeypatch):
    distilled, dataset, teachers = parts
    settings = replace(STUDENT, networks=("convnet", "convnet-silu"), epochs=3)
    arguments = {"ipc": 3, "compare": "random", "seeds": 2}
    first = validate(distilled, dataset, teachers, settings, store=tmp_path / "s.json", **arguments)
    assert first == validate(distilled, dataset, teachers, settings, **arguments)
    assert [r.network for r in first] == ["convnet", "convnet", "convnet-silu", "convnet-silu"]
    assert len(json.loads((tmp_path / "s.json").read_text())) == 8
    monkeypatch.setattr("infer_fast.validate.fit", None)
    assert first == validate(distilled, dataset, teachers, settings, store=tmp_path / "s.json", **arguments)


def test_dynamic_labels_make_rows_of_their_own_with_fewer_epochs(parts):
    distilled, dataset, teachers = parts
    settings = replace(STUDENT, labels=("static", "dynamic"))
    rows = validate(distilled, dataset, teachers, settings, ipc=3, compare="random", seeds=1)
    assert [(r.trained_on, r.labels, r.updates) for r in rows] == [
        ("distilled", "soft labels", 20), ("distilled", "dynamic labels", 10),
        ("random real", "soft labels", 20), ("random real", "dynamic labels", 10),
    ]  # fmt: skip
    weights = sum(t.nbytes for t in teachers[0].network.state_dict().values())
    assert rows[1].label_bytes == rows[3].label_bytes == weights
    (alone,) = validate(
        distilled, dataset, teachers, replace(STUDENT, labels=("dynamic",)), ipc=3, compare="none", seeds=1
    )
    assert alone == rows[1]


CHANGED = {
    "lr": 2e-3, "lr_scheduler": "steplr", "lr_warmup_epochs": 3, "weight_decay": 0.5, "optimizer": "sgd",
    "temperature": 9.0, "mix_type": "cutmix", "mix_alpha": 0.1, "padding": 2, "flip": True, "batch_size": 5,
    "epochs": 3,
}  # fmt: skip


def test_every_setting_of_a_student_takes_effect(parts, monkeypatch):
    """A student ends with other weights for each setting that is changed, the schedulers' own settings included."""
    from infer_fast import validate as module

    distilled, dataset, teachers = parts
    ended = []
    original = module.fit

    def recording(network, *args, **kwargs):
        original(network, *args, **kwargs)
        ended.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
        return network

    monkeypatch.setattr(module, "fit", recording)
    plain = replace(STUDENT, epochs=6, mix_type="mixup", lr_step_size=2)
    stepped = replace(plain, lr_scheduler="steplr")
    warmed = replace(plain, lr_warmup_epochs=3)
    variants = [plain, *(replace(plain, **{name: value}) for name, value in CHANGED.items())]
    variants += [replace(stepped, lr_step_size=4), replace(stepped, lr_gamma=0.7), replace(warmed, lr_warmup_decay=0.5)]
    variants += [replace(warmed, lr_warmup_method="constant"), replace(plain, optimizer="sgd", momentum=0.3)]
    for settings in variants:
        validate(distilled, dataset, teachers, settings, ipc=3, compare="none", seeds=1)
    for i, one in enumerate(ended):
        assert not any(torch.equal(one, other) for other in ended[:i]), variants[i]


def test_dynamic_labels_are_the_teachers_averaged_logits(generator):
    networks = [build("convnet", 4, (8, 8), seed=seed).eval() for seed in (0, 1)]
    images = torch.randn(5, 3, 8, 8, generator=generator)
    label = dynamic_labels([Teacher("convnet", n, 0.0, None, "") for n in networks], "float32")
    torch.testing.assert_close(label(images), (networks[0](images) + networks[1](images)) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_students_learn_through_every_loader(parts, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    distilled, dataset, teachers = parts
    settings = replace(STUDENT, epochs=30, loader=loader)
    (row,) = validate(distilled, dataset, teachers, settings, ipc=3, compare="none", seeds=1)
    assert row.mean > 80


def test_random_images_differ_between_seeds_and_are_ipc_per_class(parts):
    from infer_fast.validate import _random_real

    _, dataset, _ = parts
    one, two = (_random_real(dataset, 3, seed, None) for seed in (1, 2))
    assert torch.bincount(one.targets).tolist() == [3] * 4 and not torch.equal(one.base, two.base)
    with pytest.raises(InferFastError, match="12 training images, fewer than the 13"):
        _random_real(dataset, 13, 0, None)


def test_the_table_has_mean_and_sample_deviation(parts):
    distilled, dataset, teachers = parts
    rows = validate(distilled, dataset, teachers, replace(STUDENT, epochs=1), ipc=3, compare="none", seeds=3)
    last = torch.tensor(rows[0].last, dtype=torch.float64)
    assert f"{last.mean():.2f} ± {last.std():.2f}" in table(rows, 1000) and "n=3" in table(rows, 1000)


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
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    card["teachers"][1]["path"] = "../../damaged.safetensors"
    (copied_run / "card.json").write_text(json.dumps(card))
    broken = run_module("validate", "--syn-data-path", "runs/digits", "--compare=random")
    assert broken.returncode == 1 and "damaged.safetensors is damaged" in broken.stderr
    assert run_module("validate", "--syn-data-path", "nowhere").returncode == 1


def test_modules_run_without_a_warning():
    for module in ("distill", "validate", "squeeze", "relabel", "report", "export"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", f"infer_fast.{module}", "--help"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_folders_of_images_made_by_anyone_are_labelled_and_judged(tmp_path, run_module, copied_run, finished):
    """Our own export, read back as if it were another's, with a teacher from a checkpoint; then broken three ways."""
    card = json.loads((copied_run / "card.json").read_text())["teachers"][0]
    state, _ = read_tensors(finished[0] / "runs" / "digits" / card["path"])
    torch.save({"state_dict": state}, tmp_path / "t.pth")
    export(load(copied_run), tmp_path / "others", "png")
    flags = ["--dataset", "digits", "--arch-name", card["name"], "--arch-path", "t.pth", "--epochs=1", "--seeds=1"]
    flags += ["--networks", "convnet", "--padding=1", "--output-dir", "out"]
    done = run_module("validate", "--syn-data-path", "others", *flags)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(r["trained_on"], r["instances"]) for r in rows] == [("distilled", 90), ("random real", 90)]

    unnamed = run_module("validate", "--syn-data-path", "others")
    assert unnamed.returncode == 1 and "name the dataset they stand for" in unnamed.stderr
    next((tmp_path / "others" / "new003").iterdir()).unlink()
    uneven = run_module("validate", "--syn-data-path", "others", *flags)
    assert uneven.returncode == 1 and "new003 holds 8 images and" in uneven.stderr
    shutil.rmtree(tmp_path / "others" / "new003")
    missing = run_module("validate", "--syn-data-path", "others", *flags)
    assert missing.returncode == 1 and "9 class folders for 10 classes: none for '3'" in missing.stderr
