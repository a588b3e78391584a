"""Which operands are one array, and have one range."""

import jax
import pytest
from jax import lax
from jax import numpy as jnp

from qwix_train import QtRule, QuantizationRule, plan
from qwix_train.qat import Schedule
from qwix_train.trace.scopes import module_scope
from tests import models

INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
LSQ = {**INT8, "act_calibration_method": "lsq"}
X = models.normal(4, 6)
PARAMS = {name: models.normal(6, 6, seed=i) for i, name in enumerate("abc")}


@jax.custom_vjp
def reversed_gradient(x):
    return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def product(params, name, x):
    with module_scope(name):
        return x @ params[name]


def same(p, x):
    return product(p, "a", x) + product(p, "b", x)


def compiled(p, x):
    return product(p, "a", x) + jax.jit(product, static_argnums=1)(p, "b", x)


def made_in_checkpoint(p, x):
    return jax.checkpoint(lambda p, x: same(p, jnp.tanh(x)))(p, x)


def cast_by_each(p, x):
    half = {name: value.astype("bfloat16") for name, value in p.items()}
    return sum(product(half, name, x.astype("bfloat16")) for name in "ab")


def moved_by_each(p, x):
    return sum(product(p, name, x.reshape(2, 2, 6).swapaxes(0, 1)) for name in "ab")


def with_itself(p, x):
    return product(p, "a", x) @ product({"b": x.T}, "b", x)


def in_layers(p, x):
    return lax.scan(lambda x, p: (jnp.tanh(same(p, x)), None), x, stacked(p))[0]


def in_a_branch(p, x):
    return lax.cond(x[0, 0] > 0, lambda: same(p, x), lambda: x)


@pytest.mark.parametrize(
    "function",
    [
        same,
        compiled,
        made_in_checkpoint,
        cast_by_each,
        moved_by_each,
        in_layers,
        in_a_branch,
    ],
)
def test_one_range(function):
    found = owners(function)
    assert found["b/dot_general0_lhs"] == "a/dot_general0_lhs"
    assert found["a/dot_general0_lhs"] == "a/dot_general0_lhs"


def stacked(params):
    return jax.tree.map(lambda p: jnp.stack([p] * 3), params)


def computed_twice(p, x):
    return product(p, "a", x) + product(p, "b", x * 1.5)


def moved(p, x):
    return product(p, "a", x) + product(p, "b", x[::-1])


def cast_differently(p, x):
    return product(p, "a", x) + product(
        {"b": p["b"].astype("bfloat16")}, "b", x.astype("bfloat16")
    )


def reshaped_differently(p, x):
    return product(p, "a", x.reshape(2, 2, 6)).sum() + product(
        p, "b", x.reshape(2, 2, 6).swapaxes(0, 1)
    )


def other_gradient(p, x):
    return product(p, "a", x) + product(p, "b", reversed_gradient(x))


def without_gradient(p, x):
    return product(p, "a", x) + product(p, "b", lax.stop_gradient(x))


def after_a_loop(p, x):
    y = lax.fori_loop(0, x.shape[0], lambda i, y: 2 * y, x)
    return product(p, "a", x) + product(p, "b", y)


def after_a_branch(p, x):
    y = lax.cond(x[0, 0] > 0, lambda: x, lambda: -x)
    return product(p, "a", x) + product(p, "b", y)


def of_one_start(p, x):
    def body(carry, _):
        x, y = carry
        return (jnp.tanh(product(p, "a", x)), product(p, "b", y)), None

    return lax.scan(body, (x, x), None, length=2)[0]


def beside_layers(p, x):
    outside = product(p, "a", x)

    def body(carry, b):
        return carry + product({"b": b}, "b", x), None

    return lax.scan(body, outside, jnp.stack([p["b"]] * 3))[0]


def beside_a_branch(p, x):
    return product(p, "a", x) + lax.cond(x[0, 0] > 0, product_b, lambda p, x: x, p, x)


def checkpointed(p, x):
    return product(p, "a", x) + jax.checkpoint(product, static_argnums=1)(p, "b", x)


def product_b(p, x):
    return product(p, "b", x)


def of_two_branches(p, x):
    return lax.cond(x[0, 0] > 0, lambda: product(p, "a", x), lambda: product_b(p, x))


def slices_of_one(p, x):
    def body(total, parts):
        x, y = parts
        return total + product(p, "a", x) + product(p, "b", y), None

    many = jnp.stack([x, 2 * x])
    return lax.scan(body, x, (many, many[::-1]))[0]


