"""The CUDA path on a stand-in for an H100 (see tests/stand_in): values, lawful captures, memory, launches.

Each check is a function of a module in tests/stand_in; a module's checks run in one process under the stand-in, whose
first test waits for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.conftest import SEED
from tests.stand_in.checks import names_of
from tests.stand_in.process import StandIn, why_not

reason = why_not()
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no stand-in for a GPU: {reason}")

Outcomes = dict[str, str | None]  # of each check: what failed, or None


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return StandIn.compiled(tmp_path_factory.mktemp("stand_in"))


@pytest.fixture(scope="module")
def outcomes(stand_in: StandIn) -> Callable[[str], Outcomes]:
    """outcomes(module): what its checks said, run once."""
    known: dict[str, Outcomes] = {}

    def of(module: str) -> Outcomes:
        if module not in known:
            done = stand_in.run("tests.stand_in.checks", module, str(SEED))
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["check_')]
            known[module] = dict.fromkeys(names_of(module), f"did not come to its end: {done.stderr[-3000:]}")
            known[module] |= {name: failed for name, _, failed in lines}
        return known[module]

    return of


def checks(module: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("check", names_of(module), ids=lambda name: name.removeprefix("check_"))


@checks("device")
def test_torch_takes_the_stand_in_for_a_gpu(outcomes, check):
    assert outcomes("device")[check] is None, outcomes("device")[check]


@pytest.mark.slow
@checks("engines")
def test_a_captured_synthesis_is_the_eager_one(outcomes, check):
    assert outcomes("engines")[check] is None, outcomes("engines")[check]


@pytest.mark.slow
@checks("training")
def test_captured_training_is_the_eager_one(outcomes, check):
    assert outcomes("training")[check] is None, outcomes("training")[check]


@pytest.mark.slow
@checks("commands")
def test_whole_commands_do_nothing_that_a_capture_forbids(outcomes, check):
    assert outcomes("commands")[check] is None, outcomes("commands")[check]


@pytest.mark.slow
@checks("memory")
def test_device_memory_goes_back_without_the_collector(outcomes, check):
    assert outcomes("memory")[check] is None, outcomes("memory")[check]


@pytest.mark.slow
@checks("launches")
def test_an_iteration_launches_no_more_than_it_did(outcomes, check):
    assert outcomes("launches")[check] is None, outcomes("launches")[check]


@pytest.mark.slow
@checks("published")
def test_iterations_of_the_published_sizes_are_captured_without_a_hazard(outcomes, check):
    assert outcomes("published")[check] is None, outcomes("published")[check]
