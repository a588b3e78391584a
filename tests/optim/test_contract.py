"""What every transformation has to be: it goes wherever one of Optax goes.

A transformation is tested by a line in `TRANSFORMS`: a function that takes an Optax
transformation and returns one.
"""

import functools

import jax
import optax
import pytest
from flax import nnx
from jax import P
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding
from orbax import checkpoint as ocp

from tests import models
from tests.optim.transforms import (
    GRADS,
    PARAMS,
    SHAPES,
    TRANSFORMS,
    run,
    tree,
)

# One runs by default, of those whose state is more than that of Optax.
SLOW = tuple(name for name in TRANSFORMS if name != "dynamic")
# Those that must see the updates as they will be added to the params.
LAST = ("stochastic_rounding", "freeze_oscillations", "proxquant", "parq")
# Those that round, and so may put a weight on either side of a threshold.
ROUND = ("dampen", "freeze_oscillations", "proxquant", "parq")
MAKE = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, make in TRANSFORMS.items()
    ],
)
MESH = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
SPECS = {
    "kernel": P("data", "model"),
    "bias": P("model"),
    "kernel_lora_a": P("data", None),
    "kernel_lora_b": P(None, "model"),
    "low": P("model"),
}


def adam(learning_rate=0.1):
    return optax.adam(learning_rate)


@functools.cache
def each_step(make):
    """The params and the state after each of three steps with Adam and nothing else."""
    return run(make(adam()), each=True)


def alone(make, steps=3):
    """Those after some of the steps."""
    return each_step(make)[steps - 1]


def assert_same_types(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.slow
@MAKE
def test_jit(make):
    tx = make(adam())
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    assert jax.tree.all(jax.tree.map(lambda x: jnp.isfinite(x).all(), (params, state)))
    compiled, compiled_state = alone(make, 2)
    assert_same_types(state, compiled_state)
    models.assert_close(compiled, params)
    # Something is trained.
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, params, PARAMS))


@pytest.mark.slow
@MAKE
def test_donation(make):
    tx = make(adam())
    step = jax.jit(tx.update, donate_argnums=1)
    state = jax.jit(tx.init)(PARAMS)
    before = jax.tree.leaves(state)
    _, state = step(GRADS, state, PARAMS)
    # What is of the size of a param was reused.
    assert all(x.is_deleted() for x in before if x.size >= 64)
    step(GRADS, state, PARAMS)


@MAKE
def test_extra_args(make):
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    once, _ = run(make(optax.chain(optax.sgd(0.1), plateau)), value=1.0, steps=1)
    models.assert_close(once, run(make(optax.sgd(0.1)), steps=1)[0])


@pytest.mark.slow
@MAKE
def test_chain(make):
    last = any(make is TRANSFORMS[name] for name in LAST)
    behind = optax.scale(1.0 if last else 3.0)
    chained, _ = run(optax.chain(optax.scale(2.0), make(adam()), behind))
    scaled = jax.tree.map(lambda g: 2 * g, GRADS)
    inside, _ = run(make(optax.chain(adam(), behind)), grads=scaled)
    models.assert_close(chained, inside)


@pytest.mark.slow
@MAKE
def test_multi_transform(make):
    both = {"ours": PARAMS, "theirs": tree(2)}
    labels = {"ours": "ours", "theirs": "theirs"}
    tx = optax.multi_transform({"ours": make(adam()), "theirs": adam(0.2)}, labels)
    grads = {"ours": GRADS, "theirs": GRADS}
    params, _ = run(tx, both, grads)
    models.assert_close(params["theirs"], theirs()[0])
    models.assert_close(params["ours"], alone(make)[0])


@functools.cache
def theirs():
    return run(adam(0.2), tree(2))


@pytest.mark.slow
@MAKE
def test_masked(make):
    mask = {"layer": {name: name != "bias" for name in SHAPES}}
    params, _ = run(optax.masked(make(adam()), mask), steps=1)
    bias = PARAMS["layer"]["bias"] + GRADS["layer"]["bias"]
    expected = {"layer": alone(make, 1)[0]["layer"] | {"bias": bias}}
    models.assert_close(params, expected)


