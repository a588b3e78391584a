"""Ranges that are joined over the axes of a `shard_map`: those of the whole step."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from flax.training import train_state
from jax import numpy as jnp
from jax.sharding import AxisType, PartitionSpec

import qwix_train
from qwix_train import QtRule, attach, calib, ptq, wrap_train_step
from tests import models

P = PartitionSpec
X = models.normal(8, 8)
# Where `tanh` is near its ends, many values lie near the border of the lowest code.
PARAMS = {
    "up": models.normal(8, 16, seed=1) / 4,
    "down": models.normal(16, 8, seed=2),
}
COLUMNS, ALL = ("model",), ("data", "model")


@functools.cache
def mesh():
    return jax.make_mesh((2, 4), ALL, (AxisType.Auto,) * 2)


def whole(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def sharded(params, x, check_vma=True):
    """The same by hand: rows over `data`, and what is between over `model`."""

    def run(params, x):
        return jax.lax.psum(whole(params, x), "model")

    specs = {"up": P(None, "model"), "down": P("model")}
    return jax.shard_map(
        run,
        mesh=mesh(),
        in_specs=(specs, P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )({name: params[name] for name in specs}, x)


def by_hand(params, x):
    fq = models.fake_quant
    inside = jnp.tanh(fq(x, 8, -1) @ fq(params["up"], 4, 0))
    return fq(inside, 8, -1) @ fq(params["down"], 4, 0)


def rules_of(axis_names=(), **kwargs):
    return [models.rule("int4", "int8", act_axis_names=axis_names, **kwargs)]


def total(apply):
    return lambda params, x: jnp.sin(apply(params, x)).sum()


@pytest.mark.parametrize(
    "check_vma", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_rows_whose_elements_lie_on_several_devices(check_vma):
    apply = functools.partial(sharded, check_vma=check_vma)

    def of(axis_names):
        provider = qwix_train.QtProvider(rules_of(axis_names))
        quantized = qwix_train.quantize_fn(apply, provider)
        return jax.jit(jax.value_and_grad(total(quantized), (0, 1)))(PARAMS, X)

    wanted = jax.value_and_grad(total(by_hand), (0, 1))(PARAMS, X)
    models.assert_close(of(COLUMNS), wanted, 1e-4)
    models.assert_differ(of(())[0], wanted[0])


@pytest.mark.slow
def test_a_quantized_model_of_shards():
    rules = rules_of(COLUMNS)
    apply, params = ptq.quantize(sharded, PARAMS, rules, X)
    models.assert_close(jax.jit(apply)(params, X), by_hand(PARAMS, X), 1e-4)


def state_of(apply_fn):
    return train_state.TrainState.create(
        apply_fn=lambda variables, x: apply_fn(variables["params"], x),
        params=PARAMS,
        tx=optax.sgd(0.01),
    )


def train_step(state, x, axis_names=()):
    def loss_of(params):
        return (state.apply_fn({"params": params}, x) ** 2).sum() / len(X)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    loss, grads = jax.lax.psum((loss, grads), axis_names)
    return state.apply_gradients(grads=grads), loss


BATCHES = [size * X for size in (1.0, 3.0)]
STATIC = {"act_static_scale": True, "act_averaging": "minmax"}


def trained(step, rules, apply_fn=whole, around=lambda step: step):
    """The losses and the state after two steps."""
    state = state_of(apply_fn)
    if rules[0].act_static_scale:
        state = attach(state, rules, X)
    step, losses = jax.jit(around(wrap_train_step(step, rules))), []
    for x in BATCHES:
        state, loss = step(state, x)
        losses.append(loss)
    return losses, state.params, getattr(state, "quant_stats", {})


@pytest.mark.parametrize(
    "check_vma", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_static_ranges_of_a_model_with_shards_inside(check_vma):
    apply = functools.partial(sharded, check_vma=check_vma)
    wanted = trained(train_step, rules_of(**STATIC))
    found = trained(train_step, rules_of(ALL, **STATIC), apply)
    models.assert_close(found, wanted, 1e-4)
    largest = max(abs(x).max() for x in BATCHES)
    ranges = found[2]["dot_general0_lhs"]
    np.testing.assert_allclose(ranges["extreme_of_absmax"], models.MARGIN * largest)


@pytest.mark.slow
def test_calibration_of_a_model_with_shards_inside():
    def collected(apply, rules):
        calibrator = calib.Calibrator(rules)
        step = calibrator.wrap(jax.jit(qwix_train.as_model(apply)))
        for x in BATCHES:
            step(PARAMS, x)
        apply, params = ptq.quantize(
            apply, PARAMS, rules, X, quant_stats=calibrator.quant_stats
        )
        return calibrator.state, jax.jit(apply)(params, X)

    wanted = collected(whole, rules_of(**STATIC))
    models.assert_close(collected(sharded, rules_of(ALL, **STATIC)), wanted, 1e-4)


def over_data(step):
    """A whole step on each device, with its rows of the batch."""
    step = functools.partial(step, axis_names=("data",))
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    # The gradients of each device are summed up by the step, not by JAX.
    return jax.shard_map(step, mesh=mesh(), check_vma=False, **specs)


def qt_rules(axis_names=(), **kwargs):
    return [
        QtRule(
            weight_qtype="int8",
            act_qtype="int8",
            bwd_qtype="int8",
            act_axis_names=axis_names,
            bwd_axis_names=axis_names,
            disable_channelwise_axes=True,
            **kwargs,
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules",
    [
        functools.partial(rules_of, **STATIC),
        qt_rules,
        functools.partial(
            qt_rules, bwd_residuals="original", bwd_weight_grad_rotation="hadamard,4"
        ),
        functools.partial(
            qt_rules, bwd_averaging="amax_history,2", act_static_scale=True
        ),
    ],
    ids=["static", "gradients", "residuals", "delayed"],
)
def test_a_step_of_each_device(rules):
    wanted = trained(train_step, rules())
    found = trained(train_step, rules(("data",)), around=over_data)
    models.assert_close(found, wanted, 1e-4)
    models.assert_differ(
        trained(train_step, qt_rules(), around=over_data)[0], wanted[0]
    )


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("act_axis_names", {"bwd_residuals": "requantized", "bwd_averaging": "mean"}),
        ("bwd_axis_names", {"bwd_averaging": None}),
        ("bwd_axis_names", {"bwd_qtype": "mxfp8", "disable_channelwise_axes": True}),
        ("bwd_axis_names", {"bwd_tile_size": 4, "disable_channelwise_axes": True}),
    ],
)
def test_scales_that_belong_to_a_shard_are_refused(field, fields):
    fields = {"act_qtype": "int8", "weight_qtype": "int8", "bwd_qtype": "int8"} | fields
    with pytest.raises(ValueError, match=field):
        QtRule(**fields, **{field: ("data",)})


def test_a_wrong_axis_is_named():
    wrong = ("modle",)
    with pytest.raises(
        ValueError, match=r"dot_general0: .*'modle'.*\['data', 'model'\]"
    ):
        trained(train_step, rules_of(wrong), sharded)
    with pytest.raises(ValueError, match=r"dot_general0_lhs: .*'modle'"):
        trained(train_step, rules_of(wrong, act_static_scale=True), sharded)
    rules = [dataclasses.replace(qt_rules(wrong)[0], act_axis_names=("data",))]
    with pytest.raises(ValueError, match=r"dot_general1: .*'modle'"):
        trained(train_step, rules, around=over_data)


def test_outside_of_shard_map_there_is_nothing_to_join():
    with pytest.raises(ValueError, match=r"dot_general0: .*'model'.*there are none"):
        trained(train_step, rules_of(COLUMNS), whole)


def test_a_static_range_is_one_for_all_devices():
    rules = rules_of(COLUMNS, act_static_scale=True)
    with pytest.raises(
        ValueError, match=r"_lhs: .*'data'.*act_axis_names=\('data', 'm"
    ):
        trained(train_step, rules, sharded)
