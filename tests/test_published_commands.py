"""The command lines of the published scripts, with only the script's path replaced, on small stand-ins."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from infer_fast import cli
from infer_fast.distill import DistillOptions, _recipe
from infer_fast.validate import ValidateOptions, _Where

SYNTHESIS = {
    "cifar": (
        "--iteration 1000 --r-bn 0.01 --batch-size 100 --lr 0.25 --exp-name distillation-c100-ipc50 "
        "--store-best-images --syn-data-path ./syn_data/ --init_path ./distillation/init_images/cifar100 "
        "--steps 12 --rho 15e-3 --ipc-start 0 --ipc-end 50 --r-var 11 --dataset cifar100"
    ),
    "tiny": (
        "--iteration 2000 --r-bn 0.01 --batch-size 200 --lr 0.1 --exp-name distillation-tiny-ipc50 "
        "--store-best-images --syn-data-path ./syn_data/ --init-path ./distillation/init_images/tiny "
        "--steps 12 --rho 15e-3 --ipc-start 0 --ipc-end 50 --r-var 11 --dataset tiny"
    ),
    "imgnet": (
        "--exp-name distillation-imgnet-ipc50 --syn-data-path ./syn_data/ "
        "--init-path ./distillation/init_images/imgnet/ --arch-name resnet18 --batch-size 100 --lr 0.25 "
        "--iteration 2000 --r-bn 0.01 --r-var 2 --steps 15 --rho 15e-3 --store-best-images --ipc-start 0 --ipc-end 50"
    ),
}
VALIDATION = {
    "cifar": (
        "--epochs 400 --batch-size 128 --ipc 10 --syn-data-path ./syn_data/distillation-c100-ipc50 "
        "--output-dir ./syn_data/validation-c100-ipc50 --networks resnet18 --dataset cifar100"
    ),
    "tiny": (
        "--epochs 200 --batch-size 64 --ipc 50 --lr 0.2 --momentum 0.9 --weight-decay 1e-4 "
        "--lr-scheduler cosineannealinglr --lr-warmup-epochs 5 --lr-warmup-method linear --lr-warmup-decay 0.01 "
        "--data-path ./data/tiny/ --syn-data-path ./syn_data/distillation-tiny-ipc50/ --model resnet18"
    ),
    "imgnet": (
        "--epochs 300 --batch-size 128 --ipc 50 --mix-type cutmix --cos -T 20 -j 4 "
        "--train-dir ./syn_data/distillation-imgnet-ipc50 --output-dir ./syn_data/validation-imgnet-ipc50 "
        "--val-dir ./data/imgnet/val --teacher-model resnet18 --model resnet18"
    ),
}
SHRUNK = (  # what makes a run take seconds: further flags, after the published ones
    "--arch-name convnet --iteration 2 --ipc 2 --ipc-end 2 --squeeze.epochs 1 --student.networks convnet "
    "--student.epochs 1 --seeds 1 --compare none"
)
STAND_INS = {  # classes, pixels, and where they are
    "cifar": (10, 32, "--data-path data/cifar"),
    "tiny": (4, 64, "--data-path data/tiny"),
    "imgnet": (4, 64, "--dataset imagenet --data-path data/imgnet --image-size 64 --arch-weights None"),
}
OTHERS = {  # another value for each flag that has one
    "--iteration": "3", "--r-bn": "0.5", "--batch-size": "77", "--lr": "0.3", "--exp-name": "other",
    "--syn-data-path": "elsewhere", "--train-dir": "elsewhere", "--init_path": "elsewhere", "--init-path": "elsewhere",
    "--steps": "2", "--rho": "0.2", "--ipc-start": "1", "--ipc-end": "60", "--r-var": "3", "--dataset": "digits",
    "--arch-name": "convnet", "--epochs": "3", "--ipc": "20", "--output-dir": "elsewhere", "--networks": "convnet",
    "--model": "convnet", "--momentum": "0.5", "--weight-decay": "0.3", "--lr-scheduler": "steplr",
    "--lr-warmup-epochs": "2", "--lr-warmup-method": "constant", "--lr-warmup-decay": "0.2", "--data-path": "elsewhere",
    "--mix-type": "mixup", "-T": "3", "-j": "2", "--val-dir": "elsewhere", "--teacher-model": "convnet",
}  # fmt: skip


def stand_in(name, folder):
    """The dataset as class folders of PNG files, and base images as the published scripts keep them."""
    classes, size, _ = STAND_INS[name]
    random = np.random.default_rng(0)
    for c in range(classes):
        for split, count in (("train", 4), ("val", 2)):
            place = folder / "data" / name / split / f"c{c:02d}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 80, (size, size, 3)) + 17 * c % 170
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    init = folder / "distillation" / "init_images" / {"cifar": "cifar100"}.get(name, name)
    if name == "imgnet":  # class folders of images
        shutil.copytree(folder / "data" / name / "train", init)
        return
    init.mkdir(parents=True)
    for j in range(2):
        torch.save(torch.randn(classes, 3, size, size), init / f"tensor_{j}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name", SYNTHESIS)
def test_the_published_commands_run(tmp_path, call_module, name):
    stand_in(name, tmp_path)
    classes, size, where = STAND_INS[name]
    made = call_module("distill", *SYNTHESIS[name].split(), *SHRUNK.split(), *where.split())
    assert made.returncode == 0, made.stderr
    (run,) = (tmp_path / "syn_data").glob("distillation-*")
    card = json.loads((run / "card.json").read_text())["recipe"]["synthesis"]
    assert (card["r_bn"], card["rho"], card["steps"]) == (0.01, 15e-3, 15 if name == "imgnet" else 12)
    assert len(list((run / "images").glob("new*/class*_id*.jpg"))) == classes * 1 * 2  # k = 1, bare and compensated
    with safe_open(run / "distilled.safetensors", framework="pt") as file:
        assert file.get_slice("base").get_shape() == [classes, 1, 3, size, size]

    flags = "--epochs 1 --seeds 1 --ipc 2 --networks convnet" + (" --teacher-model convnet" if name == "imgnet" else "")
    flags += "" if name == "tiny" else " --data-path data/" + name
    judged = call_module("validate", *VALIDATION[name].split(), *flags.split())
    assert judged.returncode == 0, judged.stderr
    assert "| convnet | distilled | soft labels | " in judged.stdout
    results = run if name == "tiny" else next((tmp_path / "syn_data").glob("validation-*"))
    assert json.loads((results / "results.json").read_text())["rows"][0]["trained_on"] == "distilled"


def parsed(module, words):
    if module == "distill":
        name, recipe, flags = _recipe(words)
        return {"recipe_name": name, **asdict(cli.parse(DistillOptions, DistillOptions(recipe), flags, "t", ""))}
    folder = cli.glance(_Where, words, "t").syn_data_path
    return asdict(cli.parse(ValidateOptions, ValidateOptions(folder), words, "t", ""))


@pytest.mark.parametrize("module, name", [(m, n) for m in ("distill", "validate") for n in SYNTHESIS])
def test_every_flag_of_the_published_commands_changes_the_plan(module, name):
    words = (SYNTHESIS if module == "distill" else VALIDATION)[name].split()
    plan = parsed(module, words)
    for position, word in enumerate(words):
        if not word.startswith("-"):
            continue
        if word == "--store-best-images":
            changed = words[:position] + words[position + 1 :]
        elif word == "--cos":
            changed = [*words[:position], "--no-cos", *words[position + 1 :]]
        else:
            changed = [*words[: position + 1], OTHERS[word], *words[position + 2 :]]
        assert parsed(module, changed) != plan, word


def test_the_published_commands_choose_their_recipe_and_budget():
    assert parsed("distill", SYNTHESIS["cifar"].split())["recipe_name"] == "cifar100-infer-ipc10"
    plan = parsed("distill", SYNTHESIS["tiny"].split())
    assert plan["recipe_name"] == "tiny-infer-ipc10" and plan["recipe"]["ipc"] == 50
    assert plan["recipe"]["arch_name"] == ("resnet18", "mobilenetv2", "efficientnet_b0", "shufflenet_g2")
    asked = parsed("distill", [*SYNTHESIS["cifar"].split(), "--ipc", "20"])
    assert asked["recipe"]["ipc"] == 20 and asked["ipc_end"] == 50
    named = parsed("distill", ["cifar10-dwa-ipc10", "--ipc-end", "50"])
    assert named["recipe"]["ipc"] == 10