@pytest.mark.slow
@MAKE
def test_multi_steps(make):
    params, _ = run(optax.MultiSteps(make(adam()), 2), steps=6)
    models.assert_close(params, alone(make)[0])


@pytest.mark.slow
@MAKE
def test_inject_hyperparams(make):
    tx = optax.inject_hyperparams(lambda learning_rate: make(adam(learning_rate)))
    models.assert_close(run(tx(learning_rate=0.1))[0], alone(make)[0])
    tx = tx(learning_rate=0.1)
    state = tx.init(PARAMS)
    first, _ = tx.update(GRADS, state, PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.2)
    second, _ = tx.update(GRADS, state, PARAMS)
    models.assert_close(second, jax.tree.map(lambda u: 2 * u, first))


@pytest.mark.slow
@MAKE
def test_sharded(make):
    tx = make(adam())
    specs = {"layer": SPECS}
    shardings = jax.tree.map(lambda spec: NamedSharding(MESH, spec), specs)
    params, grads = jax.device_put((PARAMS, GRADS), (shardings, shardings))
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(2):
        params, state = step(grads, state, params)
    expected, expected_state = alone(make, 2)
    models.assert_close(params, expected, 1e-6, atol=1e-5)
    assert_same_types(state, expected_state)
    # What has the shape of a param lies where the param lies.
    of_shape = {SHAPES[name]: sharding for name, sharding in shardings["layer"].items()}
    found = [x for x in jax.tree.leaves(state) if x.shape in of_shape]
    assert found
    for x in found:
        assert x.sharding.is_equivalent_to(of_shape[x.shape], x.ndim)


@MAKE
def test_specs_of_the_state(make):
    tx = make(adam())
    state = tx.init(PARAMS)

    def spec_of(x, spec):
        # A scale has one entry for an axis whose elements share it.
        if isinstance(x, optax.MaskedNode):
            return P()
        pairs = zip(spec, x.shape, strict=True)
        return P(*(name if size > 1 else None for name, size in pairs))

    specs = optax.tree_map_params(
        tx,
        spec_of,
        state,
        {"layer": SPECS},
        transform_non_params=lambda _: P(),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    leaves = [
        jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
        for tree in (state, specs)
    ]
    for x, spec in zip(*leaves, strict=True):
        if isinstance(x, jax.Array):
            jax.device_put(x, NamedSharding(MESH, spec))


@MAKE
def test_empty_trees(make):
    for params in ({}, {"layer": {}}):
        assert run(make(adam()), params, params)[0] == params


@pytest.mark.slow
@MAKE
def test_bfloat16(make):
    low = run(make(adam()), tree(0, jnp.bfloat16), tree(1, jnp.bfloat16))[0]
    high = alone(make)[0]
    low = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    if any(make is TRANSFORMS[name] for name in ROUND):
        off = jax.tree.map(lambda x, y: jnp.abs(x - y) > 0.03 * (1 + abs(y)), low, high)
        assert max(x.mean() for x in jax.tree.leaves(off)) < 0.03
    else:
        models.assert_close(low, high, 0.03)


@pytest.mark.slow
@MAKE
def test_saved_and_restored(make, tmp_path):
    tx = make(adam())
    # Where restored arrays are, so that the update is compiled once.
    params, state = jax.device_put(alone(make), jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(tx.init, PARAMS)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    models.assert_same(restored, state)
    update = jax.jit(tx.update)
    models.assert_same(update(GRADS, restored, params), update(GRADS, state, params))


class Layer(nnx.Module):
    def __init__(self, params):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))


class Model(nnx.Module):
    def __init__(self):
        self.layer = Layer(PARAMS["layer"])


@pytest.mark.slow
@MAKE
def test_nnx_optimizer(make):
    model = Model()
    optimizer = nnx.Optimizer(model, make(adam()), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            products = jax.tree.map(
                lambda p, g: jnp.vdot(p, g), nnx.to_pure_dict(nnx.state(model)), GRADS
            )
            return sum(jax.tree.leaves(products))

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(3):
        step(model, optimizer)
    models.assert_close(nnx.to_pure_dict(nnx.state(model)), alone(make)[0])
