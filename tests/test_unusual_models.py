"""Models whose classes do what most do not: own attributes, decorated methods."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train import (
    QtProvider,
    calib,
    plan,
    ptq,
    quantize_model,
    wrap_eval_step,
    wrap_train_step,
)
from tests import models

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32)
PARAMS = {
    "Dense_0": {
        "kernel": jax.device_put(RNG.normal(size=(4, 3)).astype(np.float32)),
        "bias": jax.device_put(RNG.normal(size=3).astype(np.float32)),
    }
}
WANT = jax.jit(models.dense)(PARAMS["Dense_0"], X)
STATIC = [models.rule("int8", "int8", act_static_scale=True)]


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


class HandsOnToAField(Plain):
    """Asks itself without end for what no field holds."""

    def __getattr__(self, name):
        return getattr(self.config, name)


class HandsOnAfterFlax(Plain):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.config, name)


OWN_ATTRIBUTES = [HandsOnToAField(), HandsOnAfterFlax()]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("model", OWN_ATTRIBUTES, ids=lambda m: type(m).__name__)
def test_a_model_with_a_getattr_of_its_own(model):
    def step(params, x):
        return model.apply({"params": params}, x)

    models.assert_close(wrap_eval_step(step, models.INT8)(PARAMS, X), WANT)
    # The model itself is an argument here.
    bound = functools.partial(lambda m, p, x: m.apply({"params": p}, x), model)
    models.assert_close(wrap_train_step(bound, models.INT8)(PARAMS, X), WANT)
    ranges = {"Dense_0": {"dot_general0_lhs": {"count": 1, "sum_of_absmax": [[1.0]]}}}
    wrap_eval_step(bound, STATIC, quant_stats=ranges)(PARAMS, X)
    with pytest.raises(ValueError, match="no quant_stats"):
        wrap_train_step(bound, STATIC)(PARAMS, X)
    calibrator = calib.Calibrator(STATIC)
    calibrator.wrap(step)(PARAMS, X)
    (stats,) = calibrator.quant_stats["Dense_0"].values()
    want = models.MARGIN * np.abs(X).max()
    np.testing.assert_allclose(stats["sum_of_absmax"], [[want]], rtol=1e-6)


def with_another_name(method):
    def renamed(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    renamed.compact = True  # as Flax asks of a decorator that hides the method
    return renamed


def with_its_name(method):
    @functools.wraps(method)
    def call(*args, **kwargs):
        return method(*args, **kwargs)

    return call


DECORATORS = {
    "nn.jit": nn.jit,
    "nn.remat": nn.remat,
    "nn.jit of nn.remat": lambda method: nn.jit(nn.remat(method)),
    "a decorator that renames": with_another_name,
    "a decorator that wraps": with_its_name,
    "a decorator of nn.remat": lambda method: with_its_name(nn.remat(method)),
}


def decorated(decorator):
    class Decorated(nn.Module):
        @decorator
        @nn.compact
        def __call__(self, x):
            out = nn.Dense(3)(x)
            self.sow("intermediates", "out", out)
            return out

    return Decorated()


@pytest.mark.thinned(6)
@pytest.mark.parametrize("decorator", DECORATORS.values(), ids=DECORATORS)
def test_a_model_whose_top_method_is_decorated(decorator):
    model = decorated(decorator)

    def step(params, x):
        def loss(params):
            out, kept = model.apply({"params": params}, x, mutable=["intermediates"])
            return jnp.sum(out**2), (out, kept["intermediates"]["out"])

        return jax.grad(loss, has_aux=True)(params)

    grads, (out, kept) = jax.jit(wrap_train_step(step, models.INT8))(PARAMS, X)

    def by_hand(params):
        return jnp.sum(models.dense(params["Dense_0"], X) ** 2)

    models.assert_close((out, kept), (WANT, (WANT,)))
    models.assert_close(grads, jax.grad(by_hand)(PARAMS))


class Switched(nn.Module):
    @nn.compact
    def __call__(self, x, train, mask=None):
        x = nn.Dropout(0.5, deterministic=not train)(x) if train else x
        return nn.Dense(3)(x if mask is None else x * mask)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("train", [True, False, np.bool_(True)])
def test_a_positional_flag_stays_a_flag(train):
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    keys = {"dropout": jax.random.key(0)}
    for inputs in ((X, train), (shape, train), (shape, train, shape)):
        (op,) = plan(Switched(), models.INT8, *inputs, rngs=keys).quantized_ops
        assert op.weights == (("Dense_0", "kernel"),)


def test_a_positional_flag_of_a_model_that_is_stored_quantized():
    model, params = ptq.quantize(Switched(), PARAMS, models.INT8, X, False)
    models.assert_close(model.apply({"params": params}, X, False), WANT)


class TakesAnything(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, **kwargs):
        assert not kwargs
        return self.layer(x)

    def dropped(self, x, rngs):
        return self.layer(self.dropout(x, rngs=rngs))


def test_random_keys_go_where_a_parameter_is_named_for_them():
    model, rngs = TakesAnything(), nnx.Rngs(0)
    quantize_model(model, QtProvider(models.INT8), X, rngs=rngs)
    for method in ("__call__", "dropped"):
        found = plan(model, models.INT8, X, method=method, rngs=rngs)
        assert len(found.quantized_ops) == 1
