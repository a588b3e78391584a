"""An array that several ops read: one range, and one fake quantization."""

import dataclasses
import functools
import sys

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import lax
from jax import numpy as jnp

import qwix_train
from qwix_train import (
    QtProvider,
    QtRule,
    QuantizationRule,
    Schedule,
    calib,
    ptq,
    quantize_model,
)
from qwix_train.trace import bodies, jax_versions
from tests import models, reference_process

# The largest magnitude is no tie between two codes.
INT8 = {
    "weight_qtype": "int8",
    "weight_calibration_method": "absmax,1.1",
    "act_qtype": "int8",
}
LEARNED = {
    name: [QuantizationRule(**INT8, act_calibration_method=name, act_observer="minmax")]
    for name in ("lsq", "lsq+", "pact")
}
LSQ = LEARNED["lsq"]
STATIC = [QuantizationRule(**INT8, act_static_scale=True)]
OPS = ("query", "key", "value")
X, MEMORY, WEIGHTS = (models.normal(5, 6, seed=i) for i in range(3))


class Attention(nn.Module):
    """Three projections of one array, or the last two of another one.

    Attributes:
      apart: whether each reads an array of its own, with the same elements.
    """

    apart: bool = False

    @nn.compact
    def __call__(self, x, memory=None):
        x = nn.relu(x)
        memory = x if memory is None else memory
        read = lax.optimization_barrier if self.apart else lambda x: x
        query, key, value = (
            nn.Dense(6, name=name)(read(array))
            for name, array in zip(OPS, (x, memory, memory), strict=True)
        )
        return query * jnp.tanh(key) + value


ONE, APART = Attention(), Attention(apart=True)
PARAMS = models.params_of(ONE, X)


def loss_of(params, x=X, rules=LSQ, model=ONE):
    """The loss of a quantized model."""
    model = quantize_model(model, QtProvider(rules))
    return jnp.sum(model.apply({"params": params}, x) * WEIGHTS)


def leaves_of(params, name):
    """The leaves of activations, in a module."""
    return {key: x for key, x in params[name].items() if key.startswith("dot_general")}


def with_values(params, scale=0.02, offset=0.0, alpha=1.5):
    """Params with other values for the leaves of activations."""
    parts = {"scale": scale, "offset": offset, "alpha": alpha}

    def value(path, leaf):
        name = path[-1].key
        part = name.rpartition("_")[2]
        return jnp.full_like(leaf, parts[part]) if "dot_general" in name else leaf

    return jax.tree_util.tree_map_with_path(value, params)


@pytest.mark.parametrize("method", LEARNED)
def test_leaves_stand_under_the_first_name(method):
    found = qwix_train.attach(PARAMS, LEARNED[method], X, model=ONE)
    own = qwix_train.attach(PARAMS, LEARNED[method], X, model=APART)
    models.assert_same(leaves_of(found, "query"), leaves_of(own, "query"))
    for name in ("key", "value"):
        assert not leaves_of(found, name) and leaves_of(own, name)
    crossed = qwix_train.attach(PARAMS, LEARNED[method], X, MEMORY**2, model=ONE)
    assert [bool(leaves_of(crossed, name)) for name in OPS] == [True, True, False]


@pytest.mark.slow
def test_gradients_of_lsq():
    """Those of the paper, in float64: the scale's is the sum over its readers."""
    params = with_values(qwix_train.attach(PARAMS, LSQ, X, model=ONE))
    grads, by_x = jax.grad(loss_of, argnums=(0, 1))(params, X)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    scale, inputs = p["query"]["dot_general0_lhs_scale"], np.maximum(np.float64(X), 0)
    y = inputs / scale
    codes = np.clip(np.round(y), -128, 127)
    kernels = {name: on_grid(p[name]["kernel"]) for name in OPS}
    out = {n: codes * scale @ kernels[n] + p[n]["bias"] for n in OPS}
    weights, key = np.float64(WEIGHTS), np.tanh(out["key"])
    by_out = {
        "query": weights * key,
        "key": weights * out["query"] * (1 - key**2),
        "value": weights,
    }
    by_array = sum(by_out[name] @ kernels[name].T for name in OPS)
    inside = (y > -128) & (y < 127)
    by_scale = np.where(inside, codes - y, codes) / np.sqrt(6 * 127)
    want = np.sum(by_array * by_scale)
    found = grads["query"]["dot_general0_lhs_scale"].item()
    np.testing.assert_allclose(found, want, 1e-4)
    models.assert_close(by_x, by_array * inside * (inputs > 0), 1e-4)


