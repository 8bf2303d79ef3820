"""Triton kernels without a GPU: how they are cut into programs, how many of them four teachers ask for, and that each
compiles for Hopper, spilling no register, in forms that its launcher asks for, moving 16 bytes at a time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from infer_fast.kernels.bn_match_plan import RESIDENT, plan

HOPPER = 132  # multiprocessors
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("rows", [True, False], ids=["channels_last", "contiguous"])
@pytest.mark.parametrize(
    "shape", [(100, 64, 1024), (100, 24, 256), (7, 67, 45), (1, 1, 1), (100, 1280, 16), (3, 9, 49)]
)
@pytest.mark.parametrize(("lanes", "itemsize", "multiprocessors"), [(1, 2, HOPPER), (3, 4, 1), (32, 2, HOPPER)])
def test_a_plan_takes_every_element_and_leaves_no_program_idle(shape, rows, lanes, itemsize, multiprocessors):
    images, channels, plane = shape
    cut = plan(images, channels, plane, rows, lanes, itemsize, multiprocessors)
    across, splits, planned_lanes = cut.grid
    outers = -(-cut.size // cut.inners) if rows else images
    outer = cut.tile // cut.block
    assert cut.size == images * channels * plane and planned_lanes == lanes
    assert splits * cut.steps * outer >= outers > (splits - 1) * cut.steps * outer
    assert across * cut.block == cut.inners and cut.inners % channels == 0 if rows else across == channels
    assert cut.parts == splits * (cut.inners // channels if rows else 1)
    assert cut.vector == 1 or cut.inners % cut.vector == cut.size % cut.vector == 0
    assert cut.tile % (cut.warps * 32) == 0 and outer >= 2


@pytest.mark.parametrize("channels", [8, 24, 40, 116, 144, 200, 512])
def test_channels_last_every_thread_has_work_and_every_access_is_aligned(channels):
    cut = plan(100, channels, 1024, True, 1, 2, HOPPER)
    assert (cut.inners % cut.block, cut.block * 2, cut.vector) == (0, 128, 8)


def test_small_problems_are_cut_smaller_and_large_ones_fill_the_processor():
    small, large = (plan(100, channels, plane, True, 1, 2, HOPPER) for channels, plane in ((512, 16), (64, 1024)))
    assert (small.warps, large.warps, small.steps) == (4, 8, 1)
    assert small.grid[0] * small.grid[1] >= HOPPER
    programs = large.grid[0] * large.grid[1]
    assert 0.5 * RESIDENT * HOPPER <= programs * large.warps <= RESIDENT * HOPPER
    assert plan(100, 64, 1024, True, 1, 4, HOPPER).tile * 2 == large.tile  # as many bytes a thread


@pytest.mark.slow
@needs_triton
def test_four_teachers_ask_for_few_kernels(tmp_path):
    told = json.loads(run("tests.launched_kernels", tmp_path))
    assert told == {
        "launches_of_a_layer": 3.0,
        "forms": {"_forward": 10, "_backward": 17, "_finish": 1},
    }


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_for_hopper_spills_no_register_and_moves_16_bytes_at_a_time(tmp_path):
    assert int(run("tests.compiled_kernels", tmp_path).removesuffix(" kernels")) >= 50


def run(module, folder):
    """What a program that needs Triton itself, not its interpreter, says."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
