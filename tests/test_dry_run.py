"""The dry run's estimate counts the rows that will be made."""

from dataclasses import replace

import pytest

from infer_fast.dry_run import _validation_seconds
from infer_fast.errors import InferFastError
from infer_fast.recipes import RECIPES
from infer_fast.settings import StudentSettings
from infer_fast.students.candidates import Evaluation, candidates, epochs_of, kinds
from infer_fast.synthesis.plan import make_plan

from .test_validate import parts  # noqa: F401  the fixture


@pytest.mark.parametrize("labels", [("static",), ("static", "dynamic"), ("fkd", "static", "dynamic"), ("fkd", "fkd")])
@pytest.mark.parametrize("compare", ["none", "random", "all"])
def test_kinds_are_the_candidates_that_are_made(parts, tmp_path, compare, labels):  # noqa: F811
    settings = StudentSettings(networks=("convnet",), epochs=6, batch_size=8, labels=labels)
    evaluation = Evaluation(*parts, settings, ipc=3, compare=compare)
    expected, made = kinds(compare, labels), candidates(evaluation, tmp_path)
    assert [(kind.trained_on, epochs_of(kind, settings, 1) * 2) for kind in expected] == [
        (c.trained_on, c.updates) for c in made
    ]


def test_a_codec_alone_is_compared_where_bytes_are_counted():
    assert [k.trained_on for k in kinds("coded", ["static"], coded=True)] == ["distilled", "random real, coded"]
    with pytest.raises(InferFastError, match="--compare coded: only a budget of bytes"):
        kinds("coded", ["static"])


def test_the_estimate_grows_with_every_kind_of_labels():
    recipe = RECIPES["cifar10-infer-ipc10"]
    plan = make_plan(recipe, 10, (32, 32))

    def seconds(*labels):
        own = replace(recipe, compare="random", seeds=3, student=replace(recipe.student, labels=labels))
        return _validation_seconds(plan, own, training=2.0, labelling=1.0) / plan.instances

    static = 2 * 3 * 400 * 2.0  # rows, seeds, epochs, seconds of an instance
    assert seconds("static") == pytest.approx(static)
    assert seconds("static", "dynamic") == pytest.approx(static + 2 * 3 * 80 * (2.0 + 1.0))
    stored = 400 * 1.0  # the distilled set's labels of every crop are made once; real images' for each student
    assert seconds("static", "fkd") == pytest.approx(2 * static + stored + 3 * 400 * 1.0)
