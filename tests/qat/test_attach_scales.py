"""Scales that are trained: how they begin, what trains them, and what PTQ stores."""

import functools

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qwix_train
from qwix_train import QtProvider, QuantizationRule, calib, ptq, qat, quantize_model
from tests import models

X = models.normal(32, 6, seed=0)
Y = jnp.tanh(X @ jax.random.normal(jax.random.key(1), (6, 3)))


def rule(weight="lsq", act=None, qtype="int4", **kwargs):
    acts = {"act_qtype": "int8", "act_calibration_method": act} if act else {}
    if act == "lsq+":
        acts["act_observer"] = "minmax"  # compiled sooner than the default
    fields = {"weight_qtype": qtype, "weight_calibration_method": weight}
    return QuantizationRule(**{**fields, **acts, **kwargs})


def train_step(state, x, y):
    def loss_of(params):
        return ((state.apply_fn({"params": params}, x) - y) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


def state_of(model, x=X, tx=None):
    params = jax.jit(model.init)(jax.random.key(2), x)["params"]
    tx = optax.adam(1e-2) if tx is None else tx
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def trained(state, rules, steps=20, x=X, y=Y):
    step = jax.jit(qwix_train.wrap_train_step(train_step, rules))
    for _ in range(steps):
        state, loss = step(state, x, y)
    return state, float(loss)


def apply(model, params, x):
    return jax.jit(model.apply)({"params": params}, x)


def shapes(tree):
    return {"/".join(map(str, k)): v.shape for k, v in flat(tree).items()}


def flat(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


class Net(nn.Module):
    """A convolution, a lookup in a tied table, an einsum, and layers under `scan`."""

    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Conv(5, (3, 3))(image))
        x = jnp.einsum(
            "bhwc,cd->bd", x, self.param("mix", nn.initializers.normal(), (5, 6))
        )
        table = nn.Embed(7, 6)
        x = x + table(jnp.arange(image.shape[0]) % 7)
        return table.attend(models.Layers(remat=True)(x))


IMAGE = models.normal(4, 5, 5, 2, seed=3)
EVERY_OP = {"op_names": ("dot_general", "einsum", "conv_general_dilated", "gather")}


@pytest.mark.slow
@pytest.mark.parametrize("act", ["lsq+", "lsq"])
def test_what_is_trained_is_what_is_served(act):
    rules = [rule(act=act, **EVERY_OP)]
    state = qwix_train.attach(state_of(Net(), IMAGE), rules, IMAGE)
    parts = ["scale"] if act == "lsq" else ["offset", "scale"]
    assert shapes(state.params) == {
        "mix": (5, 6),
        "mix_scale": (1, 6),
        **{f"einsum0_lhs_{part}": (1, 1) for part in parts},
        "Conv_0/bias": (5,),
        "Conv_0/kernel": (3, 3, 2, 5),
        "Conv_0/kernel_scale": (1, 1, 1, 5),
        **{f"Conv_0/conv_general_dilated0_lhs_{p}": (1, 1, 1, 1) for p in parts},
        "Embed_0/embedding": (7, 6),
        "Embed_0/embedding_scale": (7, 1),
        **{f"Embed_0/dot_general0_lhs_{part}": (1, 1) for part in parts},
        "Layers_0/layers/Dense_0/kernel": (3, 6, 6),
        "Layers_0/layers/Dense_0/kernel_scale": (3, 1, 6),
        **{f"Layers_0/layers/Dense_0/dot_general0_lhs_{p}": (3, 1, 1) for p in parts},
    }
    before = state.params
    state, _ = trained(state, rules, 3, IMAGE, jnp.ones((4, 7)))
    for path, leaf in flat(before).items():
        assert not np.array_equal(leaf, flat(state.params)[path]), path

    want = apply(quantize_model(Net(), QtProvider(rules)), state.params, IMAGE)
    model, params = ptq.quantize(Net(), state.params, rules, IMAGE)
    models.assert_close(apply(model, params, IMAGE), want)
    scale = params["Conv_0"]["kernel"].array.scale
    np.testing.assert_array_equal(scale, abs(state.params["Conv_0"]["kernel_scale"]))
    forward, params = ptq.quantize(
        state.apply_fn, {"params": state.params}, rules, IMAGE
    )
    models.assert_close(jax.jit(forward)(params, IMAGE), want)


@pytest.mark.slow
def test_pact():
    rules = [QuantizationRule(module_path="Dense_0"), rule(act="pact", qtype="int8")]
    model = models.Mlp()
    state = qwix_train.attach(state_of(model), rules, X)
    leaves = state.params["Dense_1"]
    assert leaves["dot_general0_lhs_alpha"].shape == (1, 1)
    hidden = nn.relu(nn.Dense(16).apply({"params": state.params["Dense_0"]}, X))
    np.testing.assert_allclose(
        leaves["dot_general0_lhs_alpha"].item(), hidden.max(), 1e-5
    )
    state, _ = trained(state, rules)
    alpha = state.params["Dense_1"]["dot_general0_lhs_alpha"]
    assert alpha != leaves["dot_general0_lhs_alpha"]

    served, params = ptq.quantize(model, state.params, rules, X)
    models.assert_close(apply(served, params, X), quantized(rules, state.params))
    assert params["Dense_1"]["dot_general0_lhs_zero_point"] == -128
    np.testing.assert_allclose(
        params["Dense_1"]["dot_general0_lhs_scale"].array, alpha / 255, 1e-6
    )
    with pytest.raises(ValueError, match="Dense_0/dot_general0_lhs.*not what a ReLU"):
        qwix_train.attach(state.params, [rule(act="pact")], X, model=model)


def test_a_step_of_the_optimizer_is_that_of_the_papers():
    # One dense layer without bias, its loss and gradients by hand, in float64.
    model, rules = nn.Dense(3, use_bias=False), [rule(act="lsq")]
    state = qwix_train.attach(state_of(model, tx=optax.sgd(0.1)), rules, X)
    after, _ = trained(state, rules, 1)
    x, y, w, ws, xs = (
        np.asarray(a, np.float64)
        for a in (
            X,
            Y,
            *(
                state.params[k]
                for k in ("kernel", "kernel_scale", "dot_general0_lhs_scale")
            ),
        )
    )

    def lsq(v, low, high):
        outside = np.where(v <= low, low, high)
        inside = (v > low) & (v < high)
        codes = np.clip(np.round(v), low, high)
        return codes, inside, np.where(inside, codes - v, outside)

    x_codes, x_inside, by_xs = lsq(x / xs, -128, 127)
    w_codes, w_inside, by_ws = lsq(w / ws, -8, 7)
    error = (x_codes * xs) @ (w_codes * ws) - y
    output = 2 * error / error.size
    by_x, by_w = output @ (w_codes * ws).T, (x_codes * xs).T @ output
    steps = {
        "kernel": by_w * w_inside,
        "kernel_scale": (by_w * by_ws).sum(0, keepdims=True) / np.sqrt(6 * 7),
        "dot_general0_lhs_scale": (by_x * by_xs).sum(keepdims=True) / np.sqrt(6 * 127),
    }
    for name, gradient in steps.items():
        got = (state.params[name] - after.params[name]) / 0.1
        np.testing.assert_allclose(got, gradient, 2e-3, 2e-5, err_msg=name)


@pytest.mark.slow
def test_training_the_scales_beats_leaving_them_as_they_begin():
    rules = [rule(act="lsq", qtype="int2")]

    def loss(frozen):
        def labels(params):
            mask = qat.learned_scale_mask(params)
            return jax.tree.map(lambda is_scale: "off" if is_scale else "on", mask)

        off = optax.set_to_zero() if frozen else optax.adam(1e-2)
        tx = optax.multi_transform({"on": optax.adam(1e-2), "off": off}, labels)
        state = qwix_train.attach(state_of(models.Mlp(), tx=tx), rules, X)
        state, _ = trained(state, rules, 150)
        return float(((quantized(rules, state.params) - Y) ** 2).mean())

    assert loss(frozen=False) < 0.8 * loss(frozen=True)


def quantized(rules, params, x=X):
    return apply(quantize_model(models.Mlp(), QtProvider(rules)), params, x)


@pytest.mark.slow
def test_nnx_models_hold_them():
    rules = [rule(act="lsq+")]

    def step(model, optimizer, x, y):
        def loss_of(model):
            return ((model(x) - y) ** 2).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    x = X[:, :4]
    model = models.NnxMlp(nnx.Rngs(0), rate=0.0)
    assert qwix_train.attach(model, rules, x) is model
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before = model.l2.dot_general0_lhs_offset.get_value()
    nnx.jit(qwix_train.wrap_train_step(step, rules))(model, optimizer, x, Y)
    assert model.l2.dot_general0_lhs_offset.get_value() != before
    assert isinstance(model.l1.kernel_scale, nnx.Param)

    model.eval()
    want = run(quantize_model(model, QtProvider(rules)), x)
    served, params = ptq.quantize(model, None, rules, x)
    models.assert_close(run(served, x), want)
    assert sorted(params["l2"]) == [
        "bias",
        "dot_general0_lhs_scale",
        "dot_general0_lhs_zero_point",
        "kernel",
    ]


@nnx.jit
def run(model, x):
    return model(x)


@pytest.mark.slow
def test_every_way_to_an_nnx_model_that_serves():
    rules, x = [rule(act="lsq+")], X[:, :4]
    model = quantize_model(models.NnxMlp(nnx.Rngs(0)), QtProvider(rules), x)
    model.l1.kernel_scale.set_value(1.3 * model.l1.kernel_scale.get_value())
    model.eval()
    want = run(model, x)
    served = quantize_model(model, qwix_train.PtqProvider(rules), x)
    models.assert_close(run(served, x), want)
    floats = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    plain = models.NnxMlp(nnx.Rngs(1))
    plain.eval()
    served, _ = ptq.quantize(plain, floats, rules, x)
    models.assert_close(run(served, x), want)


@pytest.mark.slow
def test_init_makes_them_and_statistics_beside():
    rules = [
        rule("lsq+", "lsq+", module_path="Dense_0"),
        rule("lsq", module_path="Dense_1", act_qtype="int8", act_static_scale=True),
    ]
    model = quantize_model(models.Mlp(), QtProvider(rules))
    variables = jax.jit(model.init)(jax.random.key(2), X)
    params = state_of(models.Mlp()).params
    given = {"params": params}
    attached = qwix_train.attach(given, rules, X, model=models.Mlp())
    models.assert_close(variables, attached)
    assert list(variables["quant_stats"]) == ["Dense_1"]
    want = attached["params"]
    out, updates = jax.jit(functools.partial(model.apply, mutable=["quant_stats"]))(
        variables, X
    )
    exported, served = ptq.quantize(
        models.Mlp(), want, rules, X, quant_stats=updates["quant_stats"]
    )
    models.assert_close(apply(exported, served, X), out)

    state = qwix_train.attach(state_of(models.Mlp()), rules, X)
    assert list(state.quant_stats) == ["Dense_1"]
    state, _ = trained(state, rules, 2)
    assert state.quant_stats["Dense_1"]["dot_general0_lhs"]["count"] == 2


@pytest.mark.slow
def test_ranges_of_several_batches():
    rules = [rule(act="lsq", act_observer="absmax", act_averaging="minmax")]
    params = state_of(models.Mlp()).params
    calibrator = calib.Calibrator(rules)
    eval_step = calibrator.wrap(lambda p, x: models.Mlp().apply({"params": p}, x))
    for scale in (1, 3):
        eval_step(params, scale * X)
    ranges = calibrator.quant_stats
    found = qwix_train.attach(params, rules, X, quant_stats=ranges, model=models.Mlp())
    got = found["Dense_0"]["dot_general0_lhs_scale"].item()
    np.testing.assert_allclose(got, 3 * abs(X).max() / 127.5, 1e-6)


def test_attaching_in_the_middle_of_training_keeps_the_moments():
    state, _ = trained(state_of(models.Mlp()), [models.rule("int8")], 3)
    rules = [rule()]
    attached = qwix_train.attach(state, rules, X)
    before, after = state.opt_state[0], attached.opt_state[0]
    assert after.count == 3
    models.assert_same(after.mu["Dense_0"]["kernel"], before.mu["Dense_0"]["kernel"])
    assert not after.mu["Dense_0"]["kernel_scale"].any()
    assert attached.step == 3
    again = qwix_train.attach(attached, rules, X)
    models.assert_same(again.params, attached.params)

    flattened = state_of(models.Mlp(), tx=optax.flatten(optax.adam(1e-2)))
    with pytest.raises(ValueError, match=r"opt_state\[0\]\.mu has shape"):
        qwix_train.attach(flattened, rules, X)


@pytest.mark.slow
def test_checkpoints_hold_them(tmp_path):
    rules = [rule(act="lsq")]
    state = qwix_train.attach(state_of(models.Mlp()), rules, X)
    state, _ = trained(state, rules, 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    blank = qwix_train.attach(state_of(models.Mlp()), rules, 2 * X)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", blank)
    models.assert_same(restored.params, state.params)
    a, b = trained(state, rules, 2)[0], trained(restored, rules, 2)[0]
    models.assert_same(a.params, b.params)
    assert a.opt_state[0].count == b.opt_state[0].count == 4


@pytest.mark.slow
def test_on_a_mesh():
    mesh = jax.make_mesh((8,), ("model",), (AxisType.Auto,))
    rules = [rule(act="lsq")]
    params = state_of(models.Mlp()).params
    want = qwix_train.attach(params, rules, X, model=models.Mlp())
    sharded = NamedSharding(mesh, PartitionSpec(None, "model"))
    params["Dense_0"]["kernel"] = jax.device_put(params["Dense_0"]["kernel"], sharded)
    got = qwix_train.attach(params, rules, X, model=models.Mlp())
    models.assert_close(got, want)
    scale = got["Dense_0"]["kernel_scale"]
    assert scale.sharding.is_equivalent_to(sharded, 2)
    models.assert_close(quantized(rules, got), quantized(rules, want))


def test_boxed_params_have_boxed_scales():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = nn.Dense(3, kernel_init=init)
    params = freeze(model.init(jax.random.key(0), X)["params"])
    found = qwix_train.attach(params, [rule()], X, model=model)
    assert type(found) is type(params)
    assert found["kernel_scale"].names == (None, "model")
    made = quantize_model(model, QtProvider([rule()])).init(jax.random.key(0), X)
    assert made["params"]["kernel_scale"].names == (None, "model")


@pytest.mark.slow
def test_bfloat16():
    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8, dtype="bfloat16", param_dtype="bfloat16")(x))
            return nn.Dense(3, dtype="bfloat16")(x)

    rules = [rule(act="lsq+")]
    state = qwix_train.attach(state_of(Narrow()), rules, X)
    assert state.params["Dense_0"]["kernel_scale"].dtype == jnp.float32
    state, _ = trained(state, rules, 3)
    assert state.params["Dense_0"]["kernel"].dtype == jnp.bfloat16
    apply = jax.jit(quantize_model(Narrow(), QtProvider(rules)).apply)
    want = apply({"params": state.params}, X)
    model, params = ptq.quantize(Narrow(), state.params, rules, X)
    models.assert_close(model.apply({"params": params}, X), want, 1e-2)
    codes = params["Dense_0"]["kernel"].array
    assert codes.scale.dtype == jnp.bfloat16


