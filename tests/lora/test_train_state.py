"""Steps of a user train adapters, as they are."""

import pickle

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import qwix_train
from qwix_train import QuantizationRule, calib, lora
from tests import models, trace_count

X = jax.device_put(np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32))
Y = jax.device_put(np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32))
MODEL = models.Mlp(width=32)
PARAMS = models.params_of(MODEL, X, seed=0)
BASES = {
    "float": {},
    "int8": {"weight_qtype": "int8"},
    "qlora": {"weight_qtype": "nf4", "tile_size": 32, "double_quant": True},
    "int8 products": {"weight_qtype": "int8", "act_qtype": "int8"},
}


def rules(**kwargs):
    return [lora.LoraRule(**{"rank": 2, "alpha": 4.0, **kwargs})]


def state_of(tx=None, apply_fn=MODEL.apply, **kwargs):
    tx = tx or optax.adam(1e-2)
    key = jax.random.key(1)
    state = models.lora_state(apply_fn, PARAMS, tx, rules(**kwargs), key, X)
    # B that is not zero, so that A has a gradient.
    params = jax.tree.map(lambda x: x + 0.1, state.params)
    return state.replace(params=params, opt_state=tx.init(params))


def loss_of(state, params, x, y):
    return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)


def train_step(state, batch):
    """A step as it would be without adapters."""
    x, y = batch
    loss, grads = jax.value_and_grad(lambda p: loss_of(state, p, x, y))(state.params)
    return state.apply_gradients(grads=grads), loss


def merged(state):
    return lora.merge(state, to_float=True)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("base", BASES)
def test_a_step_trains_adapters_alone(base):
    state = state_of(**BASES[base])
    assert isinstance(state, TrainState)
    names = {key for layer in state.params.values() for key in layer}
    assert names == {"kernel_lora_a", "kernel_lora_b"}
    frozen = jax.tree.map(np.asarray, state.frozen)
    step, traces = trace_count.counted(train_step)
    step = jax.jit(step)
    losses = []
    for _ in range(30):
        state, loss = step(state, (X, Y))
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert len(traces) == 1
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)
    moments = jax.tree.leaves(state.opt_state[0].mu)
    assert sum(x.size for x in moments) == sum(
        x.size for x in jax.tree.leaves(state.params)
    )


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float", "int8", "qlora"])
def test_outputs_and_gradients_are_those_of_the_merged_weights(base):
    state = state_of(**BASES[base])
    dense = {
        path[0]: qwix_train.values.stored.dequantized(state.frozen[path[0]]["kernel"])
        if base != "float"
        else state.frozen[path[0]]["kernel"]
        for path in state.layouts
    }

    def by_hand(adapters):
        x = X
        for name in ("Dense_0", "Dense_1"):
            a, b = adapters[name]["kernel_lora_a"], adapters[name]["kernel_lora_b"]
            x = x @ (dense[name] + 2.0 * a @ b) + PARAMS[name]["bias"]
            x = nn.relu(x) if name == "Dense_0" else x
        return jnp.mean((x - Y) ** 2)

    want, want_grads = jax.value_and_grad(by_hand)(state.params)
    got, grads = jax.value_and_grad(lambda p: loss_of(state, p, X, Y))(state.params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        grads,
        want_grads,
    )


