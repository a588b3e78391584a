"""What a plan for LiteRT says of params, to all that takes a plan."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training import train_state
from jax import numpy as jnp

import qwix_train
from qwix_train import QuantizationRule, hooks, odml, optim
from qwix_train.planning.plan import Plan
from tests import models
from tests.odml.small import INT8, module

X = models.normal(3, 6, seed=0)
WEIGHTS = QuantizationRule(weight_qtype="int8")


def plan_of(model, *inputs, rules=INT8, **options):
    provider = odml.OdmlQatProvider(rules, **options)
    return qwix_train.plan(model, provider, *inputs)


def on_litert_grid(w, top=127, axis=0):
    """The scale and the values of a symmetric weight without the lowest code."""
    w = np.asarray(w, np.float64)
    scale = np.abs(w).max(axis, keepdims=True) / top
    return scale, np.round(w / scale) * scale


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(nn.relu(nn.Dense(5, name="first")(x)))


def test_it_is_a_plan_with_ops_params_and_sizes():
    plan = plan_of(Two(), X)
    assert isinstance(plan, Plan) and plan.unused_rules == ()
    assert {op.op.where: op.weights for op in plan.ops if op.weights} == {
        "first/dot_general0": (("first", "kernel"),),
        "last/dot_general0": (("last", "kernel"),),
    }
    kernel = plan.params["first", "kernel"]
    assert kernel.how.qtype == "int8_narrow" and kernel.how.channelwise_axes == (1,)
    assert kernel.op.op.where == "first/dot_general0"
    assert plan.params["first", "bias"].how is None
    assert plan.float_bytes == 4 * (6 * 5 + 5 + 5 * 3 + 3)
    assert plan.quantized_bytes == 6 * 5 + 5 * 3 + 4 * (5 + 5 + 3 + 3)
    assert "5 of 5 ops quantized" in str(plan)


@pytest.mark.slow
def test_the_report_measures_weights_as_litert_has_them():
    class Writer:
        def write_scalars(self, step, scalars):
            self.scalars = scalars

    w = models.normal(6, 5, seed=1)
    params = {
        "first": {"kernel": w, "bias": jnp.zeros(5)},
        "last": {"kernel": models.normal(5, 3, seed=2), "bias": jnp.zeros(3)},
    }
    provider = odml.OdmlQatProvider(
        [QuantizationRule(weight_qtype="int4", act_qtype="int8")]
    )
    writer = Writer()
    plan = qwix_train.plan(Two(), provider, X)
    report = hooks.QuantReport(writer, plan, every_steps=1)
    state = train_state.TrainState.create(
        apply_fn=Two().apply, params=params, tx=optax.sgd(0.1)
    )

    def step(state, x):
        return state, jnp.sum(state.apply_fn({"params": state.params}, x))

    state = qwix_train.attach(state, provider, X)
    state, _ = qwix_train.wrap_train_step(step, provider)(state, X)
    report(1, state=state)
    scale, values = on_litert_grid(w, top=7)
    noise = np.sum((np.asarray(w, np.float64) - values) ** 2)
    expected = 10 * np.log10(np.sum(np.asarray(w, np.float64) ** 2) / noise)
    found = {
        key.removeprefix("quant/first/kernel/"): value
        for key, value in writer.scalars.items()
    }
    np.testing.assert_allclose(found["sqnr_db"], expected, rtol=1e-5)
    at_ends = np.abs(np.round(np.asarray(w) / scale)) == 7
    assert found["at_end_codes"] == pytest.approx(at_ends.mean())
    assert found["bits"] == 4 and found["saturated"] == 0
    # Of the input of the model, which the first product reads.
    low = writer.scalars["quant/first/dot_general0_lhs/min"]
    assert low == pytest.approx(float(X.min()))


def test_the_optimizer_takes_weights_to_the_grid_of_litert():
    w = models.normal(6, 5, seed=1)
    params = {"first": {"kernel": w, "bias": jnp.ones(5)}}
    tx = optim.proximal(plan_of(Two(), X), optax.linear_schedule(0.0, 1.0, 1))
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    scale, values = on_litert_grid(w)
    np.testing.assert_allclose(params["first"]["kernel"], values, rtol=1e-5)
    np.testing.assert_allclose(state.scale["first"]["kernel"], scale, rtol=1e-6)
    assert (params["first"]["bias"] == 1).all()


def test_a_step_is_planned_with_its_ranges():
    model = nn.Dense(2, use_bias=False)
    provider = odml.OdmlQatProvider(INT8)
    state = train_state.TrainState.create(
        apply_fn=model.apply, params={"kernel": jnp.ones((6, 2))}, tx=optax.sgd(0.1)
    )

    def step(state, x):
        loss = jnp.sum(model.apply({"params": state.params}, x))
        return state, loss

    state = qwix_train.attach(state, provider, X)
    planned = qwix_train.plan(qwix_train.wrap_eval_step(step, provider), state, X)
    (record,) = planned.records()
    assert record["call"] == 0 and record["weights"] == ("kernel",)
    assert record["range"] == "final_output0"


def test_layers_of_a_scan_have_scales_of_their_own():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(6)(nn.LayerNorm()(x)), None

    def call(self, x):
        layers = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return layers(name="layers")(x, None)[0]

    plan = plan_of(module(call), X)
    kernel = plan.params["layers", "Dense_0", "kernel"]
    assert kernel.shape == (2, 6, 6) and kernel.how.channelwise_axes == (0, 2)
    assert kernel.layer_axes == (0,) and kernel.op.op.layers == (2,)
    # A constant of a product of two tensors has one range, in each layer.
    scale = plan.params["layers", "LayerNorm_0", "scale"]
    assert scale.how.calibration_method == "minmax"
    assert scale.how.channelwise_axes == (0,) and scale.how.tiled_axes == {}


def test_a_table_that_is_a_weight_too_is_said_to_be_there_twice():
    def call(self, ids):
        embed = nn.Embed(7, 4, name="embed")
        return embed.attend(embed(ids))

    plan = plan_of(module(call), jnp.arange(3))
    table = plan.params["embed", "embedding"]
    assert table.how.calibration_method == "minmax" and table.how.qtype == "int8"
    (product,) = (op for op in plan.ops if op.name == "dot_general")
    reason = "embed/embedding is in the file twice: embed/take0 has another grid"
    assert product.reason == reason
    assert product.weights == (("embed", "embedding"),)


def test_params_that_are_joined_are_quantized():
    def call(self, x):
        params = [self.param(n, nn.initializers.ones, (4, 6)) for n in "ab"]
        return x @ jnp.concatenate(params).T

    plan = plan_of(module(call), X)
    hows = {path: p.how for path, p in plan.params.items()}
    assert hows["a",] == hows["b",] is not None
    assert hows["a",].channelwise_axes == (0,)


@pytest.mark.parametrize(
    "function", [lambda w: w @ jnp.ones((6, 2)), jnp.tanh], ids=["product", "tanh"]
)
def test_a_weight_that_is_computed_is_no_quantized_param(function):
    """Not even one of whose elements each is computed from one of the param."""

    def call(self, x):
        return x @ function(self.param("w", nn.initializers.ones, (6, 6)))

    plan = plan_of(module(call), X)
    (product,) = (op for op in plan.ops if op.weight is not None)
    assert product.weights == () and plan.params["w",].how is None
    (record,) = plan.records()
    assert record["weight_qtype"] == "int8_narrow"
    assert record["weight_granularity"] == "channel 1"


def test_a_weight_with_what_follows_folded_in_has_no_grid_of_its_own():
    def call(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))

    plan = plan_of(module(call), X, disable_per_channel_weights=True)
    (product,) = (op for op in plan.ops if op.name == "dot_general")
    assert product.weights == () and product.folds
    assert product.reason == "its weight is quantized with what follows multiplied in"
    plan = plan_of(nn.Dense(3), X, disable_per_channel_weights=True)
    assert plan.params["kernel",].how is None  # so has a bias
    plan = plan_of(nn.Dense(3, use_bias=False), X, disable_per_channel_weights=True)
    assert plan.params["kernel",].how.channelwise_axes == ()


@pytest.mark.parametrize(
    "options", [{}, {"act_qtype": "int8", "act_static_scale": False}]
)
def test_a_table_without_static_ranges_stays_in_float(options):
    """Its rows would be codes, whose range nothing else shares."""
    rules = [QuantizationRule(weight_qtype="int8", **options)]
    model = module(lambda self, ids: nn.Dense(2)(nn.Embed(7, 4)(ids)))
    plan = plan_of(model, jnp.arange(3), rules=rules)
    lookup, product, _ = plan.ops
    assert not lookup.quantized and "static ranges" in lookup.reason
    assert product.quantized
    assert plan.params["Embed_0", "embedding"].how is None


def test_a_function_in_a_float_call_stays_in_float():
    """Also where LiteRT has one operator for what a trace shows as several."""
    plan = plan_of(module(lambda self, x: jnp.exp(nn.silu(x))), X)
    assert all(op.in_integers for op in plan.ops)
    silu = qwix_train.in_float(nn.silu)
    plan = plan_of(module(lambda self, x: jnp.exp(silu(x))), X)
    assert [op.in_integers for op in plan.ops] == [False, True]
    assert plan.ops[0].reason == "its call is in_float"


def test_a_range_that_the_plan_does_not_have():
    plan = plan_of(Two(), X)
    assert plan.statistics_at(("final_output0",)) is not None
    with pytest.raises(ValueError, match="'other/exp0', and the plan measures no such"):
        plan.statistics_at(("other", "exp0"))