@pytest.mark.slow
def test_vmap_and_scan_of_a_step():
    rules = [rule(act="lsq")]
    params = state_of(models.Mlp()).params
    params = qwix_train.attach(params, rules, X, model=models.Mlp())
    want = quantized(rules, params)
    each = jax.vmap(functools.partial(quantized, rules, params))(X)
    models.assert_close(each, want)
    state = qwix_train.attach(state_of(models.Mlp()), rules, X)
    step = qwix_train.wrap_train_step(train_step, rules)
    scanned, _ = jax.lax.scan(lambda s, _: step(s, X, Y), state, length=3)
    models.assert_close(scanned.params, trained(state, rules, 3)[0].params)


def test_missing_and_foreign_scales_are_named():
    rules = [rule(act="lsq")]
    state = state_of(models.Mlp())
    with pytest.raises(
        ValueError, match="'Dense_0/dot_general0_lhs_scale' is not among"
    ):
        trained(state, rules, 1)
    attached = qwix_train.attach(state, rules, X)
    with pytest.raises(
        ValueError,
        match=r"'Dense_0/kernel_scale' has shape \(1, 16\).* \(3, 16\)",
    ):
        trained(attached, [rule(tile_size=2)], 1)
    with pytest.raises(ValueError, match="There is nothing to attach"):
        qwix_train.attach(state.params, [models.rule("int8")], X, model=models.Mlp())
    with pytest.raises(TypeError, match="shapes were given"):
        shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
        qwix_train.attach(state.params, rules, shape, model=models.Mlp())
    with pytest.raises(ValueError, match="Dense_0/dot_general0_lhs.*not finite"):
        broken = X.at[0].set(jnp.nan)
        qwix_train.attach(state.params, rules, broken, model=models.Mlp())
    with pytest.raises(TypeError, match="Expected a TrainState or an NNX model"):
        qwix_train.attach(state.params, rules, X)
    with pytest.raises(TypeError, match="An NNX model holds its params"):
        qwix_train.attach({}, rules, X, model=models.NnxMlp(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="its scale has no place"):
        qwix_train.attach(jnp.ones((6, 2)), [rule()], X, model=lambda w, x: x @ w)
    with pytest.raises(ValueError, match="has a param 'w_scale', where the learned"):
        own = {"w": jnp.ones((6, 2)), "w_scale": jnp.ones((1, 2))}
        qwix_train.attach(
            own, [rule()], X, model=lambda p, x: x @ p["w"] * p["w_scale"]
        )
    with pytest.raises(ValueError, match="'Dense_0/kernel' is quantized already"):
        _, served = ptq.quantize(models.Mlp(), state.params, [models.rule("int8")], X)
        qwix_train.attach(served, [rule()], X, model=models.Mlp())
    for leaf, rules in (("scale", [rule(act="pact")]), ("offset", [rule(act="lsq+")])):
        with pytest.raises(ValueError, match=f"dot_general0_lhs_{leaf}, which is not"):
            leaves = {f"dot_general0_lhs_{leaf}": jnp.ones((1, 1))}
            qwix_train.ranges(leaves, rules)
    with pytest.raises(ValueError, match="Rule 0 trains scales"):
        lora = qwix_train.LoraRule(rank=2, alpha=2.0, module_path="Dense_1")
        qwix_train.LoraProvider([rule(), lora])
    with pytest.raises(ValueError, match="Rule 0 .*qwix_train.ranges"):
        qwix_train.OdmlQatProvider([rule(qtype="int8")])
