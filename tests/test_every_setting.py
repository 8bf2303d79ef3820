"""Every setting, changed in turn and in one folder: the set and the table are those of a fresh folder.

What is kept there from all the other settings (teachers, tasks, labels, students) must never be taken for these.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infer_fast.distill import distill
from infer_fast.files import file_hash
from infer_fast.job import DistillOptions
from infer_fast.models import build
from infer_fast.settings import Recipe, SqueezeSettings, StudentSettings, SynthesisSettings
from tests.conftest import SEED

RECIPE = Recipe(
    dataset="blobs",
    arch_name=("convnet", "convnet-silu"),
    ipc=4,
    seeds=1,
    squeeze=SqueezeSettings(epochs=1, batch_size=8, padding=1),
    synthesis=SynthesisSettings(iterations=2, jitter=1),
    student=StudentSettings(networks=("convnet",), epochs=2, batch_size=8, padding=1),
)
OPTIONS = DistillOptions(RECIPE, data_path=Path("data"), exp_name="x")

# Another value of each setting, and the others that it needs to have an effect.
CHANGED: dict[str, dict[str, object]] = {
    "recipe.dataset": {"recipe.dataset": "spots"},
    "recipe.arch_name": {"recipe.arch_name": ("convnet-silu", "convnet")},
    "recipe.ipc": {"recipe.ipc": 5},
    "recipe.seeds": {"recipe.seeds": 2},
    "recipe.compare": {"recipe.compare": "all"},
    "recipe.squeeze.epochs": {"recipe.squeeze.epochs": 2},
    "recipe.squeeze.batch_size": {"recipe.squeeze.batch_size": 5},
    "recipe.squeeze.lr": {"recipe.squeeze.lr": 0.02},
    "recipe.squeeze.momentum": {"recipe.squeeze.momentum": 0.5},
    "recipe.squeeze.weight_decay": {"recipe.squeeze.weight_decay": 0.1},
    "recipe.squeeze.padding": {"recipe.squeeze.padding": 2},
    "recipe.squeeze.flip": {"recipe.squeeze.flip": False},
    "recipe.squeeze.loader": {"recipe.squeeze.loader": "torch"},
    "recipe.squeeze.workers": {"recipe.squeeze.workers": 2},
    "recipe.squeeze.engine": {"recipe.squeeze.engine": "eager"},
    "recipe.squeeze.precision": {"recipe.squeeze.precision": "bfloat16"},
    "recipe.synthesis.optimise": {"recipe.synthesis.optimise": "images"},
    "recipe.synthesis.start": {"recipe.synthesis.optimise": "images", "recipe.synthesis.start": "noise"},
    "recipe.synthesis.iterations": {"recipe.synthesis.iterations": 3},
    "recipe.synthesis.batch_size": {"recipe.synthesis.batch_size": 2},
    "recipe.synthesis.lr": {"recipe.synthesis.lr": 0.1},
    "recipe.synthesis.r_bn": {"recipe.synthesis.r_bn": 0.1},
    "recipe.synthesis.r_var": {"recipe.synthesis.r_var": 3.0},
    "recipe.synthesis.first_bn_multiplier": {"recipe.synthesis.first_bn_multiplier": 1.0},
    "recipe.synthesis.jitter": {"recipe.synthesis.jitter": 2},
    "recipe.synthesis.steps": {"recipe.synthesis.steps": 1},
    "recipe.synthesis.rho": {"recipe.synthesis.steps": 1, "recipe.synthesis.rho": 0.5},
    "recipe.synthesis.tv_l2": {"recipe.synthesis.tv_l2": 0.1},
    "recipe.synthesis.l2_scale": {"recipe.synthesis.l2_scale": 0.1},
    "recipe.synthesis.seed": {"recipe.synthesis.seed": 1},
    "recipe.synthesis.skip_bn": {"recipe.synthesis.skip_bn": (1,)},
    "recipe.synthesis.mean": {"recipe.synthesis.mean": (0.4, 0.4, 0.4)},
    "recipe.synthesis.std": {"recipe.synthesis.std": (0.4, 0.4, 0.4)},
    "recipe.synthesis.compensator_size": {"recipe.synthesis.compensator_size": 4},
    "recipe.store.budget": {
        "recipe.store.budget": "bytes", "recipe.store.codec": "webp", "recipe.ipc": 20, "recipe.compare": "coded",
    },
    "recipe.store.codec": {"recipe.store.codec": "webp"},
    "recipe.store.quality": {"recipe.store.codec": "webp", "recipe.store.quality": 20},
    "recipe.store.label_bits": {"recipe.store.label_bits": "uint8"},
    "recipe.store.label_top": {"recipe.store.label_bits": "top", "recipe.store.label_top": 1},
    "recipe.store.label_truth": {"recipe.store.label_truth": 0.5},
    "recipe.store.compensators": {"recipe.store.compensators": 1},
    "recipe.student.networks": {"recipe.student.networks": ("convnet-silu", "convnet")},
    "recipe.student.epochs": {"recipe.student.epochs": 4},
    "recipe.student.batch_size": {"recipe.student.batch_size": 4},
    "recipe.student.optimizer": {"recipe.student.optimizer": "sgd"},
    "recipe.student.lr": {"recipe.student.lr": 0.02},
    "recipe.student.momentum": {"recipe.student.momentum": 0.5, "recipe.student.lr": 0.1},
    "recipe.student.weight_decay": {"recipe.student.weight_decay": 3.0},
    "recipe.student.lr_scheduler": {"recipe.student.lr_scheduler": "exponentiallr"},
    "recipe.student.cos": {"recipe.student.cos": False},
    "recipe.student.lr_step_size": {"recipe.student.lr_scheduler": "steplr", "recipe.student.lr_step_size": 1},
    "recipe.student.lr_gamma": {"recipe.student.lr_scheduler": "exponentiallr", "recipe.student.lr_gamma": 0.5},
    "recipe.student.lr_warmup_epochs": {"recipe.student.lr_warmup_epochs": 1},
    "recipe.student.lr_warmup_decay": {"recipe.student.lr_warmup_epochs": 1, "recipe.student.lr_warmup_decay": 0.5},
    "recipe.student.lr_warmup_method": {
        "recipe.student.lr_warmup_epochs": 1, "recipe.student.lr_warmup_method": "constant",
    },
    "recipe.student.temperature": {"recipe.student.temperature": 2.0},
    "recipe.student.mix_type": {"recipe.student.mix_type": "cutmix"},
    "recipe.student.mix_alpha": {"recipe.student.mix_alpha": 0.1},
    "recipe.student.labels": {"recipe.student.labels": ("static", "dynamic", "fkd")},
    "recipe.student.crop": {"recipe.student.crop": "resized"},
    "recipe.student.padding": {"recipe.student.padding": 2},
    "recipe.student.flip": {"recipe.student.flip": False},
    "recipe.student.loader": {"recipe.student.loader": "torch"},
    "recipe.student.workers": {"recipe.student.workers": 2},
    "recipe.student.engine": {"recipe.student.engine": "eager"},
    "recipe.student.precision": {"recipe.student.precision": "bfloat16"},
    "data_path": {"data_path": Path("others")},
    "image_size": {"image_size": 12},
    "arch_path": {"arch_path": (Path("a.pth"), Path("b.pth"))},
    "init_path": {"init_path": Path("data/train")},
    "val_dir": {"val_dir": Path("others/test")},
    "held_out": {"held_out": 6},
    "M": {"M": 1},
    "store_best_images": {"store_best_images": True},
    "lanes": {"lanes": 1},
    "chunk": {"chunk": 1},
    "precision": {"precision": "bfloat16"},
    "engine": {"engine": "eager"},
    "backend": {"backend": "reference"},
}  # fmt: skip
NOT_CHANGED = {  # where it goes, what is printed, and what needs a network
    "syn_data_path", "exp_name", "wandb_name", "dry_run", "ipc_start", "ipc_end", "recipe.arch_weights",
}  # fmt: skip


def leaves(value: object, place: str = "") -> Iterator[str]:
    """The name of every setting."""
    for field in fields(value):
        inner, name = getattr(value, field.name), f"{place}{field.name}"
        yield from leaves(inner, f"{name}.") if is_dataclass(inner) else [name]


def changed(value, name: str, new: object):
    """A copy of nested dataclasses with another value in one place."""
    first, _, rest = name.partition(".")
    return replace(value, **{first: changed(getattr(value, first), rest, new) if rest else new})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of class folders, with the same names but other pixels, and a checkpoint for each teacher."""
    folder = tmp_path_factory.mktemp("settings")
    random = np.random.default_rng(SEED)
    for which in ("data", "others"):
        for split, count in (("train", 8), ("test", 4)):
            for c in range(3):
                (folder / which / split / f"c{c}").mkdir(parents=True)
                for i in range(count):
                    pixels = random.integers(0, 90, (8, 8, 3)) + 80 * np.eye(3, dtype=int)[c]
                    path = folder / which / split / f"c{c}" / f"{i}.png"
                    Image.fromarray(pixels.astype(np.uint8)).save(path)
    for name, network in (("a", "convnet"), ("b", "convnet-silu")):
        torch.save(build(network, 3, (8, 8), seed=5).state_dict(), folder / f"{name}.pth")
    return folder


