"""Models that hold a model of the other kind of Flax: `nnx.bridge`."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix_train
from qwix_train import PtqProvider, QtProvider, ptq
from tests import models

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
KEY = jax.random.key(0)


def linear(*widths, rngs):
    """An NNX layer whose kernel has names of axes, as MaxText's have."""
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("model", None))
    return nnx.Linear(*widths, kernel_init=init, rngs=rngs)


class Linen(nn.Module):
    """NNX layers inside of a Linen model."""

    @nn.compact
    def __call__(self, x):
        x = nnx.bridge.to_linen(nnx.Linear, 4, 8, name="plain")(x)
        x = nnx.bridge.to_linen(linear, 8, 6, name="named")(x)
        return nn.Dense(3)(x)


def expected(params, x):
    params = nn.unbox(params)
    for name in ("plain", "named", "Dense_0"):
        x = models.dense(params[name], x)
    return x


@pytest.fixture(autouse=True)
def mesh():
    mesh = jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        yield


@pytest.mark.slow
def test_nnx_layers_of_a_linen_model_are_quantized():
    params = nn.unbox(jax.jit(Linen().init)(KEY, X)["params"])
    model, quantized = ptq.quantize(Linen(), params, models.INT8, X)
    kernels = [quantized[name]["kernel"] for name in quantized]
    assert all(isinstance(kernel, qwix_train.WithAux) for kernel in kernels)
    out = jax.jit(model.apply)({"params": quantized}, X)
    models.assert_close(out, jax.jit(expected)(params, X))
    qat = qwix_train.quantize_model(Linen(), QtProvider(models.INT8))
    models.assert_close(out, jax.jit(qat.apply)({"params": params}, X))


def test_init_of_a_linen_model_with_nnx_layers():
    model = qwix_train.quantize_model(Linen(), PtqProvider(models.INT8))
    out, variables = jax.jit(model.init_with_output)(KEY, X)
    models.assert_close(out, jax.jit(model.apply)(variables, X))
    array = variables["params"]["named"]["kernel"].array
    assert array.qvalue.metadata["out_sharding"] == ("model", None)
    assert array.scale.metadata["out_sharding"] == (None, None)


@pytest.mark.slow
def test_linen_layers_of_an_nnx_model_are_quantized():
    model = nnx.bridge.ToNNX(models.Mlp(), rngs=nnx.Rngs(0)).lazy_init(X)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    quantized, _ = ptq.quantize(model, None, models.INT8, X)
    assert isinstance(quantized.Dense_0["kernel"], qwix_train.WithAux)
    models.assert_close(quantized(X), jax.jit(models.mlp)(params, X))


def test_a_param_that_init_writes_anew_is_refused_and_quantize_finds_it():
    class Writes(nn.Module):
        @nn.compact
        def __call__(self, x):
            if self.is_initializing():
                self.put_variable("params", "w", np.ones((4, 3), np.float32))
                return x @ np.ones((4, 3), np.float32)
            return x @ self.get_variable("params", "w")

    model = qwix_train.quantize_model(Writes(), PtqProvider(models.INT8))
    with pytest.raises(ValueError, match="Writes.init writes 1 params .*'w'"):
        model.init(KEY, X)
    params = {"w": np.ones((4, 3), np.float32)}
    _, quantized = ptq.quantize(Writes(), params, models.INT8, X, variables={})
    assert isinstance(quantized["w"], qwix_train.WithAux)
