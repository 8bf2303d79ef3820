"""Hashes of values and tensors."""

import torch

from infer_fast.keys import key_of


def test_a_key_is_that_of_values_types_and_shapes(generator):
    values = torch.randint(0, 256, (4, 6), generator=generator, dtype=torch.uint8)
    keys = [
        key_of({"a": 1}, [values]), key_of({"a": 2}, [values]), key_of({"a": 1}, [values.view(6, 4)]),
        key_of({"a": 1}, [values.view(torch.int8)]), key_of({"a": 1}), key_of({"a": 1}, [values, values]),
        key_of({"a": 1}, [torch.tensor(1)]),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key_of({"a": 1, "b": (2,)}, [None, values.t().t()]) == key_of({"b": [2], "a": 1}, [values.clone()])
