"""Teachers: trained, kept, imported."""

from dataclasses import replace

import pytest
import torch

from infer_fast.data.images import Split
from infer_fast.errors import InferFastError
from infer_fast.files import file_hash, write_tensors
from infer_fast.models import build
from infer_fast.models.teacher import load_teacher, save_teacher
from infer_fast.models.weights import faulty
from infer_fast.settings import SqueezeSettings
from infer_fast.squeeze import Origin, squeeze

SETTINGS = SqueezeSettings(epochs=6, batch_size=12, lr=0.05, padding=0, flip=False)


def test_teachers_learn_and_are_kept(tiny_dataset, tmp_path):
    first, second = squeeze(tiny_dataset, ("convnet", "convnet-silu"), Origin(SETTINGS), tmp_path)
    assert first.accuracy > 80 and not first.network.training
    assert not any(p.requires_grad for p in first.network.parameters())
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = squeeze(tiny_dataset, ("convnet-silu",), Origin(SETTINGS), tmp_path)[0]
    assert (again.path, again.accuracy, again.sha256) == (second.path, second.accuracy, second.sha256)
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}


def test_other_settings_seed_or_data_are_another_teacher(tiny_dataset, tmp_path):
    short = replace(SETTINGS, epochs=1)
    squeeze(tiny_dataset, ("convnet",), Origin(short), tmp_path)
    squeeze(tiny_dataset, ("convnet",), Origin(short, seed=1), tmp_path)
    squeeze(tiny_dataset, ("convnet",), Origin(replace(short, lr=0.01)), tmp_path)
    tiny_dataset.train.images[0, 0, 0, 0] ^= 1
    squeeze(replace(tiny_dataset), ("convnet",), Origin(short), tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_the_same_seed_gives_the_same_bytes(tiny_dataset, tmp_path):
    one, two = (squeeze(tiny_dataset, ("convnet",), Origin(SETTINGS), tmp_path / n)[0] for n in ("a", "b"))
    assert one.sha256 == two.sha256


def test_imports_are_measured_and_kept_under_the_files_hash(tiny_dataset, tmp_path):
    trained = squeeze(tiny_dataset, ("convnet",), Origin(SETTINGS), tmp_path / "a")[0]
    torch.save(trained.network.state_dict(), tmp_path / "t.pth")
    imported = squeeze(tiny_dataset, ("convnet",), Origin(SETTINGS, checkpoints=(tmp_path / "t.pth",)), tmp_path / "b")[
        0
    ]
    assert imported.accuracy == trained.accuracy
    with pytest.raises(InferFastError, match="does not exist"):
        squeeze(tiny_dataset, ("convnet",), Origin(SETTINGS, checkpoints=(tmp_path / "no.pth",)), tmp_path / "b")
    with pytest.raises(InferFastError, match="give one for each"):
        squeeze(tiny_dataset, ("convnet",), Origin(SETTINGS, checkpoints=(tmp_path / "t.pth",) * 2), tmp_path)


def test_a_changed_teacher_file_is_noticed(tiny_dataset, tmp_path):
    teacher = squeeze(tiny_dataset, ("convnet",), Origin(replace(SETTINGS, epochs=1)), tmp_path)[0]
    assert teacher.sha256 == file_hash(teacher.path)
    with pytest.raises(InferFastError, match="not the teacher that was used"):
        load_teacher("convnet", teacher.path, 4, (8, 8), "0" * 64)
    with pytest.raises(InferFastError, match="does not hold a convnet for 5 classes"):
        load_teacher("convnet", teacher.path, 5, (8, 8))


def test_command_line(call_module):
    done = call_module("squeeze", "--arch-name", "convnet", "--epochs", "1")
    assert done.returncode == 0 and "convnet: test accuracy" in done.stdout, done.stderr


@pytest.mark.slow
def test_published_weights_are_imported_like_a_checkpoint(tiny_dataset, tmp_path, monkeypatch):
    """From the hub's folder; kept apart from trained teachers, and given way to by a checkpoint."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = build("resnet18", 4, (8, 8), seed=3)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(source.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    folder, origin = tmp_path / "teachers", Origin(SqueezeSettings(), weights="IMAGENET1K_V1")
    (teacher,) = squeeze(tiny_dataset, ("resnet18",), origin, folder)
    assert torch.equal(teacher.network.fc.weight, source.fc.weight)
    torch.save(build("resnet18", 4, (8, 8), seed=4).state_dict(), tmp_path / "other.pth")
    origin = replace(origin, checkpoints=(tmp_path / "other.pth",))
    (other,) = squeeze(tiny_dataset, ("resnet18",), origin, folder)
    assert other.path != teacher.path and not torch.equal(other.network.fc.weight, source.fc.weight)


def test_teachers_are_not_trained_without_training_images(tiny_dataset, tmp_path):
    nothing = Split(tiny_dataset.train.images[:0], tiny_dataset.train.labels[:0])
    with pytest.raises(InferFastError, match="tiny has no training images here"):
        squeeze(replace(tiny_dataset, train=nothing), ("convnet",), Origin(SqueezeSettings()), tmp_path)


def test_a_checkpoint_that_gives_no_numbers_is_refused_at_import_and_later(tiny_dataset, tmp_path):
    """The tensor is named, nothing is kept; and a teacher that is there already does not get by."""
    network = build("convnet", 4, (8, 8), seed=0)
    network.state_dict()["stages.0.1.running_var"][3] = float("nan")
    torch.save(network.state_dict(), tmp_path / "nan.pth")
    origin = Origin(SETTINGS, checkpoints=(tmp_path / "nan.pth",))
    with pytest.raises(InferFastError, match="nan.pth: stages.0.1.running_var holds NaN"):
        squeeze(tiny_dataset, ("convnet",), origin, tmp_path / "kept")
    assert not list((tmp_path / "kept").glob("*"))
    save_teacher(tmp_path / "t.safetensors", network, 50.0, {})
    with pytest.raises(InferFastError, match="t.safetensors holds no teacher that works .*running_var holds NaN"):
        load_teacher("convnet", tmp_path / "t.safetensors", 4, (8, 8))


def test_a_file_that_is_no_teacher_of_ours_is_refused(tmp_path):
    network = build("convnet", 4, (8, 8), seed=0)
    for card in (None, {}, {"accuracy": "good"}):
        write_tensors(tmp_path / "t.safetensors", network.state_dict(), card)
        with pytest.raises(InferFastError, match="does not say how good the teacher is"):
            load_teacher("convnet", tmp_path / "t.safetensors", 4, (8, 8))


def test_every_checkpoint_is_looked_for_before_the_first_is_imported(tiny_dataset, tmp_path):
    torch.save(build("convnet", 4, (8, 8), seed=0).state_dict(), tmp_path / "a.pth")
    for missing in (tmp_path / "no.pth", tmp_path):
        origin = Origin(SETTINGS, checkpoints=(tmp_path / "a.pth", missing))
        with pytest.raises(InferFastError, match="does not exist|is a folder"):
            squeeze(tiny_dataset, ("convnet", "convnet"), origin, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("name", ["resnet18", "convnet"])
def test_a_last_batch_of_one_image_trains(tiny_dataset, tmp_path, name):
    """47 and 1 of 48 images: resnet18 ends at 1x1 pixels, where BatchNorm can't take one image alone."""
    settings = replace(SETTINGS, batch_size=47, epochs=1)
    (teacher,) = squeeze(tiny_dataset, (name,), Origin(settings), tmp_path)
    assert faulty(teacher.network.state_dict()) is None


def test_an_image_size_that_has_no_effect_is_refused(call_module):
    done = call_module("squeeze", "--arch-name", "convnet", "--epochs", "1", "--image-size", "16")
    assert done.returncode == 1 and "--image-size 16 has no effect on digits, whose images are 8x8" in done.stderr
