"""Train steps with Linen models and with plain functions, quantized unchanged."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training import dynamic_scale, train_state
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qwix_train import wrap_eval_step, wrap_train_step
from tests import models

X = models.normal(16, 4, seed=0)
BATCH = {"x": X, "y": models.classes(X)}
IMAGES = models.normal(16, 5, 5, seed=3)
IMAGE_BATCH = {"x": IMAGES, "y": models.classes(IMAGES)}
MLP = models.Mlp()
PARAMS = models.params_of(MLP, X, seed=1)


TX = optax.sgd(0.1)


def state_of(apply_fn=MLP.apply):
    return train_state.TrainState.create(apply_fn=apply_fn, params=PARAMS, tx=TX)


def step(state, batch):
    def loss(params):
        logits = state.apply_fn({"params": params}, batch["x"])
        return models.loss_of(logits, batch["y"])

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


@functools.partial(jax.jit, static_argnames=("weight_bits", "act_bits"))
def by_hand(params, batch, **bits):
    def loss(params):
        return models.loss_of(models.mlp(params, batch["x"], **bits), batch["y"])

    return jax.value_and_grad(loss)(params)


def expected(batch=BATCH, **bits):
    value, grads = by_hand(PARAMS, batch, **bits)
    return state_of().apply_gradients(grads=grads).params, value


def check(new_state, value, batch=BATCH, **bits):
    params, loss = expected(batch, **bits)
    models.assert_close((new_state.params, value), (params, loss))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("compile_step", [jax.jit, lambda f: f])
@pytest.mark.parametrize("rules,bits", [(models.INT8, 8), (models.INT4, 4)])
def test_a_train_state_step_trains_on_fake_quantized_values(compile_step, rules, bits):
    quantized = compile_step(wrap_train_step(step, rules))
    state = state_of()
    new_state, value = quantized(state, BATCH)
    check(new_state, value, weight_bits=bits)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert new_state.apply_fn == state.apply_fn
    assert type(new_state.apply_fn) is type(state.apply_fn)


APPLY_FNS = {
    "lambda": lambda v, x: MLP.apply(v, x),
    "partial": functools.partial(MLP.apply, mutable=False),
    "jitted": jax.jit(MLP.apply),
    "closure of a bound module": lambda v, x: MLP.bind(v)(x),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", APPLY_FNS)
def test_apply_fn_may_be_any_function_around_the_model(name):
    apply_fn = APPLY_FNS[name]
    float_state, float_value = jax.jit(step)(state_of(apply_fn), BATCH)
    rules = [models.rule("int8", "int8", "Dense_[01]")]
    new_state, value = jax.jit(wrap_train_step(step, rules))(state_of(apply_fn), BATCH)
    check(new_state, value)
    assert new_state.apply_fn is apply_fn
    again, float_again = jax.jit(step)(state_of(apply_fn), BATCH)
    models.assert_same((again.params, float_again), (float_state.params, float_value))


@pytest.mark.slow
def test_module_paths_are_known_in_an_apply_fn_that_was_jitted_before():
    apply_fn = jax.jit(lambda v, x: MLP.apply(v, x))
    apply_fn({"params": PARAMS}, X)
    with pytest.raises(ValueError, match="'Dense_0'"):
        wrap_train_step(step, models.NOTHING)(state_of(apply_fn), BATCH)


@pytest.mark.slow
def test_apply_fn_may_be_no_flax_function():
    def apply_fn(variables, x):
        p = variables["params"]
        x = nn.relu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
        return x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]

    check(*jax.jit(wrap_train_step(step, models.INT8))(state_of(apply_fn), BATCH))
    check(*wrap_train_step(step, models.INT8)(state_of(apply_fn), BATCH))


def image_state(model=None, **kwargs):
    model = model or models.Everything(**kwargs)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = models.Everything().init(keys, IMAGES)
    return models.BatchState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.adam(0.01),
    )


def image_step(state, batch, axis_name=None):
    def loss(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["x"],
            mutable=["batch_stats", "intermediates"],
            rngs={"dropout": jax.random.fold_in(jax.random.key(7), state.step)},
        )
        return models.loss_of(logits, batch["y"]), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    if axis_name:
        grads = jax.lax.pmean(grads, axis_name)
    new = state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])
    return new, (value, updates["intermediates"])


@pytest.mark.optimized
@pytest.mark.thinned(4)
@pytest.mark.parametrize("compile_step", [jax.jit, lambda f: f])
def test_what_no_rule_matches_is_bit_identical(compile_step):
    plain = compile_step(image_step)
    wrapped = compile_step(
        wrap_train_step(image_step, models.NOTHING, allow_unmatched=True)
    )
    state = image_state()
    models.assert_same(wrapped(state, IMAGE_BATCH), plain(state, IMAGE_BATCH))


@pytest.mark.slow
def test_what_runs_before_the_first_quantized_op_is_as_in_float():
    rules = [models.QuantizationRule(module_path="Dense_1", weight_qtype="int8")]
    wrapped = jax.jit(wrap_train_step(image_step, rules))
    _, (_, sown) = wrapped(image_state(), IMAGE_BATCH)
    _, (_, plain) = jax.jit(image_step)(image_state(), IMAGE_BATCH)
    models.assert_close(sown, plain, 1e-6)


def test_batch_norm_and_dropout_train():
    quantized = jax.jit(wrap_train_step(image_step, models.INT4))
    plain = jax.jit(image_step)
    state = float_state = image_state()
    losses, float_losses = [], []
    for _ in range(40):
        state, (value, sown) = quantized(state, IMAGE_BATCH)
        float_state, (float_value, float_sown) = plain(float_state, IMAGE_BATCH)
        losses.append(float(value))
        float_losses.append(float(float_value))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert abs(np.mean(losses[-5:]) - np.mean(float_losses[-5:])) < 0.3
    models.assert_differ(state.params, float_state.params)
    # The same elements are dropped.
    mask, float_mask = (s["features"][0] == 0 for s in (sown, float_sown))
    assert np.mean(mask != float_mask) == 0


def test_several_calls_and_a_scan_over_micro_batches():
    def accumulating(state, batches):
        def one(grads, batch):
            def loss(params):
                first = state.apply_fn({"params": params}, batch["x"])
                second = state.apply_fn({"params": params}, batch["x"])
                return models.loss_of((first + second) / 2, batch["y"])

            value, new = jax.value_and_grad(loss)(state.params)
            return jax.tree.map(jnp.add, grads, new), value

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, values = jax.lax.scan(one, zeros, batches)
        return state.apply_gradients(grads=grads), values

    batches = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), BATCH)
    state, values = jax.jit(wrap_train_step(accumulating, models.INT8))(
        state_of(), batches
    )
    parts = [
        by_hand(PARAMS, jax.tree.map(lambda x, i=i: x[i], batches)) for i in range(2)
    ]
    models.assert_close(values, jnp.stack([p[0] for p in parts]))
    grads = jax.tree.map(jnp.add, parts[0][1], parts[1][1])
    models.assert_close(
        state.params, state_of().apply_gradients(grads=grads).params, 1e-4
    )


@pytest.mark.parametrize(
    "apply_fn",
    [
        lambda v, x: MLP.apply(v, x),
        pytest.param(MLP.apply, id="method", marks=pytest.mark.slow),
    ],
)
def test_a_state_carried_by_a_scan(apply_fn):
    def epoch(state, batches):
        return jax.lax.scan(step, state, batches)

    batches = jax.tree.map(lambda x: jnp.stack([x, x]), BATCH)
    state, values = wrap_train_step(epoch, models.INT8)(state_of(apply_fn), batches)
    one = jax.jit(wrap_train_step(step, models.INT8))
    first, value = one(state_of(apply_fn), BATCH)
    second, _ = one(first, BATCH)
    models.assert_close(values[0], value)
    models.assert_close(state.params, second.params)
    assert state.apply_fn is apply_fn or state.apply_fn == apply_fn


class TwoHeads(nn.Module):
    def setup(self):
        self.body = nn.Dense(8)
        self.heads = [nn.Dense(3), nn.Dense(3)]

    def __call__(self, x):
        return self.first(x) + self.second(x)

    def first(this, x):
        return this.heads[0](nn.relu(this.body(x)))

    def second(self, x):
        return self.heads[1](nn.relu(self.body(x)))


SPELLINGS = {
    "apply": lambda m, p, x: m.apply({"params": p}, x),
    "built inside": lambda m, p, x: TwoHeads().apply({"params": p}, x),
    "nn.apply": lambda m, p, x: nn.apply(lambda m, x: m(x), m)({"params": p}, x),
    "bind": lambda m, p, x: m.bind({"params": p})(x),
    "bind, methods": lambda m, p, x: (
        m.bind({"params": p}).first(x) + m.bind({"params": p}).second(x)
    ),
    "method by name": lambda m, p, x: (
        m.apply({"params": p}, x, method="first")
        + m.apply({"params": p}, x, method="second")
    ),
    "method of the class": lambda m, p, x: (
        m.apply({"params": p}, x, method=TwoHeads.first)
        + m.apply({"params": p}, x, method=m.second)
    ),
    "lambda": lambda m, p, x: m.apply(
        {"params": p}, x, method=lambda m, x: m.first(x) + m.second(x)
    ),
    "submodules": lambda m, p, x: m.apply(
        {"params": p},
        x,
        method=lambda m, x: sum(head(nn.relu(m.body(x))) for head in m.heads),
    ),
    "bound submodules": lambda m, p, x: sum(
        head(nn.relu(m.bind({"params": p}).body(x)))
        for head in m.bind({"params": p}).heads
    ),
}


@pytest.mark.thinned(10)
@pytest.mark.parametrize("name", SPELLINGS)
def test_steps_that_close_over_a_module(name):
    model = TwoHeads()
    params = models.params_of(model, X)

    def loss(params, x):
        return SPELLINGS[name](model, params, x).sum()

    def hand(params, x):
        hidden = nn.relu(models.dense(params["body"], x))
        heads = [models.dense(params[f"heads_{i}"], hidden) for i in (0, 1)]
        return (heads[0] + heads[1]).sum()

    rules = [
        models.rule("int8", "int8", module_path=path) for path in ("body", "heads_[01]")
    ]
    grad = jax.jit(wrap_train_step(jax.value_and_grad(loss), rules))
    expected = jax.jit(jax.value_and_grad(hand))
    models.assert_close(grad(params, X), expected(params, X))


class Dropped(nn.Module):
    def setup(self):
        self.dense = nn.Dense(8)
        self.dropout = nn.Dropout(0.5, deterministic=False)

    def __call__(self, x):
        return self.dropout(self.dense(x))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", ["bind", "nn.apply", "lambda", "submodule"])
def test_a_module_called_twice_draws_the_random_numbers_of_float(kind):
    model = Dropped()
    keys = {"dropout": jax.random.key(5)}
    variables = model.init({"params": jax.random.key(2), **keys}, X)

    def both(m, x):
        return m(x), m(x), m.dropout(x), m(x)

    def submodules(m, x):
        return m.dropout(m.dense(x)), m(x), m.dropout(m.dense(x))

    def run(variables, x):
        match kind:
            case "bind":
                return both(model.bind(variables, rngs=keys), x)
            case "nn.apply":
                return nn.apply(both, model)(variables, x, rngs=keys)
            case "lambda":
                return model.apply(variables, x, rngs=keys, method=both)
            case _:
                return model.apply(variables, x, rngs=keys, method=submodules)

    quantized = wrap_eval_step(run, models.INT8)(variables, X)
    masks = jax.tree.map(lambda x: x == 0, run(variables, X))
    models.assert_same(jax.tree.map(lambda x: x == 0, quantized), masks)
    assert np.any(masks[0] != masks[1])
    models.assert_differ(quantized, run(variables, X))


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        count = self.variable("state", "count", lambda: jnp.zeros((), jnp.int32))
        count.value += 1
        return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))


@pytest.mark.slow
@pytest.mark.parametrize("mutable", [["state", "batch_stats"], True, nn.DenyList("x")])
def test_mutable_collections_of_a_bound_module(mutable):
    model = Counting()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    variables = {**variables, "state": {"count": jnp.int32(0)}}

    def run(variables, x):
        def twice(m, x):
            return m(m(x))

        return nn.apply(twice, model, mutable=mutable)(variables, x)

    out, updates = wrap_eval_step(run, models.INT8)(variables, X)
    _, plain = run(variables, X)
    assert jax.tree.structure(updates) == jax.tree.structure(plain)
    assert updates["state"]["count"] == 2
    models.assert_close(updates["batch_stats"], plain["batch_stats"], 0.05)
    models.assert_differ(updates["batch_stats"], plain["batch_stats"])
    if "params" in updates:
        models.assert_same(updates["params"], variables["params"])


def test_captured_intermediates_are_those_of_the_quantized_model():
    def run(params, x):
        return MLP.apply({"params": params}, x, capture_intermediates=True)

    out, captured = wrap_eval_step(run, models.INT8)(PARAMS, X)
    _, plain = run(PARAMS, X)
    assert jax.tree.structure(captured) == jax.tree.structure(plain)
    first = models.dense(PARAMS["Dense_0"], X)
    sown = captured["intermediates"]
    models.assert_close(sown["Dense_0"]["__call__"][0], first)
    models.assert_same(sown["__call__"][0], out)


def test_gradients_of_perturbations():
    state = image_state()

    def loss(perturbations):
        variables = {
            "params": state.params,
            "batch_stats": state.batch_stats,
            "perturbations": perturbations,
        }
        logits = models.Everything().apply(variables, IMAGES, train=False)
        return logits.sum()

    zero = {"before_head": jnp.zeros((16, 8))}
    plain = jax.grad(loss)(zero)
    nothing = wrap_train_step(jax.grad(loss), models.NOTHING, allow_unmatched=True)
    models.assert_same(nothing(zero), plain)
    quantized = wrap_train_step(jax.grad(loss), models.INT8)(zero)
    models.assert_differ(quantized, plain)
    got, want = (np.asarray(grads["before_head"]) for grads in (quantized, plain))
    # What a gate of `relu` decides about is near zero where it is open in one alone.
    same_gate = (got == 0) == (want == 0)
    assert same_gate.mean() > 0.98
    models.assert_close(got[same_gate], want[same_gate], 0.05)


@pytest.mark.slow
def test_any_signature():
    def wide(scale, state, *batches, flag, name="x", **others):
        assert isinstance(flag, bool) and isinstance(name, str)
        assert not others or others["extra"].shape == ()
        new, value = step(state, {"x": batches[0] * scale, "y": batches[1]})
        return {"state": new, "info": (value, name, None), "flag": flag}

    state = state_of()
    wrapped = wrap_train_step(wide, models.INT8)  # eager: anything goes in and out
    labels = BATCH["y"]
    out = wrapped(1, state, np.asarray(X), labels, flag=True, extra=np.float32(1))
    check(out["state"], out["info"][0])
    assert out["info"][1:] == ("x", None) and out["flag"] is True
    bound = functools.partial(step, state_of(lambda v, x: MLP.apply(v, x)))
    check(*jax.jit(wrap_train_step(bound, models.INT8))(batch=BATCH))


def test_static_and_donated_arguments_by_name():
    def named(state, batch, mode):
        assert mode == "train"
        return step(state, batch)

    wrapped = wrap_train_step(named, models.INT8)
    compiled = jax.jit(wrapped, static_argnames="mode", donate_argnames="state")
    state = jax.tree.map(jnp.copy, state_of())
    check(*compiled(state, BATCH, mode="train"))
    assert state.params["Dense_0"]["kernel"].is_deleted()
    assert wrapped.__name__ == "named"


def test_dynamic_scale():
    def scaled(state, scale, batch):
        def loss(params):
            logits = state.apply_fn({"params": params}, batch["x"])
            return models.loss_of(logits, batch["y"])

        scale, finite, value, grads = scale.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), scale, value

    new, _, value = jax.jit(wrap_train_step(scaled, models.INT8))(
        state_of(), dynamic_scale.DynamicScale(), BATCH
    )
    check(new, value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) for k in ("pmap", "vmap")] + ["shard_map"],
)
def test_axis_names(kind):
    parallel = functools.partial(image_step, axis_name="batch")
    state = image_state(axis_name="batch")
    batch = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), IMAGE_BATCH)
    mesh = jax.make_mesh((2,), ("batch",), (jax.sharding.AxisType.Auto,))

    def mapped(f):
        if kind == "pmap":
            devices = jax.devices()[:2]
            return jax.pmap(f, axis_name="batch", in_axes=(None, 0), devices=devices)
        if kind == "vmap":
            return jax.jit(jax.vmap(f, axis_name="batch", in_axes=(None, 0)))

        def one(state, batch):
            new, (value, _) = f(state, jax.tree.map(lambda x: x[0], batch))
            return jax.tree.map(lambda x: x[None], (new, (value, ())))

        spec = PartitionSpec("batch")
        return jax.jit(
            jax.shard_map(
                one,
                mesh=mesh,
                in_specs=(PartitionSpec(), spec),
                out_specs=spec,
                check_vma=False,
            )
        )

    plain, (float_value, _) = mapped(parallel)(state, batch)
    new, (value, _) = mapped(wrap_train_step(parallel, models.INT8))(state, batch)
    models.assert_close(value, float_value, 0.05)
    models.assert_differ(new.params, plain.params)
    # Every device has the statistics of the whole batch.
    models.assert_same(
        *(jax.tree.map(lambda x, i=i: x[i], new.batch_stats) for i in (0, 1))
    )
    nothing = wrap_train_step(parallel, models.NOTHING, allow_unmatched=True)
    same, _ = mapped(nothing)(state, batch)
    models.assert_same(same.params, plain.params)


@pytest.mark.slow
def test_sharded_params_and_batch():
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)

    def sharding(path, leaf):
        kernel = getattr(path[-1], "key", None) == "kernel" and leaf.shape[-1] % 2 == 0
        axes = (None, "model") if kernel else ()
        return NamedSharding(mesh, PartitionSpec(*axes))

    state = state_of()
    shardings = jax.tree_util.tree_map_with_path(sharding, state)
    data = NamedSharding(mesh, PartitionSpec("data"))
    one = wrap_train_step(step, models.INT8)
    compiled = jax.jit(
        one,
        in_shardings=(shardings, data),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )
    sharded = jax.device_put(state, shardings)
    new, value = compiled(sharded, jax.device_put(BATCH, data))
    check(new, value)
    assert jax.tree.all(
        jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), new, shardings
        )
    )
    assert "model" in new.params["Dense_0"]["kernel"].sharding.spec
    # Committed arrays without any `in_shardings`, too.
    new, value = jax.jit(one)(sharded, jax.device_put(BATCH, data))
    check(new, value)
    assert "model" in new.params["Dense_0"]["kernel"].sharding.spec


@pytest.mark.slow
def test_a_step_that_was_jitted_before():
    for trace_first in (False, True):
        jitted = jax.jit(step)
        plain = step(state_of(), BATCH)
        if trace_first:
            jitted(state_of(), BATCH)
        check(*wrap_train_step(jitted, models.INT8)(state_of(), BATCH))
        check(*wrap_train_step(jitted, models.INT4)(state_of(), BATCH), weight_bits=4)
        check(*wrap_train_step(jitted, models.INT8)(state_of(), BATCH))
        models.assert_close(jitted(state_of(), BATCH)[1], plain[1], 1e-6)


@jax.jit
def module_level_loss(params, x, y):
    return models.loss_of(MLP.apply({"params": params}, x), y)


def body(carry, x):
    return carry, MLP.apply({"params": carry}, x)


@pytest.mark.slow
def test_functions_that_were_traced_in_float_before():
    def inner(state, batch):
        value, grads = jax.value_and_grad(module_level_loss)(
            state.params, batch["x"], batch["y"]
        )
        _, outs = jax.lax.scan(body, state.params, batch["x"][None])
        remat = jax.checkpoint(body)(state.params, batch["x"])[1]
        return state.apply_gradients(grads=grads), (value, outs, remat)

    def eager(step):
        return step(state_of(), BATCH)

    def compiled(step):
        # A function of its own each time: no program is that of an earlier call.
        return jax.jit(lambda *args: step(*args))(state_of(), BATCH)

    float_results, want = compiled(inner), jax.jit(models.mlp)(PARAMS, X)
    for run in (eager, compiled):
        new, (value, outs, remat) = run(wrap_train_step(inner, models.INT8))
        check(new, value)
        models.assert_close(outs[0], want)
        models.assert_close(remat, want)
        again = compiled(inner)
        models.assert_same(again, float_results)


PRODUCTS = {
    "@": lambda x, w: x @ w,
    "jnp.dot": jnp.dot,
    "jnp.matmul": jnp.matmul,
    "tensordot": lambda x, w: jnp.tensordot(x, w, 1),
    "lax.dot": lambda x, w: jax.lax.dot(x, w),
    "lax.dot_general": lambda x, w: jax.lax.dot_general(x, w, (((1,), (0,)), ((), ()))),
    "einsum": lambda x, w: jnp.einsum("bi,io->bo", x, w),
    "jit": jax.jit(lambda x, w: x @ w),
    "vmap": lambda x, w: jax.vmap(lambda x: x @ w)(x),
}


class Product(nn.Module):
    spelling: str

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (4, 3))
        return PRODUCTS[self.spelling](x, w)


@jax.jit
def by_bits(x, w):
    """The product in float, and with a weight of 8 and of 4 bits."""
    rows = models.fake_quant(x, 8, -1)
    return x @ w, *(rows @ models.fake_quant(w, bits, 0) for bits in (8, 4))


@pytest.mark.thinned(12)
@pytest.mark.parametrize("spelling", PRODUCTS)
@pytest.mark.parametrize(
    "order", ["float first", pytest.param("quantized first", marks=pytest.mark.slow)]
)
def test_no_order_of_calls_leaks_through_caches(spelling, order):
    model = Product(spelling)
    w = models.normal(4, 3)
    variables = {"params": {"w": w}}
    run = jax.jit(lambda v, x: model.apply(v, x))
    # A shape of its own for each case, so that no other test has filled the caches.
    rows = 3 + 2 * list(PRODUCTS).index(spelling) + (order == "float first")
    x = models.normal(rows, 4)
    steps = {
        None: run,
        8: wrap_eval_step(run, models.INT8),
        4: wrap_eval_step(run, models.INT4),
    }
    keys = [None, 8, 4, None, 4, 8] if order == "float first" else [8, 4, None, 8]
    outs = [steps[bits](variables, x) for bits in keys]
    wants = dict(zip(steps, by_bits(x, w), strict=True))
    for bits, out in zip(keys, outs, strict=True):
        models.assert_close(out, wants[bits])


def test_no_match_is_an_error_that_shows_the_paths():
    wrapped = wrap_train_step(step, models.NOTHING)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(?s)step: .*'Dense_0'.*'Dense_1'"):
            jax.jit(wrapped)(state_of(), BATCH)
    with pytest.raises(ValueError, match="allow_unmatched"):
        wrapped(state_of(), BATCH)
    allowed = wrap_train_step(step, models.NOTHING, allow_unmatched=True)
    models.assert_same(
        jax.jit(allowed)(state_of(), BATCH), jax.jit(step)(state_of(), BATCH)
    )


def test_another_model_that_no_rule_matches_is_not_left_in_float_silently():
    rules = [models.QuantizationRule(module_path="Dense_.*", weight_qtype="int8")]
    wrapped = wrap_eval_step(lambda model, v, x: model.apply(v, x), rules)
    wrapped(MLP, {"params": PARAMS}, X)
    other = TwoHeads()
    variables = jax.jit(other.init)(jax.random.key(0), X)
    with pytest.raises(ValueError, match="'heads_0'"):
        wrapped(other, variables, X)


def test_a_second_model_may_stay_in_float():
    teacher = TwoHeads()
    variables = jax.jit(teacher.init)(jax.random.key(0), X)
    rules = [models.QuantizationRule(module_path="Dense_.*", weight_qtype="int8")]

    def distill(params, x):
        student = module_level_loss(params, x, BATCH["y"])
        return student, teacher.apply(variables, x)

    wrapped = wrap_train_step(distill, rules)
    for _ in range(2):  # the jitted student traces nothing the second time
        _, target = wrapped(PARAMS, X)
        models.assert_same(target, teacher.apply(variables, X))


def test_steps_that_cannot_be_quantized_are_refused():
    compiled = jax.jit(step).lower(state_of(), BATCH).compile()
    with pytest.raises(TypeError, match="ahead of time"):
        wrap_train_step(compiled, models.INT8)
    hidden = wrap_train_step(lambda s, b: compiled(s, b), models.INT8)
    with pytest.raises(ValueError, match="reached no call"):
        hidden(state_of(), BATCH)
    with pytest.raises(TypeError, match="step function"):
        wrap_train_step(models.INT8, [])
    with pytest.raises(TypeError, match="list of rules"):
        wrap_train_step(step, models.INT8[0])


def test_an_exception_in_the_middle_leaves_nothing_changed():
    class Broken(nn.Module):
        fail: bool = True

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4)(x)
            if self.fail:
                raise RuntimeError("on purpose")
            return x

    model = Broken()
    variables = Broken(fail=False).init(jax.random.key(0), X)

    def run(fail, variables, x):
        return Broken(fail).apply(variables, x)

    plain = run(False, variables, X)
    wrapped = wrap_eval_step(run, models.INT8)
    with pytest.raises(RuntimeError, match="on purpose"):
        wrapped(True, variables, X)
    with pytest.raises(RuntimeError, match="on purpose"):
        model.apply(variables, X)
    models.assert_same(run(False, variables, X), plain)
    models.assert_differ(wrapped(False, variables, X), plain)


@pytest.mark.slow
def test_numpy_arrays_and_python_numbers_as_arguments():
    state = state_of().replace(params=jax.tree.map(np.asarray, PARAMS))
    batch = jax.tree.map(np.asarray, BATCH)
    check(*wrap_train_step(step, models.INT8)(state, batch))

    def scaled(params, x, scale):
        return MLP.apply({"params": params}, x * scale)

    out = wrap_eval_step(scaled, models.INT8)(PARAMS, np.asarray(X), 2)
    models.assert_close(out, models.mlp(PARAMS, 2 * X))