def on_grid(kernel):
    scale = 1.1 * abs(kernel).max(0, keepdims=True) / 127.5
    return np.clip(np.round(kernel / scale), -128, 127) * scale


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", LEARNED)
def test_what_is_trained_is_what_is_served(method):
    rules = LEARNED[method]
    params = with_values(qwix_train.attach(PARAMS, rules, X, model=ONE))
    want = jax.jit(quantize_model(ONE, QtProvider(rules)).apply)({"params": params}, X)
    model, served = ptq.quantize(ONE, params, rules, X)
    models.assert_close(jax.jit(model.apply)({"params": served}, X), want)
    for name in ("key", "value"):
        models.assert_same(leaves_of(served, name), leaves_of(served, "query"))
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    models.assert_same(qwix_train.quantize_params(params, abstract), served)
    # As a part of what is quantized.
    inner = qwix_train.quantize_params(
        {"params": {"block": params}}, {"params": {"block": abstract}}
    )
    models.assert_same(inner["params"]["block"], served)


def test_litert_knows_the_range_by_the_same_name():
    params = qwix_train.attach(PARAMS, LSQ, X, model=ONE)
    learned = qwix_train.ranges(params, LSQ)
    assert {name: list(ranges) for name, ranges in learned.items()} == {
        "query": ["dot_general0_lhs"]
    }
    provider = qwix_train.OdmlQatProvider(
        [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
    )
    measured = calib.observe(ONE.apply, provider).init({"params": PARAMS}, X)
    assert [name for name in measured if name.endswith("dot_general0_lhs")] == [
        "query/dot_general0_lhs"
    ]


def test_leaves_of_an_op_itself_take_precedence():
    own = qwix_train.attach(PARAMS, LSQ, X, model=APART)
    own["key"]["dot_general0_lhs_scale"] = jnp.full((1, 1), 0.1)
    models.assert_same(
        quantize_model(ONE, QtProvider(LSQ)).apply({"params": own}, X),
        quantize_model(APART, QtProvider(LSQ)).apply({"params": own}, X),
    )
    _, served = ptq.quantize(ONE, own, LSQ, X)
    scale = served["key"]["dot_general0_lhs_scale"].array
    np.testing.assert_allclose(scale, 0.1)


def test_a_product_of_two_arrays_reads_each_with_its_own_range():
    params = qwix_train.attach(PARAMS, LSQ, X, 3 * MEMORY, model=ONE)
    step = quantize_model(ONE, QtProvider(LSQ))
    scales = [
        leaves_of(params, name)["dot_general0_lhs_scale"] for name in ("query", "key")
    ]
    assert scales[1] > 2 * scales[0]
    with pytest.raises(ValueError, match="'key/dot_general0_lhs_scale' is not among"):
        attached = qwix_train.attach(PARAMS, LSQ, X, model=ONE)
        step.apply({"params": attached}, X, MEMORY)


def rounded(function, *args):
    """How often arrays of the shape of `X` are rounded."""
    body = jax_versions.body_of(jax.make_jaxpr(function)(*args))
    return sum(
        eqn.primitive.name == "round" and eqn.outvars[0].aval.shape == X.shape
        for _, eqn, _ in bodies.equations(body, lambda eqn, inside: True)
    )


def as_it_is(state, rules):
    del rules
    return state


def with_ranges(state, rules):
    return qwix_train.attach(state, rules, X)


def with_leaves(state, rules):
    return qwix_train.attach(state, rules, X)


CODES = {**INT8, "bwd_qtype": "int8"}
KINDS = {
    "dynamic": ([QuantizationRule(**INT8)], as_it_is),
    "static": (STATIC, with_ranges),
    "lsq": (LSQ, with_leaves),
    "codes": ([QtRule(**CODES)], as_it_is),
    "static codes": ([QtRule(**CODES, act_static_scale=True)], with_ranges),
}


def train_step(state, x):
    def loss_fn(params):
        return jnp.sum(state.apply_fn({"params": params}, x) * WEIGHTS)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def wrapped(kind, model, remat=False):
    """A train step, and its state."""
    rules, prepared = KINDS[kind]
    apply = jax.checkpoint(model.apply) if remat else model.apply
    tx = optax.sgd(0.1)
    state = TrainState.create(apply_fn=apply, params=PARAMS, tx=tx)
    return qwix_train.wrap_train_step(train_step, rules), prepared(state, rules)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_rounded_once(kind):
    # An array in QAT; with its derivative; its values and its codes, and six gradients.
    each, others = {"lsq": (2, 0)}.get(kind, (2, 6) if "codes" in kind else (1, 0))
    for model, arrays in ((ONE, 1), (APART, 3)):
        step, state = wrapped(kind, model)
        assert rounded(step, state, X) == each * arrays + others


@pytest.mark.thinned(4)
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static", "codes", "static codes"])
def test_steps_are_those_of_three_equal_arrays(kind, remat):
    results = []
    for model in (ONE, APART):
        step, state = wrapped(kind, model, remat)
        step = jax.jit(step)
        for seed in range(2):
            state, loss = step(state, models.normal(*X.shape, seed=seed))
        results.append((state.params, getattr(state, "quant_stats", {}), loss))
    models.assert_close(*results, 1e-5)
    if "static" in kind:
        stats = results[0][1]
        for name in OPS:
            models.assert_same(stats[name], stats["query"])
            assert stats[name]["dot_general0_lhs"]["count"] == 2


def ranges_of_steps(model, rules, batches, state):
    """The losses, and the ranges afterwards, of steps that are not compiled."""
    step, losses = qwix_train.wrap_train_step(train_step, rules), []
    for batch in batches:
        state, loss = step(state, batch)
        losses.append(loss)
    return state.quant_stats, losses


def new_state(model, rules):
    tx = optax.sgd(0.0)
    state = TrainState.create(apply_fn=model.apply, params=PARAMS, tx=tx)
    return qwix_train.attach(state, rules, X)


@pytest.mark.slow
def test_an_op_that_begins_later_has_a_range_of_its_own_in_each_phase():
    later = Schedule(start_step=1, ramp_steps=2)
    rules = [dataclasses.replace(STATIC[0], module_path="query", schedule=later)]
    rules += STATIC
    batches = [8 * X, X, X, X]
    results = [
        ranges_of_steps(model, rules, batches, new_state(model, rules))
        for model in (ONE, APART)
    ]
    models.assert_close(*results, 1e-5)
    counts = [results[0][0][n]["dot_general0_lhs"]["count"].item() for n in OPS]
    assert counts == [3, 4, 4]


def test_an_array_is_measured_once_though_its_readers_are_blended_in_apart():
    rules = [dataclasses.replace(STATIC[0], module_path="query", weight_qtype="int4")]
    rules += STATIC
    schedule = Schedule(ramp_steps=2)
    step = qwix_train.wrap_train_step(train_step, rules, schedule=schedule)
    state, _ = jax.jit(step)(new_state(ONE, rules), X)
    for name in OPS:
        assert state.quant_stats[name]["dot_general0_lhs"]["count"] == 1


def test_ranges_that_are_attached_later_begin_as_the_one_of_their_array():
    first = [dataclasses.replace(STATIC[0], module_path="key")]
    state = new_state(ONE, first)
    state, _ = qwix_train.wrap_train_step(train_step, first)(state, 8 * X)
    before = state.quant_stats["key"]
    state = qwix_train.attach(state, STATIC, X)
    for name in OPS:
        models.assert_same(state.quant_stats[name], before)
    state, _ = qwix_train.wrap_train_step(train_step, STATIC)(state, X)
    found = qwix_train.ranges(state, STATIC)
    model, served = ptq.quantize(ONE, state.params, STATIC, X, quant_stats=found)
    eval_step = qwix_train.wrap_eval_step(
        lambda state: state.apply_fn({"params": state.params}, X), STATIC
    )
    models.assert_close(model.apply({"params": served}, X), eval_step(state), 1e-5)


class Layers(nn.Module):
    """Two layers under `scan`, each under `remat`."""

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Attention)
        stack = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0, "quant_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        return stack(layer(name="layer"), x, None)[0]


