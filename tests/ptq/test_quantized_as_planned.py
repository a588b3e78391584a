"""What the plan quantizes comes out of `ptq.quantize` quantized, or is named."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix_train
from qwix_train import QtProvider, QuantizationRule, ptq
from tests import models

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
RULES = [QuantizationRule(weight_qtype="int8")]


def test_a_product_that_a_linen_model_leaves_out_in_init():
    class Skips(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.ones, (4, 4))
            if not self.is_initializing():
                x = x @ w
            return nn.Dense(3)(x)

    params = jax.jit(Skips().init)(jax.random.key(0), X)["params"]
    model, quantized = ptq.quantize(Skips(), params, RULES, X)
    assert isinstance(quantized["w"], qwix_train.WithAux)
    qat = qwix_train.quantize_model(Skips(), QtProvider(RULES))
    out = model.apply({"params": quantized}, X)
    models.assert_close(out, qat.apply({"params": params}, X))


@pytest.mark.slow
def test_a_decoder_whose_cache_the_call_makes():
    attention = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    params = jax.jit(attention.init)(jax.random.key(0), X[None])["params"]
    _, quantized = ptq.quantize(attention, params, RULES, X[None])
    assert all(
        isinstance(layer["kernel"], qwix_train.WithAux) for layer in quantized.values()
    )


class Pair:
    """Two params of one name."""

    def __init__(self, *params):
        self.params = params


jax.tree_util.register_pytree_with_keys(
    Pair,
    lambda pair: ([(jax.tree_util.GetAttrKey("w"), w) for w in pair.params], None),
    lambda _, params: Pair(*params),
)


def test_two_params_of_one_name_are_named():
    def model(params, x):
        return x @ params["pair"].params[0] @ params["pair"].params[1] @ params["v"]

    w = np.ones((4, 4), np.float32)
    params = {"pair": Pair(w, w), "v": w}
    message = r"1 params .* come out quantized: pair/w \(is float32 of shape \(4, 4\)\)"
    with pytest.raises(ValueError, match=message):
        ptq.quantize(model, params, RULES, X)


class Held(nnx.Module):
    """A param that a module holds as it is."""

    def __init__(self):
        self.w = nnx.data(np.ones((4, 4), np.float32))

    def __call__(self, x):
        return x @ self.w


@pytest.mark.parametrize(
    "stores",
    [
        lambda: ptq.quantize(Held(), None, RULES, X),
        lambda: qwix_train.plan(Held(), qwix_train.PtqProvider(RULES), X),
    ],
    ids=["quantize", "plan"],
)
def test_an_array_that_an_nnx_module_holds_cannot_be_stored_quantized(stores):
    with pytest.raises(ValueError, match=r"'w' is an array .* hold it in an nnx.Param"):
        stores()


class Counting(nn.Module):
    """A model that makes a variable where it is initialized, and only there."""

    @nn.compact
    def __call__(self, x):
        if self.is_initializing():
            self.variable("counts", "seen", np.zeros, (1,))
        return nn.Dense(3)(x) + self.get_variable("counts", "seen")


def test_variables_that_only_init_makes():
    x = np.ones((2, 4), np.float32)
    params = {
        "Dense_0": {"kernel": np.eye(4, 3, dtype=np.float32), "bias": np.ones(3, "f")}
    }
    rules = [QuantizationRule(weight_qtype="int8")]
    with pytest.raises(Exception) as raised:
        ptq.quantize(Counting(), params, rules, x)
    assert "give them as variables=" in "".join(raised.value.__notes__)
    counts = {"counts": {"seen": np.zeros(1, np.float32)}}
    model, quantized = ptq.quantize(Counting(), params, rules, x, variables=counts)
    variables = {"params": quantized, **counts}
    np.testing.assert_allclose(model.apply(variables, x)[:, 0], 1.996, atol=1e-3)


def test_params_that_the_model_does_not_have():
    x = np.ones((2, 4), np.float32)
    params = {name: np.ones(3, "f") for name in ("kernel", "bias", "other")}
    rules = [QuantizationRule(weight_qtype="int8")]
    with pytest.raises(ValueError, match="Param 'other' is not one of the model"):
        ptq.quantize(nn.Dense(3), params, rules, x)
