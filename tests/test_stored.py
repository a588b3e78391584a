"""Boxes around quantized params: the metadata that Flax keeps."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import WithAux
from qwix_train.values import stored

HOW = HowToQuantize(qtype="int8", channelwise_axes=(1,))
TILED = HowToQuantize(qtype="int8", channelwise_axes=(1,), tiled_axes={0: 4})
MINMAX = HowToQuantize(qtype="int8", calibration_method="minmax")
ARRAY = jnp.arange(32.0).reshape(8, 4)

BOXES = {
    "partitioned": nn.Partitioned(ARRAY, ("a", "b")),
    "logical": nn.LogicallyPartitioned(ARRAY, ("a", "b")),
    "variable": nnx.Param(ARRAY, out_sharding=("a", "b"), tag=3, eager_sharding=False),
}


def names_of(box):
    if not isinstance(box, nnx.Variable):
        return box.names
    return box.get_metadata()["out_sharding"]


@pytest.mark.parametrize("kind", BOXES)
@pytest.mark.parametrize(
    ("how", "scale_names"),
    [(HOW, (None, "b")), (TILED, ("a", "b")), (MINMAX, (None, None))],
)
def test_parts_are_boxed_each_by_its_own_shape(kind, how, scale_names):
    box = BOXES[kind]
    param = stored.quantize_param(ARRAY, how)
    boxed = stored.box(param, box)
    assert type(boxed.array.qvalue) is type(boxed.array.scale) is type(box)
    assert names_of(boxed.array.qvalue) == ("a", "b")
    assert names_of(boxed.array.scale) == scale_names
    if how is MINMAX:
        assert names_of(boxed.array.zero_point) == (None, None)
    if kind == "variable":
        assert boxed.array.scale.get_metadata()["tag"] == 3
    for leaf in jax.tree.leaves(boxed, is_leaf=stored.is_box):
        assert stored.is_box(leaf)
    back = stored.unbox(boxed)
    assert isinstance(back, WithAux) and back.how == how
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(param), strict=True):
        assert a is b
    assert stored.box_of(boxed) is boxed.array.qvalue
    again = stored.box_array(boxed, ARRAY)
    assert type(again) is type(box) and names_of(again) == ("a", "b")
    assert stored.unbox(again) is ARRAY


def test_without_a_box():
    param = stored.quantize_param(ARRAY, HOW)
    assert stored.box(param, ARRAY) is param
    assert stored.box_of(param) is None and stored.box_array(param, ARRAY) is ARRAY
    assert not stored.is_box(param) and stored.is_quantized(param)


def test_shapes():
    param = stored.quantize_param(ARRAY.astype(jnp.bfloat16), HOW)
    want = jax.ShapeDtypeStruct((8, 4), jnp.bfloat16)
    assert stored.aval(param) == want
    abstract = stored.quantize_param(want, HOW)
    assert abstract == jax.eval_shape(lambda: param)
    boxed = stored.box(abstract, BOXES["logical"])
    assert stored.unbox(boxed) == abstract
    assert stored.shape_of(np.ones(3, np.float32)).sharding is None


def test_explicit_shardings_are_part_of_the_shape():
    explicit = jax.make_mesh((2, 4), ("a", "b"), (jax.sharding.AxisType.Explicit,) * 2)
    auto = jax.make_mesh((2, 4), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    for mesh, spec in ((explicit, jax.P("a", "b")), (auto, None)):
        sharding = jax.sharding.NamedSharding(mesh, jax.P("a", "b"))
        param = stored.quantize_param(jax.device_put(ARRAY, sharding), HOW)
        found = stored.aval(param).sharding
        assert (found and found.spec) == spec


MESH = jax.make_mesh((2, 4), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
ROWS = jnp.arange(48.0).reshape(12, 4)


@pytest.mark.parametrize("kind", ["partitioned", "logical", "variable"])
@pytest.mark.parametrize(("tile", "name"), [(2, "a"), (4, None)])
def test_tiles_that_a_mesh_does_not_divide_are_replicated(kind, tile, name):
    rules = [("rows", "a"), ("columns", "b")]
    boxed = {
        "partitioned": nn.Partitioned(ROWS, ("a", "b")),
        "logical": nn.LogicallyPartitioned(ROWS, ("rows", "columns"), rules=rules),
        "variable": nnx.Param(ROWS, out_sharding=("a", "b"), eager_sharding=False),
    }[kind]
    how = HowToQuantize(qtype="int8", channelwise_axes=(1,), tiled_axes={0: tile})
    with jax.set_mesh(MESH):
        scale = stored.box(stored.quantize_param(ROWS, how), boxed).array.scale
    names = names_of(scale)
    assert names == (name and ("rows" if kind == "logical" else name), *names[1:])
    assert names[1] is not None