class Unrolled(nn.Module):
    """The same layers, one after the other."""

    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            x = Attention(name=name)(x)
        return x


def by_name(tree):
    """A tree of layers that are unrolled, from that of layers that are stacked."""
    return {
        name: jax.tree.map(lambda leaf, at=at: leaf[at], tree["layer"])
        for at, name in enumerate(("first", "second"))
    }


@pytest.mark.slow
def test_learned_ranges_of_layers():
    params = models.params_of(Layers(), X)
    params = with_values(qwix_train.attach(params, LSQ, X, model=Layers()))
    assert leaves_of(params["layer"], "query")["dot_general0_lhs_scale"].shape == (
        2,
        1,
        1,
    )
    assert not leaves_of(params["layer"], "key")
    grads = jax.jit(jax.grad(functools.partial(loss_of, model=Layers())))(params)
    want = jax.grad(functools.partial(loss_of, model=Unrolled()))(by_name(params))
    models.assert_close(by_name(grads), want, 1e-4)


@pytest.mark.slow
def test_ranges_of_layers_in_the_state():
    stats = []
    stacked = models.params_of(Layers(), X)
    for model, params in ((Layers(), stacked), (Unrolled(), by_name(stacked))):
        model = quantize_model(model, QtProvider(STATIC))
        stats_of = jax.eval_shape(model.init, jax.random.key(0), X)["quant_stats"]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stats_of)

        def loss_fn(params, stats, model=model):
            variables = {"params": params, "quant_stats": stats}
            out, updates = model.apply(variables, X, mutable="quant_stats")
            return jnp.sum(out * WEIGHTS), updates["quant_stats"]

        grads = jax.jit(jax.grad(loss_fn, has_aux=True))
        stats.append(grads(params, zeros)[1])
    models.assert_close(by_name(stats[0]), stats[1])
    models.assert_same(stats[0]["layer"]["key"], stats[0]["layer"]["query"])


def of_reference(library):
    """The tree of statistics, and of quantized params, after a batch."""
    rule = library.QuantizationRule(**INT8, act_static_scale=True, act_batch_axes=(0,))
    model = library.quantize_model(ONE, library.QtProvider([rule]))
    variables = {**jax.jit(model.init)(jax.random.key(0), X), "params": PARAMS}
    out, updates = model.apply(variables, X, mutable="quant_stats")
    served = library.quantize_model(ONE, library.PtqProvider([rule]))
    abstract = jax.eval_shape(served.init, jax.random.key(0), X)["params"]
    params = library.quantize_params(PARAMS, abstract, updates["quant_stats"])
    trees = {"stats": updates["quant_stats"], "params": params, "out": out}
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees)
    }


@pytest.mark.slow
def test_trees_are_those_of_qwix(tmp_path):
    path = tmp_path / "reference.npz"
    reference_process.run("tests.qat.test_shared_ranges", path)
    ours = of_reference(qwix_train)
    with np.load(path) as theirs:
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, 1e-5, 1e-5, err_msg=name)


if __name__ == "__main__":
    import qwix

    np.savez(sys.argv[1], **of_reference(qwix))
