"""Values that no network has are found, wherever they are."""

import pytest
import torch

from infer_fast.models import build
from infer_fast.models.weights import faulty

STATE = build("convnet", 4, (8, 8), seed=0).state_dict()
FLOATS = [name for name, tensor in STATE.items() if tensor.is_floating_point()]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize(("value", "words"), [("nan", "NaN"), ("inf", "infinity"), ("-inf", "infinity")])
def test_one_value_of_any_tensor_is_enough(generator, name, value, words):
    state = {key: tensor.clone() for key, tensor in STATE.items()}
    assert faulty(state) is None
    state[name].view(-1)[int(torch.randint(0, state[name].numel(), (1,), generator=generator))] = float(value)
    assert faulty(state) == f"{name} holds {words}"


def test_variances_alone_are_not_negative():
    state = {"conv.weight": -torch.ones(3), "norm.running_var": torch.tensor([0.0, 1.0]), "count": torch.tensor(-1)}
    assert faulty(state) is None
    state["norm.running_var"][0] = -1e-30
    assert faulty(state) == "norm.running_var holds a variance below 0"


def test_nothing_and_empty_tensors_are_well():
    assert faulty({}) is None and faulty({"a": torch.empty(0), "b": torch.tensor([1])}) is None