@pytest.fixture
def at_place(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Path:
    monkeypatch.chdir(place)
    return place


def test_every_setting_is_changed():
    assert set(leaves(OPTIONS)) == set(CHANGED) | NOT_CHANGED
    assert all(name in values for name, values in CHANGED.items())


def outcome(options: DistillOptions) -> tuple:
    """The rows of the table, the bytes of the set, and the images that were written."""
    rows = distill(options, "x")
    folder = options.syn_data_path / "x"
    images = sorted((path.name, file_hash(path)) for path in (folder / "images").rglob("*.jpg"))
    return rows, file_hash(folder / "distilled.safetensors"), images if options.store_best_images else []


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_setting_gives_what_a_fresh_folder_gives(at_place, tmp_path, name):
    one = replace(OPTIONS, syn_data_path=at_place / "one")
    if not one.syn_data_path.exists():
        outcome(one)
    for setting, value in CHANGED[name].items():
        one = changed(one, setting, value)
    in_one, in_fresh = outcome(one), outcome(replace(one, syn_data_path=tmp_path / "fresh"))
    assert in_one == in_fresh


@pytest.mark.slow
def test_the_first_settings_are_found_again_after_all_the_others(at_place, tmp_path, monkeypatch):
    one = replace(OPTIONS, syn_data_path=at_place / "one")
    expected = outcome(one)
    monkeypatch.setattr("infer_fast.students.training.fit", None)  # nothing is trained
    assert outcome(one) == expected
