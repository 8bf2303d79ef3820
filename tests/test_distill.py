"""The main job through its command line: the whole way, killed and resumed, sharded, and every bad input."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

import infer_fast
from infer_fast import files
from infer_fast.errors import DiskError
from infer_fast.files import read_tensors, write_tensors
from infer_fast.recipes import RECIPES


def test_the_whole_way_ends_with_the_table(finished):
    folder, done = finished
    run = folder / "runs" / "digits"
    for row in ("distilled | soft", "distilled | hard", "random real | soft", "random real | hard", "whole dataset"):
        assert row in done.stdout
    assert {p.name for p in run.iterdir()} >= {
        "distilled.safetensors", "card.json", "README.md", "preview.png", "report.html", "table.md", "results.json",
    }  # fmt: skip
    distilled = infer_fast.load(run)
    assert distilled.base.shape == (10, 3, 3, 8, 8) and distilled.compensators.values.shape == (2, 3, 3, 8, 8)
    assert len(distilled) == 10 * 3 * 3
    card = json.loads((run / "card.json").read_text())
    assert card["bytes"]["images"] == distilled.image_bytes <= card["bytes"]["budget"] == 10 * 4 * 192
    assert len(card["results"]) == 5 and card["teachers"][0]["name"] == "convnet"
    assert card["tasks"][0]["last_loss"] > 0 and card["recipe"]["synthesis"]["iterations"] == 6
    assert "synthesis: 36/36 task iterations" in done.stderr
    weights = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in done.stdout.splitlines() if "|" in line
    }
    assert weights["base images"] == "5,760" and weights["compensators, scales and offsets"] == f"{6 * (192 + 12):,}"
    assert weights["soft labels, static"] == "1,800"
    assert weights["soft labels of every crop of 2 epochs (FKD)"] == f"{2 * (90 * (4 + 4 + 20) + 2 * 4):,}"


def test_the_file_weighs_what_the_card_says(finished):
    path = finished[0] / "runs" / "digits" / "distilled.safetensors"
    distilled = infer_fast.load(path)
    overhead = path.stat().st_size - distilled.image_bytes - distilled.label_bytes
    assert 0 < overhead < 1000  # safetensors' header alone


def test_running_again_keeps_the_bytes_and_does_no_work(finished, copied_run, call_module, small_flags):
    path = copied_run / "distilled.safetensors"
    before = path.read_bytes()
    path.unlink()
    again = call_module("distill", *small_flags)
    assert again.returncode == 0 and path.read_bytes() == before
    assert "squeeze" not in again.stderr
    first, second = (
        [line for line in done.stdout.splitlines() if line.startswith("|")] for done in (finished[1], again)
    )
    assert first == second


def test_a_finished_run_may_be_read_only(finished, copied_run, call_module, small_flags, monkeypatch):
    """As on a file system where nothing can be written: both commands that go over it find everything."""

    shutil.copytree(finished[0] / "runs" / "datasets", copied_run.parent / "datasets")

    def refuse(path, *_):
        raise DiskError(f"{path} can't be written.")

    monkeypatch.setattr(files, "write_atomically", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))
    table = (copied_run / "table.md").read_text()
    again = call_module("distill", *small_flags)
    assert again.returncode == 0 and table in again.stdout, again.stderr
    judged = call_module("validate", "--syn-data-path=runs/digits")
    assert judged.returncode == 0 and table in judged.stdout, judged.stderr
    assert "the table is printed and nothing is kept" in judged.stderr
    other = call_module("validate", "--syn-data-path=runs/digits", "--seeds=2", "--compare=none")
    assert other.returncode == 0 and "n=2" in other.stdout, other.stderr
    drawn = call_module("validate", "--syn-data-path=runs/digits", "--tsne")
    assert drawn.returncode == 1 and "--output-dir" in drawn.stderr
    fresh = call_module("distill", *small_flags, "--exp-name=other")
    assert fresh.returncode == 1 and "choose a folder that can be with --syn-data-path" in fresh.stderr


def test_the_seconds_on_the_card_stay_those_of_the_work(copied_run, call_module, small_flags):
    before = (copied_run / "card.json").read_bytes()
    assert call_module("distill", *small_flags).returncode == 0
    assert (copied_run / "card.json").read_bytes() == before


def test_a_damaged_task_is_solved_again_and_one_of_a_former_version_is_found(copied_run, call_module, small_flags):
    expected = (copied_run / "distilled.safetensors").read_bytes()
    (folder,) = (copied_run / "tasks").iterdir()
    for damage in (b"", b"{}", sorted(folder.iterdir())[0].read_bytes()[:-9]):
        sorted(folder.iterdir())[0].write_bytes(damage)
        (copied_run / "distilled.safetensors").unlink()
        again = call_module("distill", *small_flags)
        assert again.returncode == 0 and (copied_run / "distilled.safetensors").read_bytes() == expected
    first = sorted(folder.iterdir())[0]
    tensors, _ = read_tensors(first)
    tensors["optimised"][0, 0, 0] = float("nan")
    write_tensors(first, tensors)
    said = call_module("distill", *small_flags)
    assert said.returncode == 1 and f"{first.name} holds NaN or infinite values: delete it" in said.stderr
    first.unlink()
    assert call_module("distill", *small_flags).returncode == 0
    card = json.loads((copied_run / "card.json").read_text())
    former = former_key(card, infer_fast.load(copied_run).base)
    folder.rename(folder.parent / former)
    found = call_module("distill", *small_flags)
    assert found.returncode == 0 and [path.name for path in (copied_run / "tasks").iterdir()] == [former]


def former_key(card, base):
    """A task's key as version 0.1.0 made it."""
    settings = {k: v for k, v in card["recipe"]["synthesis"].items() if k != "compensator_size"}
    how = card["how"]
    parts = {
        "settings": settings,
        "teachers": [teacher["sha256"] for teacher in card["teachers"]],
        "base": hashlib.sha256(base.numpy().data).hexdigest(),
        "how": [how["precision"], how["engine"], how["backend"], how["device"]],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@pytest.mark.slow
def test_killed_in_the_middle_of_synthesis_and_run_again_gives_the_same_bytes(tmp_path, run_module, small_flags):
    """SIGKILL once the first task is on the disk, as long as others are not."""
    flags = [f for f in small_flags if not f.startswith(("--iteration", "--lanes"))] + ["--iteration=60", "--lanes=1"]
    flags += ["--compare=none", "--student.epochs=1"]
    assert run_module("distill", *flags, "--exp-name=whole").returncode == 0
    command = [sys.executable, "-m", "infer_fast.distill", *flags, "--exp-name=killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 120
    while not list(killed.glob("tasks/*/*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished_tasks = len(list(killed.glob("tasks/*/*.safetensors")))
    assert 0 < finished_tasks < 6 and not (killed / "distilled.safetensors").exists()
    again = run_module("distill", *flags, "--exp-name=killed")
    assert again.returncode == 0, again.stderr
    assert (killed / "distilled.safetensors").read_bytes() == (whole / "distilled.safetensors").read_bytes()


@pytest.mark.slow
def test_ranges_of_tasks_together_equal_one_run(tmp_path, call_module, small_flags):
    flags = [f.replace("--lanes=2", "--lanes=1") for f in small_flags]
    whole = call_module("distill", *flags, "--compare=none", "--exp-name=whole")
    first = call_module("distill", *flags, "--compare=none", "--exp-name=parts", "--ipc-start=0", "--ipc-end=2")
    assert first.returncode == 0 and "Tasks 0..1 are solved" in first.stdout, first.stderr
    assert not (tmp_path / "runs" / "parts" / "distilled.safetensors").exists()
    second = call_module("distill", *flags, "--compare=none", "--exp-name=parts", "--ipc-start=2")
    assert (whole.returncode, second.returncode) == (0, 0)
    one, two = (tmp_path / "runs" / n / "distilled.safetensors" for n in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_lanes_change_nothing_but_rounding(tmp_path, call_module, small_flags):
    for lanes in (1, 3):
        flags = [f"--lanes={lanes}" if f.startswith("--lanes") else f for f in small_flags]
        assert call_module("distill", *flags, "--compare=none", f"--exp-name={lanes}").returncode == 0
    tasks = [sorted((tmp_path / "runs" / str(n)).rglob("tasks/*/*.safetensors")) for n in (1, 3)]
    assert len(tasks[0]) == len(tasks[1]) == 6
    for one, three in zip(*tasks, strict=True):
        assert one.name == three.name
        alone, together = (read_tensors(p)[0]["optimised"] for p in (one, three))
        assert (alone - together).norm() / alone.norm() < 1e-4


@pytest.mark.slow
def test_given_base_images_are_kept(tmp_path, call_module, small_flags, generator):
    (tmp_path / "init").mkdir()
    given = torch.randint(0, 256, (10, 3, 3, 8, 8), generator=generator, dtype=torch.uint8)
    for j in range(3):
        torch.save(given[:, j].clone(), tmp_path / "init" / f"tensor_{j}.pt")
    flags = [*small_flags, "--compare=none", "--init-path=init"]
    done = call_module("distill", *flags)
    assert done.returncode == 0, done.stderr
    assert torch.equal(infer_fast.load(tmp_path / "runs" / "digits").base, given)
    torch.save(given[:5, 0].clone(), tmp_path / "init" / "tensor_1.pt")
    wrong = call_module("distill", *flags)
    assert wrong.returncode == 1 and "tensor_1.pt holds (5, 3, 8, 8), expected a tensor (10, 3, 8, 8)" in wrong.stderr
    (tmp_path / "init" / "tensor_2.pt").unlink()
    (tmp_path / "init" / "tensor_1.pt").write_bytes(b"no tensor")
    assert "can be loaded safely" in call_module("distill", *flags).stderr


@pytest.mark.slow
def test_image_mode_goes_the_whole_way(tmp_path, call_module, small_flags):
    """SRe2L's point (images, from noise) with DWA's adjusted weights: nothing but flags."""
    done = call_module(
        "distill", *small_flags, "--optimise=images", "--start=noise", "--steps=2", "--batch-size=7", "--compare=none",
        "--store-best-images",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs" / "digits" / "images").glob("new00?/class00?_id00?.jpg"))) == 40
    distilled = infer_fast.load(tmp_path / "runs" / "digits")
    assert distilled.compensators is None and distilled.base.shape == (10, 4, 3, 8, 8) and len(distilled) == 40


@pytest.mark.slow
def test_imported_teachers_are_used_and_measured(tmp_path, finished, call_module, small_flags):
    """A checkpoint of a trained teacher, wrapped as others wrap it, gives back the accuracy it was trained to."""
    cards = json.loads((finished[0] / "runs" / "digits" / "card.json").read_text())["teachers"]
    trained = finished[0] / "runs" / "digits" / cards[0]["path"]
    state, card = read_tensors(trained)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "t.pth")
    flags = ["--arch-name", "convnet", "--arch-path", "t.pth", "--compare=none"]
    done = call_module("distill", *small_flags, *flags)
    assert done.returncode == 0, done.stderr
    assert "import convnet: 1/1 checkpoint" in done.stderr
    assert f"test accuracy {card['accuracy']:.2f} %" in done.stderr


@pytest.mark.slow
def test_base_images_can_be_class_folders_and_teachers_the_first_of_those_named(tmp_path, call_module, small_flags):
    for c in range(10):
        (tmp_path / "init" / f"{c}").mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8, 3), 20 * c + i, dtype=np.uint8)).save(
                tmp_path / "init" / f"{c}" / f"{i}.png"
            )
    done = call_module("distill", *small_flags, "--compare=none", "--init-path=init", "--M=1")
    assert done.returncode == 0, done.stderr
    distilled = infer_fast.load(tmp_path / "runs" / "digits")
    assert [t.name for t in distilled.card.teachers] == ["convnet"]
    assert (distilled.base[:, :, 0, 0, 0] == 20 * torch.arange(10).view(-1, 1) + torch.arange(3)).all()
    shutil.rmtree(tmp_path / "init" / "7")
    missing = call_module("distill", *small_flags, "--compare=none", "--init-path=init", "--M=1")
    assert missing.returncode == 1 and "9 class folders for 10 classes: none for '7'" in missing.stderr


ALONE = "forced backend"  # in a process of its own, without Triton's interpreter
BAD = {
    "unknown recipe": (["nonsense"], 2, "not a recipe"),
    "unknown flag": (["--no-such-flag"], 2, "no-such-flag"),
    "wrong type": (["--ipc=many"], 2, "many"),
    "missing path": (["--data-path=nowhere"], 1, "nowhere does not exist"),
    "unknown network": (["--arch-name", "resnet19"], 1, "'resnet19' is not a network"),
    "ipc too small": (["--ipc=1"], 1, "ipc 1 is too small"),
    "ipc too large": (["--ipc=1000"], 1, "fewer than the"),
    "diverging": (
        ["--steps=2", "--rho=1e6"],
        1,
        "The loss became NaN or infinite in teacher convnet, index 0, iteration 0, teacher convnet, index 1",
    ),
    "missing checkpoints": (["--arch-path", "a.pth"], 1, "1 checkpoints were given for 2 teachers"),
    ALONE: (["--backend=triton"], 1, "triton backend was asked for but can't serve"),
    "more teachers than named": (["--M=3"], 1, "--M 3: there are 2 teachers (convnet, convnet-silu)"),
    "no wandb": (["--wandb-name=mine"], 1, "--wandb-name needs the package wandb"),
    "no such weights": (["--arch-weights=V9"], 1, "convnet"),
    "no seeds": (["--seeds=0"], 2, "--seeds is 0: it must be a whole number from 1 to"),
    "no images": (["--ipc=999999999999"], 2, "--ipc is 999999999999: it must be a whole number from 1 to"),
    "no tasks": (["--ipc-start=9"], 1, "--ipc-start 9: the tasks are 0 to 2"),
    "nothing resized": (["--image-size=16"], 1, "--image-size 16 has no effect on digits, whose images are 8x8"),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c == ALONE else []) for c in BAD])
