"""The state dict is found under whatever key, with whatever prefix; several that fit are not guessed between."""

import collections
import string

import numpy as np
import pytest
import torch

from infer_fast.errors import InferFastError
from infer_fast.models import build
from infer_fast.models.state_dicts import find_state, listed

STATE = build("convnet", 4, (8, 8), seed=0).state_dict()


def named(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state=STATE):
    return {name: tensor + 1 for name, tensor in state.items()}


def word(generator):
    return "".join(string.ascii_lowercase[int(i)] for i in torch.randint(0, 26, (8,), generator=generator))


def found(loaded):
    return find_state(loaded, STATE, "file.pth")


def same(state):
    return set(state) == set(STATE) and all(torch.equal(state[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "net.", "model._orig_mod.", "module.encoder.", "a.b.c."])
def test_a_prefix_that_makes_the_names_fit_is_taken_off(prefix):
    assert same(found(named(prefix)))
    assert same(found({"state_dict": named(prefix), "epoch": 3}))
    assert same(found({"state_dict": {**named(prefix), "criterion.weight": torch.ones(4)}}))


def test_any_prefix_under_any_key_will_do(generator):
    prefix, key, inner = (word(generator) for _ in range(3))
    assert same(found({key: {inner: named(f"{prefix}.")}, "step": torch.tensor(3)}))


@pytest.mark.parametrize("key", ["ema", "state_dict_ema", "weights", "params", "student_state_dict"])
def test_a_state_dict_under_another_key_is_found(key):
    assert same(
        found({key: STATE, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}})
    )


def test_usual_keys_go_before_others_in_their_order():
    assert same(found({"model_ema": other(), "model": STATE}))
    assert same(found({"net": other(), "state_dict": STATE}))
    assert same(found({"model": {"stem.weight": torch.ones(3)}, "ema": STATE}))


@pytest.mark.parametrize(
    ("loaded", "words"),
    [
        ({**named("student."), **named("teacher.", other())}, "with the prefix student., with the prefix teacher."),
        ({"student": STATE, "teacher": other()}, "under student, under teacher"),
        ({"state_dict": {**named("a."), **named("b.")}}, "under state_dict with the prefix a., under state_dict with"),
    ],
)
def test_several_that_fit_are_named_and_not_chosen_from(loaded, words):
    with pytest.raises(InferFastError, match="file.pth holds several state dicts that fit") as caught:
        found(loaded)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("loaded", "words"),
    [
        ([STATE], "it holds a list"),
        ({}, "it holds nothing"),
        ({"epoch": 3, "lr": 0.1}, "it holds epoch, lr"),
        ({0: torch.ones(3), 1: torch.ones(3)}, "it holds 0, 1"),
        (dict.fromkeys(string.ascii_lowercase, 1), "it holds a, b, c, d, e, f and 20 more"),
    ],
)
def test_what_is_no_state_dict_is_said_to_be_what_it_is(loaded, words):
    with pytest.raises(InferFastError, match="file.pth holds no state dict") as caught:
        found(loaded)
    assert words in str(caught.value)


def test_integer_keys_beside_names_are_passed_over():
    assert same(found({**STATE, 0: torch.ones(3)}))
    assert same(found(collections.OrderedDict({7: {1: torch.ones(2)}, "model": STATE})))


def test_what_tools_leave_among_the_weights_is_passed_over():
    counted = {
        **STATE,
        "total_ops": torch.zeros(1),
        "stages.0.total_params": torch.zeros(1),
        "best_acc1": torch.ones(()),
    }
    assert same({name: tensor for name, tensor in found(counted).items() if name in STATE})


@pytest.mark.parametrize("order", ["=", ">"])
def test_arrays_of_numpy_are_tensors(order):
    arrays = {name: tensor.numpy() for name, tensor in STATE.items()}
    assert same(found({name: a.astype(a.dtype.newbyteorder(order)) for name, a in arrays.items()}))
    with pytest.raises(InferFastError, match="no state dict"):
        found({"a": np.array(["text"]), "b": np.array([None])})


def test_where_none_fits_the_usual_or_largest_is_given_back():
    assert set(found({"state_dict": {"x.weight": torch.ones(3)}, "other": named("y", {"a": torch.ones(1)})})) == {
        "x.weight"
    }
    assert listed({"a": 1}) == "a"
