"""What auto means on a device, resolved once."""

import warnings

import pytest
import torch

from infer_fast.errors import InferFastError, InferFastWarning
from infer_fast.models import execution
from infer_fast.models.execution import AUTO, Execution, at_precision, choose_precision


@pytest.mark.parametrize("supported", [True, False])
def test_fast_is_bfloat16_where_the_processor_has_it(monkeypatch, supported):
    monkeypatch.setattr(execution, "processor_has_bfloat16", lambda: supported)
    cpu = torch.device("cpu")
    assert choose_precision(cpu, "fast") == ("bfloat16" if supported else "float32")
    assert choose_precision(cpu, "auto") == "float32" and choose_precision(torch.device("cuda"), "fast") == "bfloat16"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert choose_precision(cpu, "bfloat16") == "bfloat16"  # asked for by name: it is done
    assert [w.category for w in caught] == [InferFastWarning] * (not supported)


def test_an_execution_is_resolved_once_and_remembers_that_the_engine_was_free():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert AUTO.on(cpu) == Execution("float32", "eager", "auto", any_engine=True)
    assert AUTO.on(cuda) == Execution("bfloat16", "graph", "auto", any_engine=True)
    assert AUTO.on(cuda).on(cuda) == AUTO.on(cuda)
    asked = Execution("float32", "compile", "reference").on(cpu)
    assert asked == Execution("float32", "compile", "reference") and asked.forced_backend == "reference"
    assert AUTO.forced_backend is None
    with pytest.raises(InferFastError, match="not a precision"):
        Execution("int8").on(cpu)
    with pytest.raises(InferFastError, match="graph needs a CUDA device"):
        Execution(engine="graph").on(cpu)


def test_a_pass_takes_a_precision_that_is_resolved():
    cpu = torch.device("cpu")
    with at_precision(cpu, "bfloat16"):
        assert torch.is_autocast_enabled("cpu")
    with at_precision(cpu, "float32"):
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(KeyError), at_precision(cpu, "auto"):
        pass
