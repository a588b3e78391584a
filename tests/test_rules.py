import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.lora import LoraRule
from qwix_train.odml import OdmlQatProvider
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.ptq import PtqProvider
from qwix_train.qat import QtProvider

LEARNED_ACT = {
    "weight_qtype": "int8",
    "act_qtype": "int8",
    "act_calibration_method": "lsq+",
}
STATIC = {"weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": True}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"weight_qtype": "int9"}, "weight_qtype='int9'"),
        ({"weight_qtype": "uint8"}, "weight_qtype='uint8'"),
        ({"weight_qtype": "int8", "act_qtype": "float3"}, "act_qtype='float3'"),
        ({"act_qtype": "int8"}, "needs a weight_qtype"),
        ({"weight_qtype": "int8", "act_static_scale": True}, "needs an act_qtype"),
        ({"module_path": "a("}, "not a regular expression"),
        ({"module_path": 3}, "module_path=3): it must be a str"),
        ({"op_names": ("dot_generl",)}, "'dot_generl' is not an op: write 'dot_g"),
        ({"op_names": ("",)}, "'' is not an op"),
        ({"weight_calibration_method": "max"}, "weight_calibration_method='max'"),
        ({"act_calibration_method": "rms"}, "act_calibration_method='rms'"),
        (
            {"weight_qtype": "nf4", "weight_calibration_method": "minmax"},
            "weight_calibration_method='minmax'",
        ),
        ({"weight_calibration_method": "pact"}, "activations, not weights"),
        ({"weight_calibration_method": "lsq,2"}, "lsq takes no arguments"),
        (
            {"weight_qtype": "nf4", "weight_calibration_method": "lsq"},
            "for int1 to int8, not for nf4",
        ),
        (LEARNED_ACT | {"act_qtype": "float8_e4m3fn"}, "not for float8_e4m3fn"),
        (LEARNED_ACT | {"act_qtype": "int16"}, "not for int16"),
        (LEARNED_ACT | {"tile_size": 32}, "tile_size=32): act_calibration_method"),
        (LEARNED_ACT | {"act_static_scale": True}, "act_static_scale=True): act_"),
        (
            {
                "weight_qtype": "int8",
                "act_qtype": "int8",
                "act_static_scale": True,
                "act_channelwise_axes": (1,),
                "disable_channelwise_axes": True,
            },
            "act_channelwise_axes=(1,) asks for the opposite",
        ),
        ({"act_observer": "lsq"}, "act_calibration_method trains none"),
        (STATIC | {"act_observer": "msee"}, "act_observer='msee'): Unknown observer"),
        (STATIC | {"act_averaging": "emma"}, "act_averaging='emma'): Unknown averag"),
        (STATIC | {"act_averaging": "ema,2"}, "must be at least 0 and below 1"),
        (STATIC | {"act_observer": "mse", "act_averaging": "last"}, "Leave it out"),
        (STATIC | {"act_observer": 3}, "it must be a name, or an Observer"),
        (STATIC | {"act_observer": "minmax"}, "set act_calibration_method='minmax'"),
        (STATIC | {"act_observer": "mse,asymmetric"}, "has no zero point"),
        (
            STATIC | {"act_observer": "mse", "act_calibration_method": "minmax"},
            "ranges around zero, and act_calibration_method='minmax' has a zero point",
        ),
        (
            STATIC | {"act_static_scale": False, "act_averaging": "last"},
            "set act_static_scale=True, or leave it out",
        ),
        ({"tile_size": 0}, "tile_size=0"),
        ({"tile_size": -4}, "tile_size=-4"),
        ({"tile_size": True}, "tile_size=True"),
        ({"tile_size": 1.5}, "tile_size=1.5"),
        ({"tile_size": "4"}, "tile_size='4'"),
        ({"tile_size": float("nan")}, "tile_size=nan"),
        ({"tile_size": (4,)}, "tile_size=(4,)): it must be a number or a mapping or"),
        ({"act_act": "no"}, "act_act='no'): it must be True or False."),
        ({"act_act": None}, "act_act=None"),
        ({"pad_tiles": 1}, "pad_tiles=1"),
        ({"disable_channelwise_axes": "yes"}, "disable_channelwise_axes='yes'"),
        ({"weight_calibration_method": None}, "weight_calibration_method=None"),
        ({"op_names": (1,)}, "op_names=(1,)): it must be a str, or a collection of"),
        ({"act_observer": 99.9}, "act_observer=99.9): it must be a name"),
        ({"act_averaging": 0.99}, "act_averaging=0.99): it must be a name"),
        (
            {**STATIC, "act_static_scale": "False"},
            "act_static_scale='False'): it must be True or False or None",
        ),
        ({**STATIC, "act_batch_axes": 0}, "act_batch_axes=0): it must be a collection"),
        ({**STATIC, "act_batch_axes": (0.5,)}, "act_batch_axes=(0.5,)"),
        ({**STATIC, "act_channelwise_axes": (True,)}, "act_channelwise_axes=(True,)"),
    ],
)
def test_a_wrong_field_is_named_when_the_rule_is_made(fields, message):
    with pytest.raises(ValueError, match="QuantizationRule") as error:
        QuantizationRule(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "fields, op, expected",
    [
        ({}, ("a/b", "einsum", "einsum0"), True),
        ({"module_path": "a"}, ("a/b", "einsum", "einsum0"), False),
        ({"module_path": "a/.*"}, ("a/b", "einsum", "einsum0"), True),
        ({"op_names": ["einsum"]}, ("a", "einsum", "einsum1"), True),
        ({"op_names": ["einsum1"]}, ("a", "einsum", "einsum1"), True),
        ({"op_names": ["einsum1"]}, ("a", "einsum", "einsum10"), False),
        ({"op_names": ["dot_general"]}, ("a", "einsum", "einsum1"), False),
    ],
)
def test_matches(fields, op, expected):
    assert QuantizationRule(**fields).matches(*op) is expected