@pytest.mark.slow
def test_gradients_pass_straight_through_quantized_activations():
    state = state_of(weight_qtype="int8", act_qtype="int8")
    dense = {
        path[0]: qwix_train.values.stored.dequantized(state.frozen[path[0]]["kernel"])
        for path in state.layouts
    }

    def rounded(x):
        scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127.5
        codes = jnp.clip(jnp.round(x / scale), -128, 127)
        return x + lax.stop_gradient(codes * scale - x)

    def by_hand(adapters):
        x = X
        for name in ("Dense_0", "Dense_1"):
            a, b = adapters[name]["kernel_lora_a"], adapters[name]["kernel_lora_b"]
            x = rounded(x) @ dense[name] + 2.0 * (x @ a) @ b + PARAMS[name]["bias"]
            x = nn.relu(x) if name == "Dense_0" else x
        return jnp.mean((x - Y) ** 2)

    want = jax.grad(by_hand)(state.params)
    got = jax.grad(lambda p: loss_of(state, p, X, Y))(state.params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < 2e-2  # the reference is off by 1.2 times the norm


def test_no_gradient_of_the_base_is_computed():
    state = state_of()
    jaxpr = jax.make_jaxpr(train_step)(state, (X, Y))
    shapes = {tuple(x.shape) for x in jax.tree.leaves(PARAMS) if x.ndim == 2}
    made = [
        tuple(var.aval.shape)
        for eqn in jaxpr.jaxpr.eqns
        if eqn.primitive.name == "dot_general"
        for var in eqn.outvars
    ]
    assert made
    assert not shapes & set(made)
    assert not {shape[::-1] for shape in shapes} & set(made)


@pytest.mark.slow
def test_accumulation_and_scan_over_micro_batches():
    tx = optax.MultiSteps(optax.sgd(0.1), 2)
    state = state_of(tx=tx)

    @jax.jit
    def run(state, x, y):
        def body(state, batch):
            return train_step(state, batch)

        return lax.scan(body, state, (x, y))

    halves = X.reshape(2, 8, 64), Y.reshape(2, 8, 3)
    after, losses = run(state, *halves)
    whole = state_of(tx=optax.sgd(0.1))
    want, _ = train_step(whole, (X, Y))
    assert losses.shape == (2,)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        after.params,
        want.params,
    )


@pytest.mark.slow
def test_under_remat_and_vmap():
    state = state_of(**BASES["qlora"])

    def loss(p):
        apply = jax.checkpoint(lambda p, x: state.apply_fn({"params": p}, x))
        rows = jax.vmap(lambda x: apply(p, x[None])[0])(X)
        return jnp.mean((rows - Y) ** 2)

    want = jax.grad(lambda p: loss_of(state, p, X, Y))(state.params)
    got = jax.jit(jax.grad(loss))(state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want
    )


@pytest.mark.slow
@pytest.mark.usefixtures("small_heap")
def test_no_tracer_outlives_a_step():
    state = state_of()
    with jax.check_tracer_leaks():
        state, loss = jax.jit(train_step)(state, (X, Y))
    assert np.isfinite(loss)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_saved_and_restored_with_orbax_and_flax(tmp_path):
    state, _ = jax.jit(train_step)(state_of(**BASES["qlora"]), (X, Y))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", shapes)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    apply = jax.jit(lambda state: state.apply_fn({"params": state.params}, X))
    np.testing.assert_array_equal(apply(restored), apply(state))
    fresh = state_of(**BASES["qlora"])
    again = serialization.from_bytes(fresh, serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)


def test_a_step_is_compiled_once_for_states_with_the_same_rules():
    step, traces = trace_count.counted(train_step)
    step = jax.jit(step)
    tx = optax.adam(1e-2)
    for _ in range(2):
        step(state_of(tx=tx), (X, Y))
    assert len(traces) == 1
    step(state_of(tx=tx, alpha=8.0), (X, Y))
    assert len(traces) == 2


def test_a_state_is_a_tree_like_any_other():
    state = state_of()
    doubled = jax.tree.map(lambda x: x * 2, state)
    assert isinstance(doubled, lora.LoraTrainState)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert hash(jax.tree.structure(state)) == hash(jax.tree.structure(doubled))
    # The base that apply_fn finds is that of the very state.
    zeros = state.replace(frozen=jax.tree.map(jnp.zeros_like, state.frozen))
    out = zeros.apply_fn({"params": jax.tree.map(jnp.zeros_like, state.params)}, X)
    np.testing.assert_array_equal(out, np.zeros((16, 3)))
    kept = state.replace(apply_fn=zeros.apply_fn)
    np.testing.assert_array_equal(
        kept.apply_fn({"params": state.params}, X),
        state.apply_fn({"params": state.params}, X),
    )
    pickle.dumps(jax.tree.map(np.asarray, state.params))