@pytest.mark.parametrize(
    "function",
    [
        computed_twice,
        moved,
        cast_differently,
        reshaped_differently,
        other_gradient,
        without_gradient,
        after_a_loop,
        after_a_branch,
        of_one_start,
        beside_layers,
        beside_a_branch,
        checkpointed,
        of_two_branches,
        slices_of_one,
    ],
)
def test_ranges_of_their_own(function):
    found = owners(function)
    assert found["b/dot_general0_lhs"] == "b/dot_general0_lhs"


def owners(function, rules=({"act_static_scale": True},), params=None):
    """The owner of each range, by name."""
    rules = [QuantizationRule(**{**INT8, **fields}) for fields in rules]
    found = plan(function, rules, PARAMS if params is None else params, X)
    return {
        "/".join(op.range_path(side)): "/".join(op.range_owner(side))
        for op in found.quantized_ops
        for side, how in enumerate(op.activations)
        if how is not None
    }


@pytest.mark.parametrize(
    "other",
    [
        {"act_qtype": "int4"},
        {"act_calibration_method": "minmax"},
        {"act_static_scale": False},
        {"act_static_scale": None, "act_calibration_method": "lsq"},
        {"act_observer": "mse"},
        {"act_averaging": "ema,0.9"},
        {"act_batch_axes": (0, 1)},
        {"act_channelwise_axes": (0,)},
        {"act_finite_only": True},
        {"schedule": Schedule(start_step=10)},
    ],
)
def test_other_settings_are_another_range(other):
    rule = {"act_static_scale": True}
    first, second = {**rule, "module_path": "a"}, {**rule, "module_path": "b"}
    found = owners(same, [first, second])
    assert found["b/dot_general0_lhs"] == "a/dot_general0_lhs"
    found = owners(same, [first, {**second, **other}])
    assert found["b/dot_general0_lhs"] == "b/dot_general0_lhs"


def test_settings_of_weights_and_gradients_do_not_matter():
    rules = [
        QtRule(module_path="a", weight_qtype="int4", act_qtype="int8"),
        QtRule(module_path="b", **INT8, bwd_qtype="int8"),
    ]
    first, second = plan(same, rules, PARAMS, X).ops
    assert second.range_owner(0) == first.range_path(0)


def test_an_array_in_two_bases_has_two_ranges():
    def along_rows(p, x):
        total = same(p, x).sum()
        return total + lax.dot_general(x, p["c"], (((0,), (0,)), ((), ()))).sum()

    params = {**PARAMS, "c": models.normal(4, 6)}
    rule = {"act_static_scale": True}
    found = owners(along_rows, [rule], params)
    assert set(found.values()) == {"a/dot_general0_lhs"}
    found = owners(along_rows, [{**rule, "rotation": "hadamard"}], params)
    assert found["b/dot_general0_lhs"] == "a/dot_general0_lhs"
    assert found["dot_general0_lhs"] == "dot_general0_lhs"


def test_both_operands_of_an_op():
    found = owners(lambda p, x: jnp.einsum("ab,cb->ac", x, x) @ product(p, "a", x))
    assert found["einsum0_lhs"] == found["einsum0_rhs"] == "einsum0_lhs"
    assert found["a/dot_general0_lhs"] == "einsum0_lhs"


def test_names_of_a_range_are_those_of_all_its_readers():
    def model(p, x):
        y = jnp.tanh(x)
        return same(p, y) + product(p, "a", y) + product(p, "c", x)

    ops = plan(model, [QuantizationRule(**INT8)], PARAMS, X).ops
    names = (
        ("a", "dot_general0_lhs"),
        ("b", "dot_general0_lhs"),
        ("a", "dot_general1_lhs"),
    )
    assert [op.ranges[0] for op in ops] == [names] * 3 + [(("c", "dot_general0_lhs"),)]
    assert [op.ranges[1] for op in ops] == [()] * 4


def test_the_table_says_where_a_learned_range_is():
    table = str(plan(same, [QuantizationRule(**LSQ)], PARAMS, X))
    assert table.count("its lhs has the learned range of a/dot_general0_lhs") == 1
    table = str(
        plan(same, [QuantizationRule(**INT8, act_static_scale=True)], PARAMS, X)
    )
    assert "range of" not in table  # where each name has an entry
