"""Blocks in sequence, against the same sequence in NumPy, in float64."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train import QuantizationRule, ptq, quantize_model
from tests import models
from tests.calib.test_calibrator import NnxMlp
from tests.ptq.gptq_reference import WIDE, abstract, collect, correlated, reference

RULES = [QuantizationRule(weight_qtype="int3", weight_calibration_method=WIDE)]
BATCHES = [correlated(48, 6, seed) for seed in range(3)]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(10, name="up")(x))
        return x + nn.Dense(6, name="down")(hidden)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(name=f"layers_{i}")(x)
        return nn.Dense(4, name="head")(x)


@functools.cache
def params_of(model):
    return models.params_of(model, BATCHES[0])


def in_sequence(method, model, params, block, **options):
    """The quantized params, and the statistics that each run of the loop ends with."""
    step = method.wrap(jax.jit(lambda p, x: model.apply({"params": p}, x)))
    states = []

    def run(params):
        for x in BATCHES:
            step(params, x)
        states.append(jax.tree.map(np.asarray, method.state))

    target = abstract(method, model, BATCHES[0])
    quantized = ptq.quantize_in_sequence(
        method, run, params, target, block=block, **options
    )
    return quantized, states


def different_codes(quantized, params):
    """The share of codes of a chain of layers that are not the reference's.

    The input of each layer comes from the reference's codes of those before.
    """
    x, shares = np.concatenate(BATCHES).astype(np.float64), []
    for name in params:
        kernel, bias = (np.asarray(params[name][key]) for key in ("kernel", "bias"))
        codes, scales = reference(kernel.T, 2 * x.T @ x / len(x), "int3")
        found = np.asarray(quantized[name]["kernel"].array.qvalue, int)
        shares.append(np.mean(found.T != codes))
        x = np.maximum(x @ (codes * scales).T + bias, 0)
    return shares


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(5)(x)


def test_gptq_in_sequence_is_the_reference():
    model, method = Chain(), ptq.Gptq(RULES)
    params = params_of(model)
    quantized, _ = in_sequence(method, model, params, r"Dense_\d")
    assert max(different_codes(quantized, params)) < 0.02
    assert [weight.param for weight in method.report.weights] == [
        f"Dense_{i}/kernel" for i in range(3)
    ]
    # All at once, the layers after the first see other inputs.
    collect(method, model, params, *BATCHES)
    at_once = method.quantize_params(params, abstract(method, model, BATCHES[0]))
    first, *others = different_codes(at_once, params)
    assert first < 0.02 and min(others) > 0.05


def computed(layer, x):
    """A quantized layer in float64: codes, their scale, and that of its input."""
    array = layer["kernel"].array
    kernel = np.asarray(array.qvalue, np.float64) * np.asarray(array.scale, np.float64)
    scale = layer.get("dot_general0_lhs_pre_quant_scale", np.ones((1, len(kernel))))
    return (x * np.asarray(scale, np.float64)) @ kernel + np.asarray(layer["bias"])


def check_state(state, x):
    """Statistics are those of an input."""
    np.testing.assert_allclose(state["absmean"][0], np.abs(x).mean(0), 1e-4, 1e-5)
    np.testing.assert_allclose(state["min"][0], x.min(0), 1e-4, 1e-5)
    if "second_moment" in state:
        moment = x.T @ x / len(x)
        np.testing.assert_allclose(state["second_moment"][0], moment, 1e-3, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        ptq.Awq,
        ptq.Gptq,
        ptq.SmoothQuant,
    ],
)
def test_inputs_are_those_from_blocks_that_are_quantized(make):
    model, method = Network(), make(RULES)
    params = params_of(model)
    quantized, states = in_sequence(method, model, params, r"layers_\d+")
    x = np.concatenate(BATCHES).astype(np.float64)
    for i, state in enumerate(states[:2]):
        block, up = quantized[f"layers_{i}"], params[f"layers_{i}"]["up"]
        names = [f"layers_{i}/{name}/dot_general0_lhs" for name in ("up", "down")]
        assert sorted(state) == sorted(names)
        check_state(state[names[0]], x)
        # Within a block, what enters the second layer is from the first in float.
        hidden = x @ np.asarray(up["kernel"], np.float64) + np.asarray(up["bias"])
        check_state(state[names[1]], np.maximum(hidden, 0))
        x = x + computed(block["down"], np.maximum(computed(block["up"], x), 0))
    (head,) = states[2].values()
    check_state(head, x)


def test_statistics_are_those_of_one_block():
    model, method = Network(), ptq.Gptq(RULES)
    params = params_of(model)
    _, states = in_sequence(method, model, params, r"layers_\d+")
    sizes = [sum(x.nbytes for x in jax.tree.leaves(state)) for state in states]
    collect(method, model, params, BATCHES[0])
    per_block = dict.fromkeys(("layers_0", "layers_1", "head"), 0)
    for name, state in method.state.items():
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        per_block[name.partition("/")[0]] += size
    assert sizes == list(per_block.values())
    assert max(sizes) < 0.5 * sum(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("make", [ptq.Gptq, ptq.Awq, ptq.SmoothQuant])
def test_nnx(make):
    model, method = NnxMlp(nnx.Rngs(0)), make(RULES)
    linen = models.Mlp()
    layers = {"Dense_0": model.first, "Dense_1": model.second}
    params = {
        name: {"kernel": layer.kernel[...], "bias": layer.bias[...]}
        for name, layer in layers.items()
    }
    want, _ = in_sequence(make(RULES), linen, params, r"Dense_\d")
    step = method.wrap(nnx.jit(lambda model, x: model(x)))

    def run(params):
        nnx.update(model, params)
        for x in BATCHES:
            step(model, x)

    whole = quantize_model(model, method.provider, BATCHES[0])
    floats = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    quantized = ptq.quantize_in_sequence(
        method, run, floats, whole, block="first|second"
    )
    for name, mine in (("Dense_0", "first"), ("Dense_1", "second")):
        array = want[name]["kernel"].array
        models.assert_same(quantized[mine]["kernel"]["array"]["qvalue"], array.qvalue)
    nnx.update(whole, quantized)
    assert jnp.isfinite(whole(BATCHES[0])).all()


class Autoencoder(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(4), nn.Dense(6)

    def encode(self, x):
        return self.encoder(x)

    def __call__(self, x):
        return self.decoder(self.encode(x))


@pytest.mark.slow
def test_collections_two_steps_and_donation():
    """Params in a collection, and steps of which one does not reach all blocks."""
    model, method = Autoencoder(), ptq.Gptq(RULES)
    variables = {"params": params_of(model)}
    whole = quantize_model(model, method.provider)
    target = jax.eval_shape(whole.init, jax.random.key(0), BATCHES[0])
    apply = functools.partial(model.apply, method="encode")
    steps = [method.wrap(jax.jit(step)) for step in (apply, model.apply)]
    ran = []

    def run(variables):
        ran.append(0)
        for x in BATCHES:
            for step in steps:
                step(variables, x)

    quantize = functools.partial(ptq.quantize_in_sequence, method, run)
    want = quantize(variables, target, block="encoder|decoder")
    assert len(ran) == 2
    copied = jax.tree.map(jnp.copy, variables)
    found = quantize(copied, target, block="encoder|decoder", donate=True)
    models.assert_same(found, want)
    deleted = jax.tree.map(lambda x: x.is_deleted(), copied["params"]["encoder"])
    assert deleted == {"kernel": True, "bias": False}


def test_errors():
    model, method = Network(), ptq.Gptq(RULES)
    params = params_of(model)
    with pytest.raises(
        ValueError, match=r"block='block_\\\\d' matches the module path"
    ):
        in_sequence(method, model, params, r"block_\d")
    target = abstract(method, model, BATCHES[0])
    with pytest.raises(ValueError, match="No inputs were collected: run the wrapped"):
        ptq.quantize_in_sequence(
            method, lambda params: None, params, target, block="head"
        )
    other = {**params, "other": params["head"]}
    step = method.wrap(lambda p, x: model.apply({"params": p}, x))
    with pytest.raises(ValueError, match="'other/kernel' was not reached"):
        ptq.quantize_in_sequence(
            method,
            lambda params: step({**params}, BATCHES[0]),
            other,
            {**target, "other": target["head"]},
            block="head",
        )
    assert not method.state
