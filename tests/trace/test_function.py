"""Traced calls: which inputs are params, and how results are put together."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train.frontends import linen
from qwix_train.trace import carried, function
from tests import models

X = jnp.ones((2, 3))


def trace(fn, *args):
    return function.trace(fn, args, function.param_path)


def test_floating_leaves_of_the_first_argument_are_params():
    params = {"w": jnp.ones((3, 2)), "n": jnp.arange(3), "np": np.ones(2), "f": 2.0}
    traced = trace(lambda p, x, flag: x @ p["w"], params, X, True)
    paths = [p.path for p in traced.params if p is not None]
    assert paths == [("np",), ("w",)]
    assert len(traced.inputs) == 4
    (op,) = traced.ops
    assert op.id == "dot_general0"


def test_what_is_no_array_keeps_its_value():
    def fn(params, x, options):
        assert options["flag"] is True and isinstance(options["count"], np.int64)
        return {"y": x @ params, "options": options, "none": None}

    options = {"flag": True, "name": "a", "count": np.int64(3)}
    traced = trace(fn, jnp.ones((3, 2)), X, options)
    out = traced.run([], None, lambda param: None)
    models.assert_same(out.pop("y"), X @ jnp.ones((3, 2)))
    assert out == {"options": options, "none": None}


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_, np.float64])
def test_numpy_arrays_are_inputs_as_under_jit(dtype):
    values = np.arange(3).astype(dtype)

    def fn(params, x, names):
        assert names.dtype == object
        return params[x.astype(jnp.int32)], x

    traced = trace(fn, jnp.arange(3.0) ** 2, values, np.array(["a", None]))
    assert len(traced.inputs) == 2
    rows, same = traced.run([], None, lambda param: None)
    want = jax.device_put(values)
    np.testing.assert_array_equal(rows, np.asarray(want, np.float32) ** 2)
    assert np.asarray(same).dtype == want.dtype


def test_no_tracer_is_held():
    with jax.check_tracer_leaks():
        trace(lambda p, x: {"y": x @ p, "n": 3}, jnp.ones((3, 2)), X)


def test_a_param_that_is_handed_back_is_not_replaced():
    def fn(params, x):
        return x @ params["w"], params, params["w"] * 2

    params = {"w": jnp.ones((3, 2))}
    traced = trace(fn, params, X)

    def zero(param):
        return carried.Deferred(param.value, jnp.zeros_like, None)

    product, same, double = traced.run([], None, zero)
    models.assert_same(same, params)
    assert not product.any() and not double.any()


def test_paths_of_boxed_params():
    def paths(tree, name=function.param_path):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return [name(path) for path, _ in leaves]

    assert paths({"a": {"value": X}}) == [("a", "value")]
    assert paths({"a": nn.Partitioned(X, (None,))}) == [("a",)]
    assert paths({"a": [X, X]}) == [("a", "0"), ("a", "1")]
    assert paths(nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))) == [
        ("bias",),
        ("kernel",),
    ]
    variables = {"params": {"m": {"w": X}}, "batch_stats": {"m": {"w": X}}}
    assert paths(variables, linen.param_name) == [None, ("m", "w")]
