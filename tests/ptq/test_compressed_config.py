"""Which scheme of a config is for which layer."""

import pytest

from qwix_train.ptq import compressed_config


def group(*targets):
    return {"targets": list(targets), "weights": {"num_bits": len(targets)}}


LINEAR = group("Linear")
CONFIG = {
    "config_groups": {
        "a": LINEAR,
        "b": group("re:.*experts", "Embedding"),
        "c": group("model.head", "x", "y"),
    }
}


@pytest.mark.parametrize(
    "layer, name",
    [
        ("model.layers.0.mlp", "a"),
        ("model.layers.0.experts.3", "b"),
        ("model.head", "c"),
        ("model.header", "a"),
    ],
)
def test_names_come_before_classes(layer, name):
    found = compressed_config.find_scheme(CONFIG, layer)
    assert found is CONFIG["config_groups"][name]


def test_the_only_group_and_no_config():
    only = group("Embedding")
    config = {"config_groups": {"a": only}}
    assert compressed_config.find_scheme(config, "layer") is only
    assert compressed_config.find_scheme(None, "layer") == {}


def test_a_layer_that_no_group_names():
    config = {"config_groups": {"a": group("x"), "b": group("y")}}
    with pytest.raises(ValueError, match="z has scales, but 2 of the 2 config_groups"):
        compressed_config.find_scheme(config, "z")


def test_layers_of_one_scheme_are_one_group():
    int8 = {"format": "int-quantized", "weights": {"num_bits": 8}}
    int4 = {"format": "pack-quantized", "weights": {"num_bits": 4}}
    config = compressed_config.make_config({"a": int8, "b": int4, "c": int8})
    assert config["format"] == "mixed-precision"
    assert config["config_groups"] == {
        "group_0": {"targets": ["a", "c"], **int8},
        "group_1": {"targets": ["b"], **int4},
    }
    for layer, scheme in {"a": int8, "b": int4, "c": int8}.items():
        found = compressed_config.find_scheme(config, layer)
        assert found["weights"] == scheme["weights"]
    assert compressed_config.make_config({"a": int4})["format"] == "pack-quantized"


@pytest.mark.parametrize("qtype", ["int8", "int4", "float8_e4m3fn"])
def test_types_of_activations(qtype):
    args = compressed_config.static_activations(qtype, symmetric=True)
    assert args["strategy"] == "tensor" and args["dynamic"] is False
    assert compressed_config.activation_qtype(args, "int2") == qtype
    assert compressed_config.activation_qtype(None, qtype) == qtype
    assert compressed_config.dynamic_activations(qtype)["dynamic"] is True
