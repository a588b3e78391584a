"""What a plan of a whole step says: each model call, and what happens in it."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax import numpy as jnp

import qwix_train
from qwix_train import (
    QuantizationRule,
    Schedule,
    attach,
    in_float,
    plan,
    wrap_eval_step,
    wrap_train_step,
)

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
INT8 = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(5)(x)))


MODEL = Model()


def new_state():
    params = jax.tree.map(
        lambda x: jnp.ones(x.shape), jax.eval_shape(MODEL.init, jax.random.key(0), X)
    )
    return train_state.TrainState.create(
        apply_fn=MODEL.apply, params=params["params"], tx=optax.sgd(0.1)
    )


def train_step(state, x):
    def loss(params):
        return jnp.mean(state.apply_fn({"params": params}, x) ** 2)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def distill_step(state, teacher, x):
    def loss(params):
        student = state.apply_fn({"params": params}, x)
        with_teacher = in_float(MODEL).apply({"params": teacher}, x)
        return jnp.mean((student - with_teacher) ** 2)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@pytest.mark.parametrize("jitted", ["no", "outside", "inside", "called before"])
def test_the_plan_of_a_step_is_that_of_its_model_call(jitted):
    inner = jax.jit(train_step) if jitted == "inside" else train_step
    step = wrap_train_step(inner, INT8)
    if jitted in ("outside", "called before"):
        step = jax.jit(step)
    state = new_state()
    if jitted == "called before":
        step(state, X)
    found = plan(step, state, X)
    (call,) = found.calls
    assert str(call.plan) == str(plan(MODEL, INT8, X))
    assert str(found).startswith("call 1 of 1:\n\nmodule")
    assert [r["op"] for r in found.records()] == ["dot_general0", "dot_general0"]
    assert [r["call"] for r in found.records()] == [0, 0]


def test_shapes_will_do_and_nothing_is_computed():
    shapes = jax.eval_shape(new_state)
    found = plan(wrap_train_step(train_step, INT8), shapes, X)
    assert len(found.calls) == 1


def test_each_call_of_a_step_is_listed_and_what_is_in_float_is_not():
    found = plan(
        wrap_train_step(distill_step, INT8), new_state(), new_state().params, X
    )
    quantized = [call for call in found.calls if call.plan.quantized_ops]
    assert len(quantized) == 1

    def twice(state, x):
        return state.apply_fn({"params": state.params}, x) + state.apply_fn(
            {"params": state.params}, 2 * x
        )

    found = plan(wrap_eval_step(twice, INT8), new_state(), X)
    assert len(found.calls) == 2 and "call 2 of 2:" in str(found)


def test_the_calls_of_a_schedule_say_when():
    schedule = Schedule(start_step=3, weight_qtypes={3: "int8", 7: "int4"})
    rules = [QuantizationRule(weight_qtype="int4")]
    step = jax.jit(wrap_train_step(train_step, rules, schedule=schedule))
    found = plan(step, new_state(), X)
    # In float for the first steps, in which no call is quantized.
    assert [call.when for call in found.calls] == ["from step 3", "from step 7"]
    types = [call.plan.records()[0]["weight_qtype"] for call in found.calls]
    assert types == ["int8", "int4"]


def test_a_step_that_keeps_ranges_and_one_of_nnx():
    rules = [
        QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
    ]
    state = attach(new_state(), rules, X)
    found = plan(wrap_train_step(train_step, rules), state, X)
    assert all(op.static for op in found.calls[0].plan.ops)

    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    found = plan(wrap_eval_step(lambda model, x: model(x), INT8), model, X)
    assert found.calls[0].plan.ops[0].weights == (("kernel",),)


def test_a_rule_that_matches_nothing_shows_in_the_table():
    rules = [QuantizationRule(module_path="nowhere", weight_qtype="int8")]
    found = plan(wrap_train_step(train_step, rules), new_state(), X)
    assert "no rule matches" in str(found)


def test_a_step_may_name_its_arguments_as_those_of_a_model_are_named():
    given = {}

    def step(state, x, *, variables=None, method="mean", rngs=None):
        given.update(variables=variables, method=method, rngs=rngs)
        return state.apply_fn({"params": state.params}, x)

    step = wrap_eval_step(step, INT8)
    plan(step, new_state(), X)
    assert given == {"variables": None, "method": "mean", "rngs": None}
    plan(step, new_state(), X, variables=[], method="sum", rngs=())
    assert given == {"variables": [], "method": "sum", "rngs": ()}


def test_a_model_may_be_an_object_without_a_hash():
    class Product:
        __hash__ = None  # as that of a dataclass

        def __call__(self, params, x):
            return x @ params["w"]

    found = plan(Product(), INT8, {"w": np.ones((4, 2), np.float32)}, X)
    assert found.ops[0].weights == (("w",),)


def test_a_model_needs_rules():
    with pytest.raises(
        TypeError, match=r"plan\(model, rules, \*inputs\) takes the rules"
    ):
        plan(MODEL)
    assert qwix_train.StepPlan(()).records() == []


@pytest.mark.parametrize("wrong", [new_state, lambda: {"params": {}}, lambda: None])
def test_a_step_that_is_not_wrapped_says_so(wrong):
    with pytest.raises(TypeError, match=r"got .*plan\(wrap_train_step\(step, rules\)"):
        plan(train_step, wrong(), X)


def test_the_calls_of_each_phase_are_counted_by_themselves():
    schedule = Schedule(start_step=3, ramp_steps=4)
    step = wrap_train_step(train_step, INT8, schedule=schedule)
    text = str(plan(step, new_state(), X))
    assert text.startswith("from step 3 (blended in), call 1 of 1:\n")
    assert "\nfrom step 7, call 1 of 1:\n" in text


def decorated(step):
    def called(*args):
        return step(*args)

    return called


@pytest.mark.thinned(8)
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("form", ["partial", "jitted partial", "decorated", "both"])
def test_what_is_around_a_wrapped_step_is_seen_through(form, ran):
    step, state = wrap_train_step(train_step, INT8), new_state()
    if form in ("decorated", "both"):
        step = jax.jit(decorated(jax.jit(step)))
    args: tuple = (state, X)
    if form != "decorated":
        step, args = functools.partial(step, state), (X,)
    if form == "jitted partial":
        step = jax.jit(step)
    if ran:  # so that JAX has its trace
        step(*args)
    (call,) = plan(step, *args).calls
    assert [op.weights for op in call.plan.ops] == [
        op.weights for op in plan(MODEL, INT8, X).ops
    ]


def test_a_function_that_calls_no_wrapped_step_is_no_step():
    with pytest.raises(TypeError, match="A step has its rules from the wrap"):
        plan(decorated(train_step), new_state(), X)


def test_a_plan_refuses_what_a_mode_would_refuse():
    rules = [
        QuantizationRule(weight_qtype="int8", act_qtype="int8", act_observer="mse")
    ]
    with pytest.raises(ValueError, match="act_observer"):
        plan(MODEL, rules, X)


def test_a_rule_for_all_else_is_not_blamed():
    one = [
        QuantizationRule(module_path=f"Dense_{i}", weight_qtype="int4") for i in (0, 1)
    ]
    assert "has no effect" not in str(plan(MODEL, [*one, *INT8], X))
    assert "rule 1 (module_path='Dense_0')" in str(plan(MODEL, [*INT8, one[0]], X))