def test_bad_input_is_one_sentence_and_an_exit_code(run_module, call_module, small_flags, case):
    flags, code, words = BAD[case]
    run = run_module if case == ALONE else call_module
    done = run("distill", *(flags if case == "unknown recipe" else [*small_flags, *flags]))
    assert done.returncode == code, done.stderr
    assert words in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    if code == 1:
        assert sum(line.startswith("infer_fast: ") for line in done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_largest_seed_serves_everything_that_is_random(call_module, small_flags):
    """Teachers, views, students one after another, labels of every crop."""
    most = f"--seed={2**63 - 1}"
    done = call_module("distill", *small_flags, most, "--seeds=2", "--student.labels", "static", "fkd", "--compare=all")
    assert done.returncode == 0, done.stderr
    beyond = call_module("distill", *small_flags, f"--seed={2**63}")
    assert beyond.returncode == 2 and "--seed is 9223372036854775808" in beyond.stderr


@pytest.mark.parametrize("last", ["9" * 12, "9" * 5000, "²", "0", "-3"])
def test_a_last_task_that_is_no_number_in_range_is_bad_usage(call_module, last):
    done = call_module("distill", f"--ipc-end={last}", "--dry-run")
    assert done.returncode == 2 and "ipc-end" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_debug_shows_the_traceback(run_module, small_flags):
    done = run_module("distill", *small_flags, "--data-path=nowhere", "--debug")
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.slow
def test_a_diverging_batch_loses_none_of_the_others(tmp_path, call_module, small_flags, generator):
    """Teacher 1 can't be matched (its statistics are far away); all of teacher 0's tasks are saved all the same."""
    from infer_fast.models import build

    for name in ("convnet", "convnet-silu"):
        state = build(name, 10, (8, 8), seed=0).state_dict()
        if name == "convnet-silu":
            state["stages.0.1.running_mean"].fill_(1e38)
        torch.save(state, tmp_path / f"{name}.pth")
    done = call_module("distill", *small_flags, "--arch-path", "convnet.pth", "convnet-silu.pth", "--compare=none")
    assert done.returncode == 1 and "teacher convnet-silu, index 2, iteration 0 (before the first step" in done.stderr
    tasks = {p.name for p in (tmp_path / "runs" / "digits" / "tasks").glob("*/*")}
    assert tasks == {f"0-convnet-000{j}.safetensors" for j in range(3)}


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, call_module):
    done = call_module("distill", "digits-infer", "--dry-run")
    assert done.returncode == 0, done.stderr
    for words in ("28 tasks", "k = 7", "19,152 bytes of a budget of 19,200", "estimate"):
        assert words in done.stdout
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["teachers"]
    coded = call_module("distill", "--dry-run")
    assert "none: no compensators" in coded.stdout and "19,200 bytes for images (webp)" in coded.stdout


