"""Rules for quantized training are checked when they are made, and where they go."""

import pytest

from qwix_train import LoraProvider, LoraRule, OdmlQatProvider, QtRule
from qwix_train.ptq.manifest import rule_from_json, rule_to_json

INT8 = dict(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8")
REQUANTIZED = dict(INT8, bwd_residuals="requantized")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"weight_qtype": "int9"}, "weight_qtype='int9'"),
        ({"bwd_qtype": "int8"}, "needs a weight_qtype"),
        ({**INT8, "weight_calibration_method": "lsq"}, "no gradients for scales"),
        ({**INT8, "bwd_qtype": "uint8"}, "Unknown quantized type 'uint8'"),
        ({**INT8, "bwd_calibration_method": "max"}, "Unknown calibration method"),
        (
            {
                **INT8,
                "bwd_qtype": "float8_e5m2",
                "bwd_calibration_method": "minmax",
            },
            "float8_e5m2 has no zero points",
        ),
        ({**INT8, "bwd_calibration_method": "lsq"}, "no scale of a gradient is"),
        ({"bwd_stochastic_rounding": "uniform"}, "it needs a bwd_qtype"),
        ({"bwd_weight_grad_tile_size": 4}, "it needs a bwd_qtype"),
        ({"bwd_tile_size": 4}, "it needs a bwd_qtype"),
        ({"bwd_residuals": "original"}, "it needs a bwd_qtype"),
        ({**INT8, "bwd_residuals": "float"}, "choose from quantized, requantized, or"),
        ({**INT8, "bwd_tile_size": {0: 4}}, "must be a number or None"),
        ({**INT8, "bwd_qtype": "mxfp8", "bwd_tile_size": 16}, "for 32 elements"),
        ({**INT8, "bwd_weight_grad_rotation": "hadamard"}, "set bwd_residuals="),
        (
            {**REQUANTIZED, "bwd_weight_grad_rotation": "hadamard,3"},
            "a block of 3 is not a power of two",
        ),
        (
            {
                **REQUANTIZED,
                "bwd_weight_grad_rotation": "hadamard",
                "act_static_scale": True,
            },
            "a static range is that of an activation as it is",
        ),
        ({**INT8, "bwd_stochastic_rounding": "gauss"}, "choose from uniform, low_bit"),
        ({**INT8, "bwd_weight_grad_tile_size": 0}, "must be a positive int"),
        ({**INT8, "disable_channelwise_axes": 1}, "must be True or False"),
        ({**INT8, "channelwise_noise_axes": 0}, "must be a collection of ints"),
        ({**INT8, "channelwise_noise_axes": ("0",)}, "must be a collection of ints"),
        ({**INT8, "additional_qt_config": True}, "must be a mapping"),
        (
            {**INT8, "additional_qt_config": {"dlhs_tile_size": 2}},
            "'dlhs_tile_size' has no counterpart",
        ),
        (
            {**INT8, "additional_qt_config": {"use_original_residuals": True}},
            "can only be False",
        ),
    ],
)
def test_a_wrong_field_is_named_when_the_rule_is_made(fields, message):
    with pytest.raises(ValueError, match="QtRule") as error:
        QtRule(**fields)
    assert message in str(error.value)


def test_rules_are_values():
    settings = {"use_original_residuals": False}
    rule = QtRule(**INT8, channelwise_noise_axes=[0, 1], additional_qt_config=settings)
    same = QtRule(**INT8, channelwise_noise_axes=(0, 1))
    assert rule == same and hash(rule) == hash(same)


def test_the_manifest_of_an_export_has_what_serving_needs():
    rule = QtRule(**INT8, disable_channelwise_axes=True)
    served = rule_from_json(rule_to_json(rule))
    assert served.disable_channelwise_axes and served.weight_qtype == "int8"


def test_providers_that_do_not_quantize_the_backward_pass_say_so():
    message = "does not quantize the backward pass; QtProvider does"
    lora = LoraRule(module_path="Dense_0", rank=2, alpha=1.0)
    with pytest.raises(ValueError, match=f"Rule 1 .*LoraProvider {message}"):
        LoraProvider([lora, QtRule(**INT8)])
    with pytest.raises(ValueError, match=f"Rule 0 .*OdmlQatProvider {message}"):
        OdmlQatProvider([QtRule(**INT8)])
    with pytest.raises(ValueError, match="disable_per_channel_weights=True"):
        OdmlQatProvider([QtRule(weight_qtype="int8", disable_channelwise_axes=True)])