class BatchNormState(TrainState):
    """A state of a user, with one more field."""

    batch_stats: dict


@pytest.mark.slow
def test_a_model_with_batch_statistics():
    model = models.Everything()
    images = jax.device_put(
        np.random.default_rng(2).normal(size=(8, 5, 5)).astype(np.float32)
    )
    variables = model.init(
        {"params": jax.random.key(0), "dropout": jax.random.key(1)}, images
    )
    stats = {"batch_stats": variables["batch_stats"]}
    state = BatchNormState(
        0, model.apply, variables["params"], optax.adam(1e-2), (), **stats
    )
    state = qwix_train.attach(
        state,
        rules(weight_qtype="int8"),
        images,
        rng=jax.random.key(2),
        rngs={"dropout": jax.random.key(3)},
    )
    assert isinstance(state, BatchNormState) and isinstance(state, lora.LoraTrainState)

    @jax.jit
    def step(state, images, key):
        def loss(params):
            out, updates = state.apply_fn(
                {
                    "params": params,
                    "batch_stats": state.batch_stats,
                    "perturbations": variables["perturbations"],
                },
                images,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return jnp.mean(out**2), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads)
        return state.replace(batch_stats=updates["batch_stats"]), value

    assert set(state.params) == {"Conv_0", "Dense_0", "Dense_1"}
    before = state.batch_stats
    for i in range(3):
        state, value = step(state, images, jax.random.key(i))
    assert np.isfinite(value)
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), state.batch_stats, before
    )
    assert max(jax.tree.leaves(moved)) > 0


@pytest.mark.slow
def test_plain_functions_and_lists_of_params():
    params = [
        {"w": jnp.ones((64, 8)) * 0.1, "b": jnp.zeros(8)},
        {"w": jnp.ones((8, 3)) * 0.1, "b": jnp.zeros(3)},
    ]

    def apply(params, x):
        for layer in params:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x

    state = models.lora_state(
        apply, params, optax.sgd(0.1), rules(), jax.random.key(0), X
    )
    assert set(state.params) == {"0", "1"}
    got = state.apply_fn(state.params, X)
    np.testing.assert_allclose(got, apply(params, X), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_tokens_may_be_numpy_arrays():
    model, tokens = nn.Embed(11, 8), np.array([1, 2])
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    state = models.lora_state(
        model.apply,
        params,
        optax.sgd(0.1),
        rules(op_names=("gather",)),
        jax.random.key(1),
        tokens,
    )
    assert state.params["embedding_lora_a"].shape == (11, 2)
    got = state.apply_fn({"params": state.params}, tokens)
    np.testing.assert_array_equal(got, params["embedding"][tokens])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh_it_is_the_same(kind):
    kinds = (jax.sharding.AxisType[kind],) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), kinds)

    def placed(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    state = state_of(**BASES["int8"])
    want, want_loss = jax.jit(train_step)(state, (X, Y))
    params = jax.tree.map(placed, PARAMS)
    params["Dense_0"]["kernel"] = placed(PARAMS["Dense_0"]["kernel"], None, "model")
    on_mesh = models.lora_state(
        MODEL.apply,
        params,
        optax.adam(1e-2),
        rules(**BASES["int8"]),
        jax.random.key(1),
        X,
    )
    shardings = jax.tree.map(lambda x: x.sharding, on_mesh.params)
    values = jax.tree.map(jax.device_put, state.params, shardings)
    on_mesh = on_mesh.replace(params=values)
    with jax.set_mesh(mesh):
        batch = placed(X, "data"), placed(Y, "data")
        got, loss = jax.jit(train_step)(on_mesh, batch)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        got.params,
        want.params,
    )


QAT = [QuantizationRule(weight_qtype="int4")]


@pytest.mark.slow
def test_a_wrapped_step_fake_quantizes_a_float_base():
    state = state_of()
    step = jax.jit(qwix_train.wrap_train_step(train_step, QAT))
    got, loss = step(state, (X, Y))
    quantized = state_of(weight_qtype="int4")
    want, want_loss = train_step(quantized, (X, Y))
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        got.params,
        want.params,
    )
    assert jax.tree.structure(got) == jax.tree.structure(state)


