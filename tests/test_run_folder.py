"""A run's folder: its name, its lock, and where its card may lead."""

import os
import subprocess
import sys

import pytest

from infer_fast.errors import InferFastError
from infer_fast.run_folder import at_work, check_name, place_in_card, remember_places, teacher_in_card, writable


@pytest.mark.parametrize("name", ["digits", "a/b", "x.y", "Ä 1", "..a", "a" * 100, "cifar10-infer-ipc10"])
def test_names_of_files_below_a_folder(name):
    assert check_name("--exp-name", name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../b", "a/..", "/x", "a//b", "a/", "\0", "a\nb", "a\\b", "a" * 101, "...", "\x1b[2J"],
)
def test_names_that_lead_elsewhere_are_refused(name):
    with pytest.raises(InferFastError, match="--exp-name .* can't name a file below a folder"):
        check_name("--exp-name", name)


HOLDS = """
import sys, time
from pathlib import Path
from infer_fast.run_folder import at_work
with at_work(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("theirs", "ours", "together"), [
    ("alone", False, False), ("alone", True, False), ("shared", False, False), ("shared", True, True),
])  # fmt: skip
def test_one_run_works_in_a_folder_or_several_that_share_the_work(tmp_path, theirs, ours, together):
    other = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path, theirs], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "at work\n"
    try:
        if together:
            with at_work(tmp_path, shared=ours):
                pass
        else:
            with pytest.raises(InferFastError, match="Another run is at work"), at_work(tmp_path, shared=ours):
                pass
    finally:
        other.kill()
        other.wait()
    with at_work(tmp_path):  # however the other one ended
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [
    "/etc", "/dev/zero", "../data", "a/../../b", "~/x", "..", "nowhere", "../../etc/passwd", "\0",
])  # fmt: skip
def test_a_card_leads_to_no_dataset_that_nobody_gave(tmp_path, place):
    folder = tmp_path / "runs" / "theirs"
    folder.mkdir(parents=True)
    with pytest.raises(InferFastError, match="say so with --data-path"):
        place_in_card(folder, place, "--data-path")


def test_a_card_leads_into_its_folder_and_to_what_was_given_before(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "ours"
    (folder / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert place_in_card(folder, None, "--data-path") is None
    assert place_in_card(folder, "inside", "--data-path") == folder / "inside"
    remember_places(tmp_path / "runs", [tmp_path / "data", None])
    assert place_in_card(folder, str(tmp_path / "data"), "--data-path") == tmp_path / "data"
    with pytest.raises(InferFastError):
        place_in_card(tmp_path / "others" / "theirs", str(tmp_path / "data"), "--data-path")


@pytest.mark.parametrize("place", ["t.safetensors", "a/t.safetensors", "../teachers/t.safetensors", "../../teachers/t"])
def test_teachers_lie_in_the_folder_or_beside_the_runs(tmp_path, place):
    assert teacher_in_card(tmp_path, place) == tmp_path / place


@pytest.mark.parametrize("place", [
    "/t.safetensors", "../t.safetensors", "../../t", "a/../../teachers/t", "../teachers/../t", "../teachers", "~/t",
    "../teachers/a/b", "/etc/passwd", "../../../../etc/passwd", "../teachers/a\\..\\b", "..",
])  # fmt: skip
def test_teachers_elsewhere_are_refused(tmp_path, place):
    with pytest.raises(InferFastError, match="names the teacher .* which is out of its folder"):
        teacher_in_card(tmp_path, place)


def test_what_can_be_written_is_known_before(tmp_path, monkeypatch):
    assert writable(tmp_path) and writable(tmp_path / "a" / "b")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert not writable(tmp_path) and not writable(tmp_path / "a" / "b")
