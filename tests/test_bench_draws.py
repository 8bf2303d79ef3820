"""Draws of base images: what is compared with what, the standard error, and the whole way."""

import json
import math
from dataclasses import replace

import pytest

from bench import draws
from infer_fast import cli
from tests.data.test_card import ROW


def row(trained_on, *last, labels="soft labels"):
    return replace(ROW, trained_on=trained_on, labels=labels, last=last)


def test_a_distilled_row_is_compared_with_its_codecs():
    rows = [
        row("distilled", 60.0, 62.0),
        row("distilled", 50.0, labels="hard labels"),
        row("random real, coded", 58.0, 60.0),
        row("random real, coded", 51.0, labels="hard labels"),
        row("random real", 20.0, 30.0),
    ]
    soft, hard = draws.compared(rows)
    assert (soft.labels, soft.distilled, soft.random_coded, soft.students, soft.ahead) == ("soft labels", 61, 59, 2, 2)
    assert (hard.labels, hard.ahead, hard.students) == ("hard labels", -1, 1)


def test_the_standard_error_is_that_of_the_draws():
    made = [draws.Draw("soft labels", 60.0 + ahead, 60.0, 3) for ahead in (1.0, 2.0, 3.0)]
    assert "difference +2.00 ± " + f"{1 / math.sqrt(3):.2f}" in draws.verdict(made)
    assert "3 draws of 3 students" in draws.verdict(made)


@pytest.mark.slow
def test_draws_share_their_teachers_and_nothing_else(tmp_path, monkeypatch, capfd, small_flags):
    monkeypatch.chdir(tmp_path)
    flags = [*small_flags, "--budget=bytes", "--codec=webp", "--label-bits=uint8", "--compensators=0", "--seeds=2"]
    assert cli.run(draws._main, ["digits", *flags, "--draws=2", "--output=draws.json"]) == 0
    said = capfd.readouterr()
    assert "2 draws of 2 students" in said.out and said.err.count("2390/2390 images") == 2  # once
    cards = [json.loads((tmp_path / "runs" / "digits-draws" / n / "card.json").read_text()) for n in "01"]
    assert [t["accuracy"] for t in cards[0]["teachers"]] == [t["accuracy"] for t in cards[1]["teachers"]]
    assert cards[0]["pixels"] != cards[1]["pixels"]
    assert {r["trained_on"] for r in cards[0]["results"]} == {"distilled", "random real, coded"}
    result = json.loads((tmp_path / "draws.json").read_text())
    assert [r["ahead"] for r in result["rows"]] == [r["distilled"] - r["random_coded"] for r in result["rows"]]
    assert cli.run(draws._main, ["digits", *flags, "--draws=1"]) == 1
    assert "--draws 1" in capfd.readouterr().err