@pytest.mark.slow
def test_underscores_and_hyphens_are_alike(run_module):
    first, second = (
        run_module("distill", "--dry-run", f"--{flag}=3") for flag in ("first-bn-multiplier", "first_bn_multiplier")
    )
    assert first.returncode == second.returncode == 0


@pytest.mark.slow
def test_help_shows_settings_with_defaults(run_module):
    done = run_module("distill", "--help")
    assert done.returncode == 0
    for flag in (
        "--iteration",
        "--r-bn",
        "--first-bn-multiplier",
        "--ipc",
        "--init-path",
        "--steps",
        "--rho",
        "--r-var",
    ):
        assert flag in done.stdout
    assert "default: 150" in done.stdout


@pytest.mark.slow
def test_the_list_names_every_recipe_with_its_tasks_and_bytes(run_module):
    done = run_module("distill", "--list")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert set(lines) == {"recipe", *RECIPES}
    assert lines["cifar100-infer-ipc10"][3:8] == ["36", "1000", "9", "2,875,824", "900,000"]


@pytest.mark.slow
def test_what_a_run_began_with_is_kept_and_can_be_overruled(tmp_path, call_module, small_flags):
    flags = [f for f in small_flags if not f.startswith("--lanes")]
    done = call_module("distill", *flags, "--compare=none")
    assert done.returncode == 0, done.stderr
    room = tmp_path / "runs" / "digits" / "room.json"
    written = json.loads(room.read_text())
    assert written["lanes"] == [3, 3] or all(n >= 3 for n in written["lanes"])
    room.write_text(json.dumps({**written, "lanes": [1, 2], "chunks": [4, None]}))
    dry = call_module("distill", *flags, "--dry-run")
    assert "in 5 batches of up to 2 lanes (convnet: 4 images in one pass)" in dry.stdout, dry.stdout
    forced = call_module("distill", *flags, "--dry-run", "--lanes=3")
    assert "in 2 batches of up to 3 lanes\n" in forced.stdout, forced.stdout
    small = call_module("distill", *flags, "--dry-run", "--lanes=3", "--batch-size=6")
    assert "3 lanes (convnet: 6 images in one pass, convnet-silu: 6 images in one pass)" in small.stdout, small.stdout


