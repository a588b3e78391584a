"""What is said of a `.tflite` file."""

import numpy as np
import pytest

from qwix_train.odml import flatbuffer
from tests.odml.small import Mlp, converted, init, normal


@pytest.fixture(scope="module")
def litert():
    x = normal(3, 8)
    return converted(Mlp(), init(Mlp(), x), x)


def test_operations_in_order(litert):
    ops = flatbuffer.ops_in(litert.content)
    names = [op.name for op in ops]
    assert names == ["QUANTIZE", "FULLY_CONNECTED", "FULLY_CONNECTED", "DEQUANTIZE"]
    x, w, bias = ops[1].inputs
    assert (x.dtype, x.shape, x.constant) == ("int8", (3, 8), False)
    assert (w.dtype, w.shape, w.constant) == ("int8", (16, 8), True)
    assert (len(w.scale), w.axis, w.range) == (16, 0, None)
    assert (bias.dtype, bias.shape) == ("int32", (16,))
    assert ops[0].inputs[0].is_input and not ops[0].inputs[0].is_output
    assert ops[-1].outputs[0].is_output and not ops[1].outputs[0].is_output


def test_a_range_is_that_of_all_codes(litert):
    tensor = flatbuffer.ops_in(litert.content)[0].outputs[0]
    codes = np.array([-128, 127], np.float64)
    expected = (codes - tensor.zero_point[0]) * tensor.scale[0]
    np.testing.assert_allclose(tensor.range, expected, rtol=1e-6)
    x = np.asarray(normal(3, 8))
    assert abs(tensor.range[1] - tensor.range[0] - np.ptp(x)) < 0.02 * np.ptp(x)


def test_signatures_with_the_scales_of_outputs(litert):
    (info,) = flatbuffer.signatures_in(litert.content).values()
    assert info.inputs == ("x",) and info.outputs == ("output_0",)
    assert info.takes["x"].dtype == info.gives["output_0"].dtype == "float32"
    last = flatbuffer.ops_in(litert.content)[-1]
    assert info.output_scales == {"output_0": last.inputs[0].scale[0]}


def test_floats_within_a_model_are_no_full_integer_model(litert):
    """Without an operation that computes with them."""
    assert flatbuffer.float_ops(flatbuffer.ops_in(litert.content)) == []
    model = flatbuffer.read_model(litert.content)
    (graph,) = model.subgraphs
    quantize, first, second, dequantize = graph.operators
    floats, again = (type(graph.tensors[0])() for _ in range(2))
    vars(again).update(vars(graph.tensors[int(first.outputs[0])]))
    vars(floats).update(vars(graph.tensors[int(quantize.inputs[0])]))
    floats.shape = again.shape
    graph.tensors += [floats, again]
    down, up = type(first)(), type(first)()
    vars(down).update(vars(dequantize))
    vars(up).update(vars(quantize))
    down.inputs, down.outputs = [int(first.outputs[0])], [len(graph.tensors) - 2]
    up.inputs, up.outputs = [len(graph.tensors) - 2], [len(graph.tensors) - 1]
    second.inputs = [len(graph.tensors) - 1, *map(int, second.inputs[1:])]
    graph.operators = [quantize, first, down, up, second, dequantize]
    changed = type(litert)(flatbuffer.write_model(model))
    assert not changed.is_full_integer
    assert [op.name for op in changed.float_ops] == ["QUANTIZE"]
    np.testing.assert_array_equal(changed(normal(3, 8)), litert(normal(3, 8)))


def test_a_file_of_another_kind():
    with pytest.raises(ValueError, match=r"These 20 bytes are no .tflite file"):
        flatbuffer.ops_in(b"x" * 20)
