import dataclasses
import json

import jax.numpy as jnp
import pytest

import qwix_train
from qwix_train.ptq.manifest import Manifest, StoredArray, StoredParam

RULES = (
    qwix_train.QuantizationRule(
        module_path="a/.*",
        op_names=("dot_general", "einsum1"),
        weight_qtype=jnp.int4,
        act_qtype="float8_e4m3fn",
        tile_size=16,
        act_static_scale=True,
        weight_calibration_method="rms,3",
        act_calibration_method="fixed,4",
        act_batch_axes=(0, 1),
        act_act=False,
        pad_tiles=True,
    ),
    qwix_train.QuantizationRule(weight_qtype="int3", tile_size=0.25),
    qwix_train.QuantizationRule(),
)
PARAMS = (
    StoredParam(
        ("layers", 0, "kernel"),
        {
            "qvalue": StoredArray((4, 8), "int4", "int3", 1, "0123abcd"),
            "scale": StoredArray((4, 1), "float32", checksum="89abcdef"),
        },
        "int3",
        qwix_train.HowToQuantize(
            qtype="int3", channelwise_axes=(0,), tiled_axes={1: 0.5, 2: 1}
        ),
    ),
    StoredParam(("bias",), {"value": StoredArray((8,), "bfloat16")}),
)
MANIFEST = Manifest(PARAMS, RULES, [{"op": "dot_general0"}], metadata={"step": 3})


def through_text(manifest):
    return json.loads(json.dumps(manifest.to_json()))


def test_it_is_read_as_it_was_written():
    read = Manifest.from_json(through_text(MANIFEST))
    assert read == MANIFEST
    assert [type(rule.tile_size) for rule in read.rules] == [int, float, type(None)]
    assert [param.name for param in read.params] == ["layers/0/kernel", "bias"]
    assert [param.shape for param in read.params] == [(4, 8), (8,)]


def test_rules_of_a_subclass_are_written_as_rules():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Rule(qwix_train.QuantizationRule):
        more: int = 0

    rule = Rule(module_path="a", weight_qtype="int8")
    manifest = dataclasses.replace(MANIFEST, rules=(rule,))
    (read,) = Manifest.from_json(through_text(manifest)).rules
    assert read == qwix_train.QuantizationRule(module_path="a", weight_qtype="int8")


def test_what_json_cannot_hold_is_an_error():
    with pytest.raises(TypeError, match="not JSON serializable"):
        dataclasses.replace(MANIFEST, metadata={"a": object()}).to_json()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["params"][0]["path"].append("x"), "changed: layers/0/kernel/x"),
        (lambda r: r["params"][1].update(path=3), "changed: .one without path"),
        (lambda r: r["params"].insert(0, 3), "changed: .one without path"),
        (lambda r: r["params"].pop(), "not in the record of a param"),
        (lambda r: r["rules"].reverse(), "not in the record of a param"),
        (lambda r: r.pop("params"), "not in the record of a param"),
        (lambda r: r.update(version=2), "format version 2, and this release reads"),
        (lambda r: r.clear(), "not one of this package's"),
    ],
)
def test_changes_are_refused(change, message):
    record = through_text(MANIFEST)
    change(record)
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(record)


@pytest.mark.parametrize("record", [None, [], "text", {"format": 3}])
def test_other_records_are_refused(record):
    with pytest.raises(ValueError, match="not one of this package's"):
        Manifest.from_json(record)
