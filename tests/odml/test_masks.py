"""Elements that stand for minus infinity are no part of a range."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qwix_train import odml
from qwix_train.odml.calls import ModelCall
from tests.odml.small import INT8, init, module, normal, stats_of

CAUSAL = np.tril(np.ones((6, 6), bool))
PADDED = np.arange(6) < np.array([[6], [4]])


def attention(mask_of, scaled_last=False):
    """The weights of attention, with a mask that is added to its scores."""

    def call(self, x, *masks):
        scores = jnp.einsum("bqd,bkd->bqk", nn.Dense(8)(x), nn.Dense(8)(x))
        mask = mask_of(*masks)
        scores = (scores + mask) / 4 if scaled_last else scores / 4 + mask
        return nn.softmax(scores)

    return module(call)


def bert(kept):
    return (1 - kept[:, None, :]) * -1e4


def chosen(kept):
    return jnp.where(kept > 0, 0, jnp.finfo(jnp.float32).min)[:, None, :]


def error(model, *inputs, calibrated_on=None, provider=None):
    """How far fake-quantized attention is from that in float, and its plan."""
    provider = provider or odml.OdmlQatProvider(INT8)
    variables = init(model, *inputs)
    stats = stats_of(provider, model.apply, variables, *(calibrated_on or inputs))
    traced, _ = ModelCall(model, variables, "__call__", inputs, {}).traced
    provider = provider.with_ranges(stats)
    out, *_ = jax.jit(lambda v: provider.outputs(provider.plan(traced), v))(
        list(traced.inputs)
    )
    return np.abs(out - model.apply(variables, *inputs)).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "scaled_last"), [(-1e4, True), (-1e9, False), (-np.inf, True)]
)
def test_a_mask_that_is_an_input(value, scaled_last):
    model = attention(lambda mask: mask, scaled_last)
    mask = np.where(CAUSAL, 0, value).astype(np.float32)
    assert error(model, normal(2, 6, 8), mask) < 0.03


@pytest.mark.slow
def test_a_constant_mask_of_ten_thousand():
    model = attention(lambda: jnp.where(CAUSAL, 0, -1e4), scaled_last=True)
    assert error(model, normal(2, 6, 8)) < 0.03


@pytest.mark.slow
def test_a_mask_that_holds_other_numbers_too():
    distances = np.abs(np.arange(6) - np.arange(6)[:, None])
    mask = np.where(CAUSAL, -0.5 * distances, -1e9).astype(np.float32)
    assert error(attention(lambda mask: mask), normal(2, 6, 8), mask) < 0.03


@pytest.mark.thinned(6)
@pytest.mark.parametrize("mask_of", [bert, chosen])
@pytest.mark.parametrize("seen", [PADDED, np.ones_like(PADDED)], ids=["padded", "full"])
def test_a_mask_that_is_computed(mask_of, seen):
    """Also if nothing is masked in the batches that ranges are collected on."""
    x = normal(2, 6, 8)
    model = attention(mask_of)
    dtype = np.float32 if mask_of is bert else np.int32
    calibrated_on, inputs = (x, seen.astype(dtype)), (x, PADDED.astype(dtype))
    assert error(model, *inputs, calibrated_on=calibrated_on) < 0.03


def test_the_range_of_inputs_is_not_that_of_a_mask():
    model = attention(lambda mask: mask)
    provider = odml.OdmlQatProvider(INT8, fixed_range_for_inputs=(-3, 3))
    mask = np.where(CAUSAL, 0, -1e4).astype(np.float32)
    assert error(model, normal(2, 6, 8), mask, provider=provider) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("mask_of", [lambda mask: mask, bert])
def test_the_file_masks_what_training_does(mask_of):
    x = normal(2, 6, 8)
    masks = np.where(CAUSAL, 0, -1e9) if mask_of is not bert else PADDED
    inputs = (x, masks.astype(np.float32))
    model, provider = attention(mask_of), odml.OdmlQatProvider(INT8)
    variables = init(model, *inputs)
    stats = stats_of(provider, model.apply, variables, *inputs)
    litert = odml.convert(model, variables, provider, *inputs, quant_stats=stats)
    assert litert.is_full_integer
    assert np.abs(litert(*inputs) - model.apply(variables, *inputs)).max() < 0.03
    (out,) = litert.report(*inputs)
    assert out.max_steps < 2.01 and out.equal > 0.9


def test_large_negative_numbers_elsewhere_are_numbers():
    """Of an input that reaches a softmax only through a layer."""
    x = normal(4, 8) * 1e5
    model = module(lambda self, x, y: nn.softmax(1e-5 * (x + y).sum(-1)))
    provider = odml.OdmlQatProvider(INT8)
    stats = stats_of(provider, model.apply, {}, x, x)
    assert stats["add0_lhs"]["sum_of_min"] == x.min()
