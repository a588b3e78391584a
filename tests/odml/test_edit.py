"""Changes to a `.tflite` file."""

import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qwix_train import QuantizationRule, odml
from qwix_train.odml import edit, flatbuffer
from tests.odml.small import INT8, Mlp, converted, init, module, normal


@pytest.fixture(scope="module")
def litert():
    x = normal(3, 8)
    return converted(Mlp(), init(Mlp(), x), x)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("outputs", [False, True])
def test_codes_in_the_place_of_floats(litert, inputs, outputs):
    changed = odml.LiteRTModel(edit.integer_ends(litert.content, inputs, outputs))
    (info,) = flatbuffer.signatures_in(changed.content).values()
    assert info.takes["x"].dtype == ("int8" if inputs else "float32")
    assert info.gives["output_0"].dtype == ("int8" if outputs else "float32")
    names = [op.name for op in changed.ops()]
    assert ("QUANTIZE" in names, "DEQUANTIZE" in names) == (not inputs, not outputs)
    assert changed.is_full_integer
    np.testing.assert_array_equal(changed(normal(3, 8)), litert(normal(3, 8)))


def test_ends_that_hold_integers_stay():
    ids = jnp.array([[1, 2, 3]])
    model = module(lambda self, ids: jnp.argmax(nn.Embed(8, 4)(ids), -1))
    variables = init(model, ids)
    litert = odml.convert(
        model,
        variables,
        INT8,
        ids,
        quant_stats={},
        integer_inputs=True,
        integer_outputs=True,
    )
    assert litert.is_full_integer
    expected = np.argmax(variables["params"]["Embed_0"]["embedding"], -1)[1:4]
    np.testing.assert_array_equal(litert(ids)[0], expected)


def test_no_codes_of_floats():
    x = normal(2, 8)
    variables = init(Mlp(), x)
    rules = [QuantizationRule(weight_qtype="int8")]
    for options, message in (
        ({"integer_inputs": True}, "FULLY_CONNECTED reads the input 'x' in floats"),
        ({"integer_outputs": True}, "the output 'output_0' is not quantized"),
    ):
        with pytest.raises(ValueError, match=message):
            odml.convert(Mlp(), variables, rules, x, **options)


def test_an_output_in_floats_has_no_codes():
    x = normal(2, 8)
    model = module(lambda self, x: jnp.sin(nn.Dense(4)(x)))
    variables = init(model, x)
    provider = odml.OdmlQatProvider(INT8, strict=False)
    with pytest.warns(UserWarning, match="sin0"):
        litert = converted(model, variables, x, provider=provider, integer_inputs=True)
    assert [op.name for op in litert.float_ops] == ["SIN"]
    with pytest.raises(ValueError, match="the output .* is not quantized"):
        edit.integer_ends(litert.content, False, True)


def test_merged_files_hold_equal_weights_once(litert):
    """Under other names of signatures."""
    model = flatbuffer.read_model(litert.content)
    model.signatureDefs[0].signatureKey = "again"
    again = flatbuffer.write_model(model)
    both = odml.LiteRTModel(edit.merged([litert.content, again]))
    assert list(both.signatures) == ["serving_default", "again"]
    stored = flatbuffer.read_model(both.content).buffers
    data = [bytes(b.data) for b in stored if b.data is not None]
    assert sum(len(d) == 16 * 8 for d in data) == 1
    assert len(set(data)) == len(data)
    for name in both.signatures:
        np.testing.assert_array_equal(
            both(normal(3, 8), signature=name), litert(normal(3, 8))
        )


def test_metadata(litert):
    before = edit.metadata_in(litert.content)
    content = edit.with_metadata(litert.content, {"labels": "a,ö", "raw": b"\0\1"})
    assert edit.metadata_in(content) == before | {
        "labels": "a,ö".encode(),
        "raw": b"\0\1",
    }
    content = edit.with_metadata(content, {"labels": "b"})
    assert edit.metadata_in(content)["labels"] == b"b"
    np.testing.assert_array_equal(
        odml.LiteRTModel(content)(normal(3, 8)), litert(normal(3, 8))
    )


def test_metadata_of_another_type(litert):
    with pytest.raises(TypeError, match="'labels' is 3; give text or bytes"):
        edit.with_metadata(litert.content, {"labels": 3})