def test_rules_are_values():
    rule = QuantizationRule(op_names=["einsum"], weight_qtype=jnp.int8)
    assert rule == QuantizationRule(op_names=("einsum",), weight_qtype=jnp.int8)
    assert rule == QuantizationRule(op_names="einsum", weight_qtype=jnp.int8)
    assert hash(rule) == hash(dataclasses.replace(rule))
    assert rule.act_method == "absmax"
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.tile_size = 3  # type: ignore


def test_numbers_of_numpy_are_those_of_python():
    fields = {"act_batch_axes": np.arange(2), "act_act": np.bool_(False), **STATIC}
    rule = QuantizationRule(tile_size=np.int64(16), **fields)
    assert rule == QuantizationRule(
        tile_size=16, act_batch_axes=(0, 1), act_act=False, **STATIC
    )
    assert type(rule.tile_size) is int and type(rule.act_act) is bool
    assert hash(rule) == hash(dataclasses.replace(rule))
    share = QuantizationRule(tile_size=np.float32(0.25)).tile_size
    assert share == 0.25 and type(share) is float


def test_one_op_of_a_name_that_ends_in_a_number():
    assert QuantizationRule(op_names=("relu_n1_to_10",)).matches(
        "", "relu_n1_to_1", "relu_n1_to_10"
    )
    with pytest.raises(ValueError, match="'relu_n1_to_' is not an op"):
        QuantizationRule(op_names=("relu_n1_to_",))


def test_an_observer_needs_static_ranges():
    for fields in {"act_observer": "mse"}, {"act_averaging": "minmax"}:
        rule = QuantizationRule(weight_qtype="int8", act_qtype="int8", **fields)
        for provider in QtProvider, PtqProvider:
            with pytest.raises(ValueError, match="set act_static_scale=True, or leave"):
                provider([rule])
        # For LiteRT, ranges are static by default.
        OdmlQatProvider([rule])


def test_check_rules():
    rule = QuantizationRule()
    assert check_rules([rule]) == (rule,)
    with pytest.raises(TypeError, match="one rule"):
        check_rules(rule)  # type: ignore
    with pytest.raises(TypeError, match="got 'int8'"):
        check_rules(["int8"])  # type: ignore


def test_learned_scales():
    rule = QuantizationRule(**LEARNED_ACT)
    assert rule.learns_scales and rule.static_act_ranges
    assert (rule.act_method, rule.range_observer) == ("minmax", "mse,asymmetric")
    rule = dataclasses.replace(rule, act_observer="minmax")
    assert rule.range_observer == "minmax"
    assert not QuantizationRule(weight_qtype="int8").learns_scales
    in_float = {"weight_calibration_method": "lsq", "act_calibration_method": "lsq"}
    assert not QuantizationRule(**in_float).learns_scales


def test_a_rule_shows_the_fields_that_were_set():
    rule = QuantizationRule(module_path="a", weight_qtype="int4", act_act=False)
    assert repr(rule) == (
        "QuantizationRule(module_path='a', weight_qtype='int4', act_act=False)"
    )
    assert repr(QuantizationRule()) == "QuantizationRule()"
    assert repr(LoraRule(rank=2, alpha=4.0)) == "LoraRule(rank=2, alpha=4.0)"


def test_what_is_no_rules_is_not_printed_whole():
    with pytest.raises(TypeError, match="Expected a list of rules, got a dict"):
        check_rules({"kernel": np.ones((8, 8))})
