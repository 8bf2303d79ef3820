"""The card: written, read back whole, and refused in a sentence where a field is missing or of another type."""

import json
from dataclasses import asdict

import pytest

from infer_fast.data.card import (
    ByteCard,
    Card,
    DatasetCard,
    ExecutionCard,
    Row,
    TaskCard,
    TeacherCard,
    VersionCard,
    read_card,
)
from infer_fast.data.pixels import AS_STORED
from infer_fast.errors import InferFastError
from infer_fast.recipes import RECIPES

ROW = Row("convnet", "distilled", "soft labels", 12, 30, 100, 20, (50.0, 60.0), (55.0, 60.0), (90.0, 100.0))


def card_of(classes, pixels=AS_STORED, recipe="digits"):
    """A whole card of a set with these class names."""
    return Card(
        recipe_name=recipe,
        recipe=RECIPES[recipe],
        dataset=DatasetCard("d", classes, pixels.mean, pixels.std, (5, 5), 60, 30, "f" * 64, None, "val", None),
        teachers=(TeacherCard("convnet", 90.5, "a" * 64, "../teachers/t.safetensors"),),
        k=2,
        ipc=3,
        bytes=ByteCard(100, 120, 20, 4500, 45.0),
        tasks=(TaskCard("convnet", 0, 3.5, 1.25),),
        how=ExecutionCard("float32", "eager", "auto", "cpu", (2,), (None,)),
        versions=VersionCard("0.1.0", "2.14", "3.11"),
        device="CPU, 2 threads",
        seconds={"squeeze": 1.5},
        table="| a |",
        results=(ROW,),
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_comes_back_whole(tmp_path, recipe):
    card = card_of(("a", "b"), recipe=recipe)
    card.write(tmp_path)
    before = (tmp_path / "card.json").read_bytes()
    assert read_card(tmp_path) == card
    read_card(tmp_path).write(tmp_path)
    assert (tmp_path / "card.json").read_bytes() == before


WRONG = {
    ("recipe", "student", "lr"): ("fast", "recipe.student.lr is 'fast', expected a number"),
    ("recipe", "synthesis", "optimise"): ("words", "recipe.synthesis.optimise is 'words', expected one of compensator"),
    ("dataset", "mean"): ([0.5], "dataset.mean has 1 values, expected 3"),
    ("teachers", 0, "accuracy"): (None, r"teachers\[0\].accuracy is None, expected a number"),
    ("how", "lanes"): (2, "how.lanes is 2, expected a list"),
    ("results", 0, "last", 1): (True, r"results\[0\].last\[1\] is True, expected a number"),
    ("k",): (2.5, "k is 2.5, expected a whole number"),
    ("seconds", "squeeze"): ("long", "seconds.squeeze is 'long', expected a number"),
}


@pytest.mark.parametrize("path", WRONG, ids=lambda path: ".".join(map(str, path)))
def test_a_wrong_or_missing_field_is_named_with_its_file(tmp_path, path):
    value, words = WRONG[path]
    card = json.loads(json.dumps(asdict(card_of(("a", "b")))))
    inner = card
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(InferFastError, match=rf"card.json: {words}"):
        read_card(tmp_path)
    if isinstance(inner, dict) and path[0] != "seconds":
        del inner[path[-1]]
        (tmp_path / "card.json").write_text(json.dumps(card))
        with pytest.raises(InferFastError, match=rf"card.json: \S*{path[-1]} is missing"):
            read_card(tmp_path)