@pytest.mark.slow
def test_a_wrapped_step_quantizes_activations_next_to_a_quantized_base():
    state = state_of(**BASES["qlora"])
    act = [QuantizationRule(weight_qtype="nf4", tile_size=32, act_qtype="int8")]
    _, plain = train_step(state, (X, Y))
    _, loss = jax.jit(qwix_train.wrap_train_step(train_step, act))(state, (X, Y))
    assert loss != plain
    assert abs(loss - plain) < 0.1 * plain


def test_static_ranges_of_a_state_with_adapters():
    static = [
        QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
    ]
    state = qwix_train.attach(state_of(), static, X)
    step = jax.jit(qwix_train.wrap_train_step(train_step, static))
    for _ in range(2):
        state, loss = step(state, (X, Y))
    assert np.isfinite(loss)
    stats = state.quant_stats["Dense_0"]["dot_general0_lhs"]
    assert int(stats["count"]) == 2
    np.testing.assert_allclose(
        stats["sum_of_absmax"].reshape(()), 2 * np.abs(X).max(), rtol=1e-6
    )


def test_calibration_of_a_state_with_adapters():
    static = [
        QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
    ]
    state = state_of(**BASES["int8"])
    calibrator = qwix_train.calib.Calibrator(static)
    eval_step = jax.jit(lambda state, x: state.apply_fn({"params": state.params}, x))
    out = calibrator.wrap(eval_step)(state, X)
    np.testing.assert_allclose(out, eval_step(state, X), rtol=1e-5, atol=1e-6)
    # What enters the second layer has the adapter of the first in it.
    weights = merged(state)["Dense_0"]
    hidden = np.maximum(X @ weights["kernel"] + weights["bias"], 0)
    found = calibrator.quant_stats["Dense_1"]["dot_general0_lhs"]["sum_of_absmax"]
    np.testing.assert_allclose(np.ravel(found)[0], hidden.max(), rtol=1e-4)


def test_rules_of_both_kinds_mix():
    mixed = [
        QuantizationRule(module_path="Dense_1", weight_qtype="int8"),
        *rules(module_path="Dense_0"),
    ]
    state = models.lora_state(
        MODEL.apply, PARAMS, optax.adam(1e-3), mixed, jax.random.key(0), X
    )
    assert set(state.params) == {"Dense_0"}
    assert state.frozen["Dense_1"]["kernel"].array.qvalue.dtype == jnp.int8
    assert state.frozen["Dense_0"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"module_path": "dense"}, "matches no op that reads a weight.*'Dense_0'"),
        ({"op_names": ("gather",)}, "matches no op that reads a weight"),
    ],
)
def test_rules_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        state_of(**change)


def test_wrong_params_are_refused():
    state = state_of()
    with pytest.raises(ValueError, match="no adapters of this state.*Dense_0/bias"):
        state.apply_fn({"params": PARAMS}, X)
    with pytest.raises(ValueError, match="has no adapter.*Dense_1/kernel_lora_a"):
        state.apply_fn({"params": {"Dense_0": state.params["Dense_0"]}}, X)
    other = state_of(rank=3)
    with pytest.raises(ValueError, match=r"Dense_0/kernel_lora_a.*\(64, 3\).*rank=2"):
        state.apply_fn({"params": other.params}, X)
    with pytest.raises(ValueError, match="variables with the adapters"):
        state.apply_fn(state.params, X)
    both = {**PARAMS, "Dense_0": {**PARAMS["Dense_0"], **state.params["Dense_0"]}}
    with pytest.raises(ValueError, match="have adapters already"):
        lora.init(both, MODEL.apply, rules(), jax.random.key(0), X)


