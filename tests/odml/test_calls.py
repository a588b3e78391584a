"""Calls that are to be converted: their inputs, and what they are named."""

import flax.struct
import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train.odml.calls import ModelCall
from tests.odml.small import Mlp, init, normal


class Named(nn.Module):
    @nn.compact
    def __call__(self, batch, *rest, flip=False, scale=1.0):
        x = nn.Dense(2)(batch["x"])
        return (-x if flip else x) * scale, rest


class Pair(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(8, 2, rngs=nnx.Rngs(0))
        self.count = nnx.Variable(jnp.zeros(()))

    def __call__(self, left, right):
        return {"logits": self.layer(left), "parts": (self.layer(right), 3)}

    def counted(self, x):
        self.count.set_value(self.count.get_value() + 1)
        return self.layer(x)


@flax.struct.dataclass
class Output:
    mean: jax.Array
    spread: jax.Array


def linen_call(*inputs, **kwargs):
    model = Named()
    variables = init(model, {"x": normal(3, 8)})
    return ModelCall(model, variables, "__call__", inputs, kwargs)


def test_names_of_arguments_and_keys():
    batch = {"x": normal(3, 8), "id": np.arange(3)}
    call = linen_call(batch, normal(3), flip=True, scale=normal(3, 1))
    assert call.input_names() == ("batch_id", "batch_x", "args_1", "scale")
    assert [x.shape for x in call.arrays] == [(3,), (3, 8), (3,), (3, 1)]
    # NumPy arrays are inputs, too.
    assert all(isinstance(x, jax.Array) for x in call.arrays)
    assert call.output_names() == ("output_0", "output_1_0")


def test_equal_names_are_numbered():
    def function(params, x, x_y):
        return {"a_b": x, "a": {"b": x_y}}

    call = ModelCall(function, {}, "__call__", ({"y": normal(2)}, normal(3)), {})
    assert call.input_names() == ("x_y_0", "x_y_1")


def test_names_of_outputs():
    model = Pair()
    call = ModelCall(model, None, "__call__", (normal(3, 8), normal(3, 8)), {})
    assert call.input_names() == ("left", "right")
    assert call.output_names() == ("logits", "parts_0")
    traced, unwrap = call.traced
    out = unwrap(traced.rebuild([1, 2]))
    assert out == {"logits": 1, "parts": (2, 3)}

    def function(params, x):
        return Output(x.mean() + params, x.std())

    call = ModelCall(function, jnp.ones(()), "__call__", (normal(3),), {})
    assert call.output_names() == ("mean", "spread")


def test_traces_of_other_arrays_and_shapes():
    call = linen_call({"x": normal(3, 8)}, scale=2.0)
    traced, _ = call.trace([normal(5, 8, seed=1)])
    (out,) = traced.body.jaxpr.outvars
    assert out.aval.shape == (5, 2)
    assert [s.shape for s in call.batch_of(7)] == [(7, 8)]


def test_what_updates_is_an_error():
    call = ModelCall(Pair(), None, "counted", (normal(3, 8),), {})
    with pytest.raises(ValueError, match="Pair updates its variables.*model.eval"):
        call.output_names()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: linen_call(), ValueError, "needs inputs of the model"),
        (lambda: linen_call(3), ValueError, "needs inputs of the model"),
        (
            lambda: linen_call({"x": normal(3, 8)}, rngs={"dropout": 0}),
            ValueError,
            "convert takes no rngs=.*deterministic=True",
        ),
        (
            lambda: linen_call({"x": normal(3, 8)}, mutable=["batch_stats"]),
            ValueError,
            "convert takes no mutable=",
        ),
        (
            lambda: ModelCall(3, {}, "__call__", (normal(2),), {}),
            TypeError,
            "Expected a Flax module or a function, got 3",
        ),
        (
            lambda: ModelCall(jnp.sin, {}, "encode", (normal(2),), {}),
            ValueError,
            "method='encode': a function has no methods",
        ),
        (
            lambda: ModelCall(Mlp(), {}, "encode", normal(2), {}),
            TypeError,
            "the inputs are of type",
        ),
    ],
)
def test_calls_that_do_not_fit(make, error, message):
    with pytest.raises(error, match=message):
        make()
