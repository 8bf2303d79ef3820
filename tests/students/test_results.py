"""The table's last line: how far the set is ahead of random real images, in words."""

from dataclasses import replace

from infer_fast.data.card import Row
from infer_fast.students.results import verdict

ROW = Row("convnet", "distilled", "soft labels", 90, 100, 900, 90, (80.0, 82.0), (83.0, 83.0), (99.0, 99.0))


def other(trained_on, labels, *last):
    return replace(ROW, trained_on=trained_on, labels=labels, last=last)


def test_a_set_alone_gets_no_verdict():
    assert verdict([ROW]) == ""


def test_ahead_and_behind_are_said_with_the_standard_error():
    ahead = verdict([ROW, other("random real", "soft labels", 70.0, 74.0)])
    # sqrt((1.4142^2 + 2.8284^2) / 2)
    assert (
        ahead == "convnet, n=2: the distilled set is 9.00 ± 2.24 points ahead of random real (soft labels); IOR 9.00."
    )
    behind = verdict([ROW, other("random real", "soft labels", 85.0, 85.0)])
    assert "4.00 ± 1.00 points behind random real" in behind and "IOR -4.00" in behind


def test_images_through_the_same_codec_come_first_and_each_kind_of_labels_is_said():
    rows = [
        ROW,
        other("distilled", "hard labels", 70.0, 70.0),
        other("random real, coded", "soft labels", 81.0, 81.0),
        other("random real, coded", "hard labels", 60.0, 60.0),
        other("random real", "soft labels", 50.0, 50.0),
        other("whole dataset", "hard labels", 90.0, 90.0),
    ]
    assert verdict(rows) == (
        "convnet, n=2: the distilled set is 0.00 ± 1.00 points ahead of random real, coded (soft labels), "
        "10.00 ± 0.00 points ahead of random real, coded (hard labels); HLR 20.00, IOR 31.00."
    )


def test_every_student_has_its_own_and_one_seed_has_no_error():
    rows = [replace(ROW, last=(80.0,)), other("random real", "soft labels", 79.5)]
    both = [*rows, *(replace(row, network="resnet18") for row in rows)]
    first, second = verdict(both).splitlines()
    assert first == "convnet, n=1: the distilled set is 0.50 points ahead of random real (soft labels); IOR 0.50."
    assert second.startswith("resnet18, n=1: ")