def test_params_of_the_model_may_be_named_as_parts_of_adapters_are():
    def apply(params, x):
        return x @ params["q_lora_a"] @ params["q_lora_b"]

    w = np.linspace(-1.0, 2.0, X.shape[1] * 3, dtype=np.float32).reshape(-1, 3)
    key, tx = jax.random.key(0), optax.sgd(0.1)
    params = {"q_lora_a": w, "q_lora_b": w.T}
    state = models.lora_state(apply, params, tx, rules(), key, X)
    of_a, of_b = ([f"{name}_lora_a", f"{name}_lora_b"] for name in params)
    assert sorted(state.params) == [*of_a, *of_b]
    models.assert_close(state.apply_fn(state.params, X), X @ w @ w.T, 1e-5)


def test_params_that_are_one_array_have_no_place_for_adapters():
    w = np.ones((X.shape[1], 3), np.float32)
    with pytest.raises(ValueError, match="one array.*its lora_a has no place"):
        lora.init(w, lambda w, x: x @ w, rules(), jax.random.key(0), X)


def test_a_base_that_is_quantized_already_is_kept():
    quantized, params = qwix_train.ptq.quantize(
        MODEL, PARAMS, [QuantizationRule(weight_qtype="int8")], X
    )
    del quantized
    adapters, frozen, layouts = lora.init(
        params, MODEL.apply, rules(weight_qtype="int8"), jax.random.key(0), X
    )
    assert frozen["Dense_0"]["kernel"] is params["Dense_0"]["kernel"]
    assert len(layouts) == 2 and set(adapters) == {"Dense_0", "Dense_1"}
    with pytest.raises(ValueError, match="quantized already.*init='pissa'"):
        lora.init(
            params,
            MODEL.apply,
            rules(weight_qtype="int8", init="pissa"),
            jax.random.key(0),
            X,
        )
    with pytest.raises(
        ValueError, match="Dense_0/kernel.*codes of int8.*asks for int4"
    ):
        lora.init(params, MODEL.apply, rules(weight_qtype="int4"), jax.random.key(0), X)


@pytest.mark.slow
def test_static_ranges_are_those_of_the_base():
    static = {"weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": True}
    calibrator = calib.Calibrator([QuantizationRule(**static)])
    calibrator.wrap(lambda params, x: MODEL.apply({"params": params}, x))(PARAMS, X)
    quantized, params = qwix_train.ptq.quantize(
        MODEL,
        PARAMS,
        [QuantizationRule(**static)],
        X,
        quant_stats=calibrator.quant_stats,
    )
    state = models.lora_state(
        MODEL.apply, params, optax.sgd(0.1), rules(**static), jax.random.key(0), X
    )
    got = state.apply_fn({"params": state.params}, X)
    models.assert_close(got, quantized.apply({"params": params}, X))
    with pytest.raises(
        ValueError, match="no static range for 'Dense_0/dot_general0_lhs'"
    ):
        state_of(**static)


@pytest.mark.parametrize("model", [MODEL, MODEL.apply])
def test_trees_of_a_module_or_its_apply(model):
    for params in (PARAMS, {"params": PARAMS}):
        adapters, base, layouts = lora.init(
            params, model, rules(), jax.random.key(1), X
        )
        want = models.lora_state(
            MODEL.apply, PARAMS, optax.sgd(0.1), rules(), jax.random.key(1), X
        )
        models.assert_same((adapters, base), (want.params, want.frozen))
        assert layouts == want.layouts
    with pytest.raises(TypeError, match="An NNX model holds its params"):
        nnx_model = models.NnxMlp(nnx.Rngs(0))
        lora.init(PARAMS, nnx_model, rules(), jax.random.key(0), X)


def test_an_apply_function_around_that_of_the_model():
    model, x = nn.Dense(4), jnp.ones((1, 6))
    params = {"kernel": np.ones((6, 4), np.float32), "bias": np.zeros(4, np.float32)}
    tx, key = optax.sgd(0.1), jax.random.key(0)
    state = TrainState(0, lambda *args: model.apply(*args), params, tx, ())
    state = qwix_train.attach(state, rules(), x, rng=key)
    assert sorted(state.params) == ["kernel_lora_a", "kernel_lora_b"]
    assert state.apply_fn({"params": state.params}, x).shape == (1, 4)
