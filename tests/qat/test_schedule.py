"""Steps that follow a schedule, against the steps of its phases and a ramp in NumPy."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax import numpy as jnp

import qwix_train
from qwix_train import QuantizationRule, wrap_eval_step, wrap_train_step
from qwix_train.qat import QtProvider, Schedule
from tests import models, trace_count

RULES = [models.rule("int4", "int8")]
X = models.normal(16, 4, seed=0)
BATCH = {"x": X, "y": models.classes(X)}
MLP = models.Mlp()
TX = optax.adam(0.01)
START = Schedule(start_step=2, ramp_steps=2)


def new_state(model: Any = MLP, x=X, step=0, tx=TX) -> Any:
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    return state.replace(step=jnp.int32(step))


def train_step(state, batch):
    def loss_fn(params):
        return models.loss_of(
            state.apply_fn({"params": params}, batch["x"]), batch["y"]
        )

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def stepped(step, counts, state=None):
    """The state and the loss of one step each, from states that are counted."""
    state = new_state() if state is None else state
    return [step(state.replace(step=jnp.int32(count)), BATCH) for count in counts]


@pytest.mark.optimized
def test_before_the_start_it_is_the_float_step_and_after_the_ramp_the_wrapped_one():
    counted, traces = trace_count.counted(train_step)
    step = jax.jit(wrap_train_step(counted, RULES, schedule=START))
    state = new_state()
    for _ in range(6):
        state, _ = step(state, BATCH)
    assert len(traces) == 3  # once for each phase, all of them in the first call
    got = stepped(step, (0, 1, 4, 9))
    plain, wrapped = jax.jit(train_step), jax.jit(wrap_train_step(train_step, RULES))
    models.assert_same(got[:2], stepped(plain, (0, 1)))
    models.assert_same(got[2:], stepped(wrapped, (4, 9)))
    assert len(traces) == 3


def fake_quant(x, bits, axis):
    """Fake quantization in float64, and the gradient of its input: all ones."""
    scale = models.MARGIN * np.abs(x).max(axis, keepdims=True) / (2 ** (bits - 1) - 0.5)
    return np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def ramp_by_hand(params, x, amount):
    """A forward and the gradients of the mean square of its results, in float64."""
    kernel, bias = (np.asarray(params[name], np.float64) for name in ("kernel", "bias"))
    x = np.asarray(x, np.float64)
    blended = [
        a + amount * (fake_quant(a, *how) - a)
        for a, *how in ((x, 8, -1), (kernel, 4, 0))
    ]
    out = blended[0] @ blended[1] + bias
    grad = 2 * out / out.size
    return np.mean(out**2), {"kernel": blended[0].T @ grad, "bias": grad.sum(0)}


@pytest.mark.parametrize(
    "compile_step", [jax.jit, pytest.param(lambda f: f, marks=pytest.mark.slow)]
)
def test_a_ramp_against_numpy(compile_step):
    model: Any = nn.Dense(3)

    def step(params, x, count):
        del count
        return jax.value_and_grad(
            lambda params: jnp.mean(model.apply({"params": params}, x) ** 2)
        )(params)

    params = jax.jit(model.init)(jax.random.key(1), X)["params"]
    wrapped = compile_step(
        wrap_train_step(
            step,
            RULES,
            schedule=Schedule(start_step=3, ramp_steps=5),
            schedule_step=lambda params, x, count: count,
        )
    )
    for count in range(10):
        amount = np.clip((count - 3) / 5, 0, 1)
        loss, grads = wrapped(params, X, jnp.int32(count))
        want, want_grads = ramp_by_hand(params, X, amount)
        np.testing.assert_allclose(loss, want, 1e-5)
        models.assert_close(grads, want_grads)


def test_gradients_of_a_ramp_outside_of_the_range():
    rule = QuantizationRule(weight_qtype="int4", weight_calibration_method="fixed,-1,1")
    model: Any = nn.Dense(1, use_bias=False)
    step = wrap_train_step(
        jax.grad(lambda p, count: model.apply({"params": p}, jnp.ones((1, 3))).sum()),
        [rule],
        schedule=Schedule(ramp_steps=4),
        schedule_step=lambda p, count: count,
    )
    grads = step({"kernel": jnp.array([[0.3], [2.0], [-5.0]])}, jnp.int32(1))
    np.testing.assert_allclose(grads["kernel"][:, 0], [1, 0.75, 0.75])


@pytest.mark.slow
def test_types_by_step_and_activations_that_begin_later():
    schedule = Schedule(
        start_step=1,
        act_start_step=3,
        weight_qtypes={0: "int8", 2: "int6", 4: "int4"},
        act_qtypes={3: "int4", 5: "int8"},
    )
    step = jax.jit(wrap_train_step(train_step, RULES, schedule=schedule))
    got = stepped(step, range(6))
    models.assert_same(got[0], stepped(jax.jit(train_step), [0])[0])
    types = [("int8", None), ("int6", None), ("int6", "int4"), ("int4", "int4")]
    for count, pair in enumerate([*types, ("int4", "int8")], start=1):
        alone = jax.jit(wrap_train_step(train_step, [models.rule(*pair)]))
        models.assert_same(got[count], stepped(alone, [count])[0])


@pytest.mark.slow
def test_the_schedule_of_a_rule_takes_precedence():
    first = models.rule("int4", "int8", "Dense_0", schedule=Schedule(start_step=4))
    second = models.rule("int8", module_path="Dense_1")
    step = jax.jit(
        wrap_train_step(train_step, [first, second], schedule=Schedule(start_step=2))
    )
    got = stepped(step, (1, 2, 4))
    models.assert_same(got[0], stepped(jax.jit(train_step), [1])[0])
    models.assert_same(
        got[1], stepped(jax.jit(wrap_train_step(train_step, [second])), [2])[0]
    )
    both = wrap_train_step(
        train_step, [dataclasses.replace(first, schedule=None), second]
    )
    models.assert_same(got[2], stepped(jax.jit(both), [4])[0])
    evaluate = wrap_eval_step(lambda p, x: MLP.apply({"params": p}, x), [first, second])
    plain = wrap_eval_step(
        lambda p, x: MLP.apply({"params": p}, x),
        [dataclasses.replace(first, schedule=None), second],
    )
    params = new_state().params
    models.assert_same(evaluate(params, X), plain(params, X))


class Convolutional(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        for strides in (1, 2):
            x = nn.relu(nn.Conv(8, (3, 3), strides, dtype=self.dtype)(x))
        return nn.Dense(3, dtype=self.dtype)(x.reshape(x.shape[0], -1))


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize(
    "model,x",
    [
        (models.Layers(remat=True), models.normal(8, 6, seed=2)),
        (Convolutional(), models.normal(8, 6, 6, 2, seed=3)),
    ],
    ids=["scan and remat", "convolutions"],
)
def test_bit_identity_of_other_models(model, x):
    check_phases(model, {"x": x, "y": models.classes(x)})


class Bfloat16(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(dtype=jnp.bfloat16)(nn.Dense(32, dtype=jnp.bfloat16)(x))
        x = nn.gelu(nn.Dense(32, dtype=jnp.bfloat16)(x))
        return nn.Dense(3, dtype=jnp.bfloat16)(x)


@pytest.mark.optimized
@pytest.mark.slow
def test_bit_identity_in_bfloat16():
    check_phases(Bfloat16(), BATCH)


def check_phases(model, batch):
    state = new_state(model, batch["x"])
    step = jax.jit(wrap_train_step(train_step, RULES, schedule=START))
    wrapped = wrap_train_step(train_step, RULES)
    for count, alone in ((0, train_step), (4, wrapped)):
        at = state.replace(step=jnp.int32(count))
        models.assert_same(step(at, batch), jax.jit(alone)(at, batch))
    middle, _ = step(state.replace(step=jnp.int32(3)), batch)
    models.assert_differ(middle.params, step(state, batch)[0].params)


def nnx_step(model, optimizer, x, y):
    def loss_fn(model):
        return models.loss_of(model(x), y)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    ["jit", "jitted before", "eager"],
)
def test_nnx_models(how):
    counted, traces = trace_count.counted(nnx_step)

    def run(step, start, steps):
        model = models.NnxMlp(nnx.Rngs(0), 0.5)
        optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)
        optimizer.step.set_value(jnp.uint32(start))
        losses = [step(model, optimizer, X, BATCH["y"]) for _ in range(steps)]
        return losses, nnx.state(model), nnx.state(optimizer)

    def compiled(step, **kwargs):
        inner = nnx.jit(step) if how == "jitted before" else step
        step = wrap_train_step(inner, RULES, **kwargs) if kwargs else inner
        return nnx.jit(step) if how == "jit" else step

    step = compiled(counted, schedule=START)
    run(step, 0, 5)
    assert how == "eager" or len(traces) == 3
    models.assert_same(run(step, 0, 2), run(compiled(nnx_step), 0, 2))
    wrapped = compiled(nnx_step, allow_unmatched=False)
    models.assert_same(run(step, 4, 2), run(wrapped, 4, 2))


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_in_the_middle_of_a_ramp(tmp_path):
    schedule = Schedule(start_step=1, ramp_steps=4)
    step = jax.jit(wrap_train_step(train_step, RULES, schedule=schedule))
    state = new_state()
    for _ in range(3):
        state, _ = step(state, BATCH)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", new_state())
    for _ in range(4):
        (state, loss), (restored, again) = step(state, BATCH), step(restored, BATCH)
        models.assert_same((state, loss), (restored, again))


@pytest.mark.slow
def test_seeds_under_vmap_each_have_their_step():
    step = wrap_train_step(train_step, RULES, schedule=START)
    seeds = [new_state(step=count) for count in (0, 3, 7)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds)
    states, losses = jax.jit(jax.vmap(step, in_axes=(0, None)))(stacked, BATCH)
    for index, seed in enumerate(seeds):
        state, loss = jax.jit(step)(seed, BATCH)
        models.assert_close((states.step[index], losses[index]), (state.step, loss))
        models.assert_close(
            jax.tree.map(lambda leaf, i=index: leaf[i], states.params), state.params
        )


@pytest.mark.slow
def test_scans_over_steps_and_over_micro_batches():
    def accumulating(state, batches):
        def one(grads, batch):
            def loss_fn(params):
                out = state.apply_fn({"params": params}, batch["x"])
                return models.loss_of(out, batch["y"])

            return jax.tree.map(jnp.add, grads, jax.grad(loss_fn)(state.params)), None

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, _ = jax.lax.scan(one, zeros, batches)
        return state.apply_gradients(grads=grads)

    batches = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), BATCH)
    step = jax.jit(wrap_train_step(accumulating, RULES, schedule=START))
    wrapped = jax.jit(wrap_train_step(accumulating, RULES))
    for count, alone in ((1, jax.jit(accumulating)), (5, wrapped)):
        state = new_state(step=count)
        models.assert_same(step(state, batches), alone(state, batches))

    one = wrap_train_step(train_step, RULES, schedule=START)
    several = jax.tree.map(lambda x: jnp.stack([x] * 5), BATCH)
    scanned, losses = jax.jit(lambda s, b: jax.lax.scan(one, s, b))(
        new_state(), several
    )
    state, expected = new_state(), []
    for _ in range(5):
        state, loss = jax.jit(one)(state, BATCH)
        expected.append(loss)
    models.assert_close(losses, jnp.stack(expected), 1e-4)
    models.assert_close(scanned.params, state.params, 1e-4)


@pytest.mark.slow
def test_a_sharded_state_keeps_its_sharding():
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=axes)
    state = new_state(step=3)
    spec = {"Dense_0": jax.P(None, "model"), "Dense_1": jax.P("model", None)}

    def sharding(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        layer = next((n for n in names if n in spec), "")
        kernel = layer and names[-1] == "kernel"
        return jax.NamedSharding(mesh, spec[layer] if kernel else jax.P())

    shardings = jax.tree_util.tree_map_with_path(sharding, state)
    step = jax.jit(wrap_train_step(train_step, RULES, schedule=START))
    data = jax.device_put(BATCH, jax.NamedSharding(mesh, jax.P("data")))
    many, loss = step(jax.device_put(state, shardings), data)
    one, again = step(state, BATCH)
    models.assert_close((many.params, loss), (one.params, again))
    assert "model" in many.params["Dense_0"]["kernel"].sharding.spec


STATIC = [models.rule("int8", "int8", act_static_scale=True)]


@pytest.mark.slow
def test_static_ranges_are_measured_before_activations_begin():
    schedule = Schedule(start_step=1, act_start_step=2, ramp_steps=1)
    step = jax.jit(wrap_train_step(train_step, STATIC, schedule=schedule))
    state = qwix_train.attach(new_state(), STATIC, X)
    for _ in range(5):
        before = state
        state, _ = step(state, BATCH)
        stats = state.quant_stats["Dense_0"]["dot_general0_lhs"]
        assert stats["count"] == max(0, before.step)
    wrapped = jax.jit(wrap_train_step(train_step, STATIC))
    models.assert_same(step(state, BATCH), wrapped(state, BATCH))


def test_a_constant_that_a_step_returns_is_an_array_in_every_phase():
    def step(state, batch):
        state, loss = train_step(state, batch)
        return state, (loss, jnp.array(1))  # as the metrics of clu have it

    state = qwix_train.attach(new_state(), STATIC, X)
    wrapped = wrap_train_step(step, STATIC, schedule=Schedule(start_step=2))
    after, (_, count) = jax.eval_shape(wrapped, state, BATCH)
    assert (count.shape, count.dtype) == ((), jnp.int32)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.slow
def test_static_ranges_of_nnx_models_with_a_schedule():
    model: Any = models.NnxMlp(nnx.Rngs(0), 0.0)
    qwix_train.attach(model, STATIC, X)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    schedule = dataclasses.replace(START, quant_stats_freeze_step=5)
    step = nnx.jit(wrap_train_step(nnx_step, STATIC, schedule=schedule))
    counts = []
    for _ in range(7):
        step(model, optimizer, X, BATCH["y"])
        counts.append(int(model.l1.dot_general0_lhs.get_value()["count"]))
    assert counts == [0, 0, 1, 2, 3, 3, 3]


@pytest.mark.slow
def test_a_provider_takes_a_start_alone():
    rules = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
    provider = qwix_train.OdmlQatProvider(rules)
    state = qwix_train.attach(new_state(), provider, X)
    step = jax.jit(
        wrap_train_step(train_step, provider, schedule=Schedule(start_step=2))
    )
    plain = jax.jit(train_step)
    models.assert_same(step(state, BATCH), plain(state, BATCH))
    state = state.replace(step=jnp.int32(2))
    wrapped = jax.jit(wrap_train_step(train_step, provider))
    models.assert_same(step(state, BATCH), wrapped(state, BATCH))
    with pytest.raises(TypeError, match="OdmlQatProvider follows no schedule but"):
        wrap_train_step(train_step, provider, schedule=START)
    by_provider, by_rules = (
        str(
            jax.make_jaxpr(wrap_train_step(train_step, x, schedule=START))(state, BATCH)
        )
        for x in (QtProvider(RULES), RULES)
    )
    assert by_provider == by_rules


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"start_step": -1}, "start_step=-1.*must not be negative"),
        ({"ramp_steps": -1}, "ramp_steps=-1.*must not be negative"),
        (
            {"quant_stats_freeze_step": -1},
            "freeze_step=-1.*must not be negative",
        ),
        ({"weight_qtypes": {}}, "must map steps to types"),
        ({"weight_qtypes": {0: "int8", 5: "int9"}}, "Unknown quantized type 'int9'"),
        ({"weight_qtypes": {5: "int8", 0: "int4"}}, "in increasing order"),
        ({"act_qtypes": {5: "int8"}}, "no type before step 5"),
        ({"start_step": 2**31 - 1, "ramp_steps": 1}, "step 2147483648 is never"),
        ({"quant_stats_warmup": 2**31}, "never reached, as steps are counted in int32"),
    ],
)
def test_wrong_schedules(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


@pytest.mark.parametrize(
    "field",
    ["quant_stats_warmup", "quant_stats_freeze_step", "batch_stats_freeze_step"],
)
def test_what_is_for_the_whole_step_is_refused_by_rules(field):
    make: Any = Schedule
    schedule = make(start_step=1, **{field: 3})
    with pytest.raises(ValueError, match=f"(?s)schedule=.*{field}.*for a whole step"):
        models.rule("int8", schedule=schedule)
    with pytest.raises(TypeError, match=f"{field}='5'.*must be an int"):
        make(**{field: "5"})
    # Beside rules that all have a schedule of their own.
    own = [models.rule("int8", schedule=START)]
    wrap_train_step(train_step, own, schedule=make(**{field: 3}))


def test_a_count_in_a_byte():
    schedule = Schedule(start_step=300)  # 44 in a byte
    step = wrap_train_step(train_step, RULES, schedule=schedule)
    state = new_state().replace(step=jnp.uint8(50))
    models.assert_close(
        jax.jit(step)(state, BATCH), jax.jit(train_step)(state, BATCH), 1e-6
    )


def test_the_end_of_a_schedule_is_that_of_all_that_changes():
    assert Schedule(start_step=2, ramp_steps=3, quant_stats_warmup=9).ends_at == 5
    assert Schedule(start_step=2, quant_stats_freeze_step=7).ends_at == 7
    assert Schedule(start_step=2, batch_stats_freeze_step=1).ends_at == 2


@pytest.mark.parametrize("name", ["weight", "act"])
def test_a_learned_scale_is_of_one_type(name):
    rule = {"weight_qtype": "int4", "act_qtype": "int4"}
    rule[f"{name}_calibration_method"] = "lsq"
    types = {f"{name}_qtypes": {0: "int8", 3: "int4"}}
    with pytest.raises(ValueError, match=f"one scale, which .* of the {name}_qtypes"):
        QuantizationRule(**rule, schedule=Schedule(**types))
    QuantizationRule(**rule, schedule=Schedule(start_step=3, ramp_steps=2))
    types = {f"{name}_qtypes": {0: "int4"}}
    QuantizationRule(**rule, schedule=Schedule(**types))


def test_errors():
    with pytest.raises(TypeError, match="it must be an int"):
        Schedule(start_step=1.5)  # type: ignore[arg-type]
    bits = Schedule(weight_qtypes={0: "int8", 3: "int2"})
    with pytest.raises(ValueError, match="is 'int2', and the rule has weight_qtype="):
        models.rule("int4", schedule=bits)
    with pytest.raises(ValueError, match="does not fit rule 0"):
        wrap_train_step(train_step, RULES, schedule=bits)
    with pytest.raises(ValueError, match="no rule takes it"):
        wrap_train_step(train_step, models.NOTHING[:0], schedule=START)
    acts = Schedule(act_qtypes={0: "int8"})
    with pytest.raises(ValueError, match="no rule that takes it sets an act_qtype"):
        wrap_train_step(train_step, models.INT2, schedule=acts)
    with pytest.raises(ValueError, match="schedules are for wrap_train_step"):
        qwix_train.LoraRule(rank=1, alpha=1.0, weight_qtype="int8", schedule=START)
    with pytest.raises(TypeError, match="Expected a qat.Schedule, got schedule=100"):
        wrap_train_step(train_step, RULES, schedule=100)  # type: ignore[arg-type]
    unfit = Schedule(weight_qtypes={0: "nf4", 3: "int4"})
    with pytest.raises(ValueError, match="(?s)schedule=.*nf4 has no zero points"):
        QuantizationRule(
            weight_qtype="int4", weight_calibration_method="minmax", schedule=unfit
        )
    with pytest.raises(TypeError, match="schedule_step=3 is no function"):
        wrap_train_step(train_step, RULES, schedule_step=3)  # type: ignore[arg-type]
    for wrong, message in (
        (lambda s, b: s.step / 2, "float32 of shape"),
        (lambda s, b: jnp.arange(3), "int32 of shape"),
        (lambda s, b: None, "returned None"),
    ):
        counting = wrap_train_step(
            train_step, RULES, schedule=START, schedule_step=wrong
        )
        with pytest.raises(TypeError, match=message):
            counting(new_state(), BATCH)
    step = wrap_train_step(lambda p, x: MLP.apply(p, x), RULES, schedule=START)
    with pytest.raises(ValueError, match="no argument is a train state.*schedule_step"):
        step({"params": new_state().params}, X)
    two = wrap_train_step(lambda a, b, x: train_step(a, x), RULES, schedule=START)
    with pytest.raises(ValueError, match="2 arguments of the step are"):
        two(new_state(), new_state(), BATCH)
    # Rules that match nothing are found out in the first step, in float or not.
    unmatched = wrap_train_step(train_step, models.NOTHING, schedule=START)
    for compiled in (unmatched, jax.jit(unmatched)):
        with pytest.raises(ValueError, match="No rule quantizes an op"):
            compiled(new_state(), BATCH)


def test_a_step_that_returns_something_else_in_float():
    shapes = iter([(2,), (3,), (3,)])

    def other(state, batch):
        train_step(state, batch)
        return jnp.zeros(next(shapes))

    with pytest.raises(ValueError, match="phase of its schedule that begins at step 0"):
        jax.jit(wrap_train_step(other, RULES, schedule=START))(new_state(), BATCH)


@pytest.mark.slow
def test_eager_steps_and_steps_jitted_before():
    eager = wrap_train_step(train_step, RULES, schedule=START)
    models.assert_same(eager(new_state(), BATCH), train_step(new_state(), BATCH))
    jitted, traces = trace_count.counted(train_step)
    before = wrap_train_step(jax.jit(jitted), RULES, schedule=START)
    one = jax.jit(eager)
    for count in (0, 2, 3, 4):
        state = new_state(step=count)
        models.assert_same(before(state, BATCH), one(state, BATCH))
    assert len(traces) == 3
    partial = functools.partial(train_step, batch=BATCH)
    models.assert_same(
        jax.jit(wrap_train_step(partial, RULES, schedule=START))(new_state(step=4)),
        one(new_state(step=4), BATCH),
    )
