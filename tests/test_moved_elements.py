"""A product with a constant that only selects elements is not one to quantize."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from qwix_train import QtProvider, QuantizationRule, plan, quantize_fn, quantize_model
from tests.spellings import data, fq

RULES = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
IMAGE = data(2, 4, 4, 3)
NHWC = ("NHWC", "HWIO", "NHWC")
PERMUTATION = np.eye(3, dtype=np.float32)[[2, 0, 1]]


def identity_kernel(x):
    kernel = np.zeros((3, 3, 1, 3), np.float32)
    kernel[1, 1] = 1
    kernel = jax.device_put(kernel)
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=3
    )


MOVES = {
    "patches": lambda x: lax.conv_general_dilated_patches(
        x, (2, 2), (1, 1), "VALID", dimension_numbers=NHWC
    ),
    "identity kernel": identity_kernel,
    "eye": lambda x: x @ jnp.eye(3),
    "permutation": lambda x: x @ PERMUTATION,
    "one-hot rows": lambda x: jnp.einsum(
        "bhwc,dc->bhwd", x, jax.nn.one_hot(jnp.array([1, 0]), 3)
    ),
    "constant on the left": lambda x: jnp.eye(4)[:2] @ x,
    "inside jit": lambda x: jax.jit(jnp.matmul)(x, jnp.eye(3)),
    "inside scan": lambda x: lax.scan(lambda c, row: (c, row @ PERMUTATION), 0.0, x)[1],
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", MOVES)
def test_it_stays_in_float(name):
    move = MOVES[name]
    (op,) = plan(lambda p, x: move(x), RULES, {}, IMAGE).records()
    assert not op["quantized"]
    assert op["reason"] == "a product with a constant that only moves elements"


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "matrix", [PERMUTATION * 0.5, np.tri(3, dtype=np.float32), -PERMUTATION]
)
def test_other_constants_are_operands_as_any(matrix):
    found = plan(lambda p, x: x @ matrix, RULES, {}, IMAGE)
    assert found.records()[0]["quantized"]


def test_a_permuted_weight_is_quantized():
    def function(p, x):
        return x @ (p["w"] @ PERMUTATION)

    found = plan(function, RULES, {"w": data(3, 3)}, IMAGE)
    assert found.params["w",].how is not None


@pytest.mark.slow
def test_conv_local():
    """Its patches are exact; the product with its kernel is quantized."""
    model = nn.ConvLocal(2, (2, 2), use_bias=False)
    params = jax.jit(model.init)(jax.random.key(0), IMAGE)["params"]
    first, second = plan(model, RULES, IMAGE, variables={"params": params}).records()
    assert not first["quantized"] and second["weights"] == ("kernel",)
    quantized = quantize_model(model, QtProvider(RULES))
    quantized.apply({"params": params}, IMAGE)


def test_the_numbers():
    def function(p, x):
        return MOVES["patches"](x) @ p["w"]

    w = data(12, 5)
    patches = np.asarray(MOVES["patches"](jax.device_put(IMAGE)))
    actual = quantize_fn(function, QtProvider(RULES))({"w": w}, IMAGE)
    expected = fq(patches, (0, 1, 2)) @ fq(w, (1,))
    np.testing.assert_allclose(actual, expected, 1e-5, 1e-5)


def test_what_depends_on_the_device_has_no_value():
    """A one-hot vector of the index of a device."""
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,))

    def function(p, x):
        def local(x):
            return x @ jax.nn.one_hot(lax.axis_index("x"), 3)

        spec = jax.P("x")
        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    (op,) = plan(function, RULES, {}, IMAGE).records()
    assert op["op"] == "dot_general0"