def jpegs(folder, classes, train, val, size=(70, 90)):
    """Class folders of JPEG files, of one colour each and noise."""
    random = np.random.default_rng(0)
    for c in range(classes):
        for split, count in (("train", train), ("val", val)):
            place = folder / split / f"n{c:08d}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 60, (*size, 3)) + (37 * c) % 190
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.JPEG")


@pytest.mark.slow
@pytest.mark.parametrize("method, loader", [("infer", "dali"), ("dwa", "torch"), ("sre2l", "torch")])
def test_imagenet_recipes_go_the_whole_way_from_files(tmp_path, call_module, method, loader):
    """8 classes of JPEG files through both loaders, 2 iterations, every row of the table."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    jpegs(tmp_path / "data", 8, 4, 2)
    done = call_module(
        "distill", f"imagenet-{method}-ipc10", "--data-path=data", "--image-size=64", "--arch-name", "convnet",
        "--arch-weights=None", "--squeeze.epochs=1", f"--squeeze.loader={loader}", "--squeeze.batch-size=8",
        f"--student.loader={loader}", "--ipc=2", "--iteration=2", "--student.networks", "convnet128-batchnorm",
        "--student.epochs=2", "--student.batch-size=8", "--compare=all", "--seeds=1", "--batch-size=8", "--steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "runs" / f"imagenet-{method}-ipc10" / "results.json").read_text())["rows"]
    soft = "soft labels" if method == "infer" else "labels of every crop (FKD)"
    assert [(r["trained_on"], r["labels"]) for r in rows] == [
        ("distilled", soft), ("distilled", "hard labels"), ("random real", soft), ("random real", "hard labels"),
        ("whole dataset", "hard labels"),
    ]  # fmt: skip
    assert rows[0]["instances"] == 16 and rows[4]["instances"] == 32
    assert rows[0]["image_bytes"] <= rows[2]["image_bytes"] == 16 * 3 * 64 * 64


@pytest.mark.slow
def test_a_thousand_classes_of_224_pixels_are_planned_without_decoding_them(tmp_path, call_module):
    jpegs(tmp_path / "data", 1000, 10, 1, size=(8, 8))
    done = call_module("distill", "imagenet-infer-ipc10", "--data-path=data", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "10,000 training and 1,000 test images of 224x224, 1000 classes" in done.stdout
    assert "27 tasks of 2000 iterations" in done.stdout and "1,358,816,580 bytes" in done.stdout
    assert "squeeze 0.0 min" in done.stdout and not (tmp_path / "runs" / "imagenet-infer-ipc10").exists()


def test_settings_are_chosen_on_held_out_training_images(tmp_path, call_module, small_flags):
    flags = [*small_flags, "--compare=none", "--held-out=195", "--syn-data-path=held"]
    done = call_module("distill", *flags)
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "held" / "digits" / "card.json").read_text())
    data = card["dataset"]
    assert (data["held_out"], data["training_images"], data["test_images"]) == (195, 1000, 195)
    again = call_module("validate", "--syn-data-path=held/digits")
    assert again.returncode == 0 and (tmp_path / "held" / "digits" / "table.md").read_text() in again.stdout
    refused = call_module("distill", *small_flags, "--held-out=1195")
    assert refused.returncode == 1 and "--held-out 1195: digits has 1195 training images" in refused.stderr


def test_a_comparison_that_cannot_be_is_refused_before_the_work(call_module, small_flags):
    refused = call_module("distill", *small_flags, "--compare=coded")
    assert refused.returncode == 1 and "--compare coded: only a budget of bytes" in refused.stderr
    assert "squeeze" not in refused.stderr


def test_a_budget_of_bytes_counts_the_whole_file(tmp_path, run_module, small_flags):
    stored = ["--budget=bytes", "--codec=webp", "--quality=100", "--label-bits=uint8"]
    flags = [*small_flags, *stored, "--compensators=1", "--compensator-size=4"]
    planned = run_module("distill", *flags, "--dry-run")
    assert (
        planned.returncode == 0 and "k = about " in planned.stdout and "7,680 bytes for images (webp)" in planned.stdout
    )
    done = run_module("distill", *flags)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "digits"
    card = json.loads((run / "card.json").read_text())
    weight = (run / "distilled.safetensors").stat().st_size
    assert card["bytes"]["file"] == weight and 0.9 * 7680 < weight <= 7680
    distilled = infer_fast.load(run)
    assert distilled.base.shape[1] == card["k"] > 4 and distilled.compensators.values.shape == (2, 1, 3, 8, 8)
    assert distilled.stored_compensators.values.shape == (2, 1, 3, 4, 4) and "2 compensators of 4x4" in planned.stdout
    assert "synthesis: 12/12 task iterations" in done.stderr
    assert "random real, coded | soft" in done.stdout and "points" in done.stdout
    assert "The smallest teacher, convnet" in done.stdout
    assert "webp of quality 100, grey; the whole file has" in (run / "README.md").read_text()
    again = run_module("validate", f"--syn-data-path={run}")
    assert again.returncode == 0 and (run / "table.md").read_text() in again.stdout
    drawn = run_module("validate", f"--syn-data-path={run}", "--compare=random", "--budgets", "75%", "100%")
    assert drawn.returncode == 0 and drawn.stdout.strip().endswith("curve.png"), drawn.stderr
    curve = json.loads((run / "curve.json").read_text())["points"]
    assert [point["budget"] for point in curve] == [5760, 7680]
    for point in curve:
        rows = {row["trained_on"]: row for row in point["rows"]}
        assert set(rows) == {"distilled", "random real, coded", "random real"}
        assert all(row["image_bytes"] + row["label_bytes"] <= point["budget"] for row in rows.values())
    assert curve[0]["rows"][0]["instances"] < curve[1]["rows"][0]["instances"] == len(distilled)
    assert abs(curve[0]["rows"][0]["updates"] - curve[1]["rows"][0]["updates"]) <= 10
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    labelled = run_module("relabel", f"--syn-data-path={run}")
    assert "same labels as before" in labelled.stdout and weight == (run / "distilled.safetensors").stat().st_size
