"""The names of what stands beside the params, and params that merely look like it."""

import pytest

from qwix_train.planning.leaves import Leaf, OperandName, adapter_part, range_of

# As qwix 0.1.8 and its files have them.
OF_PARAMS = ["scale", "zero_point", "lora_a", "lora_b", "lora_magnitude"]
OF_RANGES = ["scale", "zero_point", "offset", "alpha", "pre_quant_scale"]


@pytest.mark.parametrize("part", OF_PARAMS)
def test_a_leaf_of_a_param_is_read_as_it_is_named(part):
    owner, path = ("Dense_0", "kernel"), ("Dense_0", f"kernel_{part}")
    assert Leaf(owner, part).path == path
    assert Leaf.parse(path, {owner, path}) == (owner, part)
    assert Leaf.parse(path, {path}) is None


@pytest.mark.parametrize("part", OF_RANGES)
def test_a_leaf_of_a_range_is_read_as_it_is_named(part):
    name = OperandName("encoder/Dense_0", "dot_general12", "rhs")
    assert name.path == ("encoder", "Dense_0", "dot_general12_rhs")
    path = ("encoder", "Dense_0", f"dot_general12_rhs_{part}")
    assert Leaf(name.path, part).path == path
    assert Leaf.parse(path) == (name.path, part)
    assert range_of(path) == name.path
    assert OperandName.parse(name.path) == name


def test_a_scale_may_belong_to_an_adapter():
    params = {("w",), ("w_lora_a",), ("w_lora_a_scale",)}
    assert Leaf.parse(("w_lora_a_scale",), params) == (("w_lora_a",), "scale")


@pytest.mark.parametrize("name", ["norm_scale", "lora_a", "_lora_a", "scale", "w_lhs"])
def test_a_param_of_the_model_is_not_a_leaf(name):
    assert Leaf.parse((name,), {(name,)}) is None


@pytest.mark.parametrize("name", ["lora_a", "_lora_b", "kernel_lora", "kernel"])
def test_names_without_an_owner_are_not_of_adapters(name):
    assert adapter_part((name,)) is None


def test_names_of_litert():
    assert OperandName("Dense_0", "tanh0", "").path == ("Dense_0", "tanh0")
    assert OperandName("", "final", "output1").path == ("final_output1",)
    assert OperandName.parse(("concatenate0_input2",)) == ("", "concatenate0", "input2")
    assert OperandName.parse(("tanh0",)) == ("", "tanh0", "")
