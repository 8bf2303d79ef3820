"""Accuracy against bytes: which budgets there are, and for which sets."""

import pytest

from infer_fast.curve import points, shares_of
from infer_fast.errors import InferFastError
from infer_fast.settings import Recipe
from infer_fast.students.candidates import Evaluation
from infer_fast.validate import validate

from .test_validate import STUDENT, parts  # noqa: F401  the fixture


def test_budgets_are_shares():
    assert shares_of(["25%", "50", "200%", "12.5%"]) == [0.25, 0.5, 2.0, 0.125]


@pytest.mark.parametrize("word", ["half", "0%", "-5%", "nan", "inf%", ""])
def test_what_is_no_budget_is_an_error(word):
    with pytest.raises(InferFastError, match="--budgets"):
        shares_of([word])


def test_a_set_that_counts_images_has_no_curve(parts):  # noqa: F811
    with pytest.raises(InferFastError, match="whose budget counts bytes"):
        points(Evaluation(*parts, STUDENT, ipc=3), Recipe(), [0.5], validate)
