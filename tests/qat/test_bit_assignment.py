"""The assignment of types: optimal, within its budget, and ordinary rules."""

import dataclasses
import itertools

import hypothesis
import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import strategies as st
from jax import numpy as jnp

from qwix_train import QuantizationRule, as_model, plan, ptq, qat
from qwix_train.core.qarray import QArray
from tests import models

X = models.normal(4, 8, seed=0)
RULES = [
    QuantizationRule(module_path="Dense_2"),
    QuantizationRule(weight_qtype="int8", act_qtype="int8", tile_size=4),
]


def table(costs, sizes=None, elements=None):
    """A sensitivity with these costs and bytes, for each op and type."""
    costs = np.asarray(costs, float)
    rows = []
    for i, t in np.ndindex(*costs.shape):
        qtype = ("int2", "int3", "int4", "int8")[t]
        rule = QuantizationRule(module_path=f"op{i}", weight_qtype=qtype)
        bits, size = int(qtype[3:]), 8 if elements is None else elements[i]
        row = qat.OpSensitivity(
            ops=(f"op{i}/dot_general0",),
            params=(f"op{i}/kernel",),
            size=size,
            qtype=qtype,
            bits=bits,
            bytes=size * bits // 8 if sizes is None else sizes[i][t],
            sqnr_db=10.0,
            weight_error=1.0,
            loss_increase=costs[i, t],
            rules=(rule,),
        )
        rows.append(row)
    return qat.Sensitivity(tuple(rows), (), "loss", 1.0, 1)


def chosen(rules):
    """The index of the type of each op."""
    types = ["int2", "int3", "int4", "int8"]
    return [types.index(rule.weight_qtype) for rule in rules]


def best(costs, sizes, limit):
    """The lowest cost within a limit, by trying all; None if nothing is within it."""
    found = [
        sum(costs[i][t] for i, t in enumerate(choice))
        for choice in itertools.product(range(len(costs[0])), repeat=len(costs))
        if sum(sizes[i][t] for i, t in enumerate(choice)) <= limit
    ]
    return min(found, default=None)


@st.composite
def problems(draw):
    ops, types = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    # Of one size or of many orders of magnitude, and below 0, too.
    cost = st.one_of(st.floats(-1, 1), st.floats(-8, 3).map(lambda power: 10.0**power))
    size = st.one_of(st.integers(1, 40), st.integers(1, 10**9))

    def grid(of):
        rows = st.lists(of, min_size=types, max_size=types)
        return draw(st.lists(rows, min_size=ops, max_size=ops))

    sizes = grid(size)
    share = draw(st.floats(0, 1))
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    return grid(cost), sizes, low + int(share * (high - low))


@pytest.mark.slow
@hypothesis.given(problems())
@hypothesis.settings(max_examples=60)
def test_no_other_assignment_is_better(problem):
    costs, sizes, budget = problem
    choice = chosen(qat.assign_bits(table(costs, sizes), budget))
    assert sum(sizes[i][t] for i, t in enumerate(choice)) <= budget
    cost = sum(costs[i][t] for i, t in enumerate(choice))
    spread = max(map(max, costs)) - min(map(min, costs))
    assert cost <= best(costs, sizes, budget) + 1e-9 * spread


def test_average_bits_are_those_of_codes():
    costs = [[8, 4, 2, 1]] * 3
    found = table(costs, elements=[100, 200, 300])
    rules = qat.assign_bits(found, average_bits=3)
    bits = [(2, 3, 4, 8)[t] for t in chosen(rules)]
    assert np.average(bits, weights=[100, 200, 300]) <= 3
    sizes = [[n * b for b in (2, 3, 4, 8)] for n in (100, 200, 300)]
    cost = sum(costs[0][t] for t in chosen(rules))
    assert cost == best(costs, sizes, 3 * 600)
    # 2.1 * 30 is 63.00000000000001, and 2.3 * 30 is 68.99999999999999.
    tenths = table([[9, 1]], elements=[10])
    assert chosen(qat.assign_bits(tenths, average_bits=3.0)) == [1]
    assert chosen(qat.assign_bits(tenths, average_bits=2.9)) == [0]


@pytest.mark.slow
def test_many_ops():
    rng = np.random.default_rng(0)
    costs = -np.sort(-(rng.exponential(size=(300, 4)) ** 3), axis=1)
    elements = rng.integers(1000, 10**7, 300)
    rules = qat.assign_bits(table(costs, elements=elements), average_bits=3)
    choice = chosen(rules)
    sizes = np.outer(elements, [2, 3, 4, 8])
    assert sizes[range(300), choice].sum() <= 3 * elements.sum()
    # What a Lagrange multiplier gives is a lower bound for any assignment.
    bounds = [
        (costs + price * sizes).min(1).sum() - price * 3 * elements.sum()
        for price in np.logspace(-12, -4, 2000)
    ]
    assert max(bounds) <= costs[range(300), choice].sum() <= 1.001 * max(bounds)


class Three(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        x = nn.Dense(8)(nn.relu(x))
        return nn.Dense(3)(x)


class NnxThree(nnx.Module):
    def __init__(self, rngs):
        self.Dense_0 = nnx.Linear(8, 16, rngs=rngs)
        self.Dense_1 = nnx.Linear(16, 8, rngs=rngs)
        self.Dense_2 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.Dense_2(self.Dense_1(nnx.relu(self.Dense_0(x))))


def make(kind):
    """A model, its params, and a loss function of what comes second."""
    if kind == "nnx":
        model = NnxThree(nnx.Rngs(0))
        return model, None, model, lambda model, x: jnp.mean(model(x) ** 2)
    model = Three()
    rng = np.random.default_rng(0)
    params = {
        f"Dense_{i}": {
            "kernel": jax.device_put(rng.normal(size=shape).astype(np.float32)),
            "bias": jnp.zeros(shape[1]),
        }
        for i, shape in enumerate([(8, 16), (16, 8), (8, 3)])
    }
    if kind == "linen":

        def loss(params, x):
            return jnp.mean(model.apply({"params": params}, x) ** 2)

        return model, params, params, loss

    def forward(params, x):
        for name in ("Dense_0", "Dense_1", "Dense_2"):
            with jax.named_scope(name):
                x = nn.relu(x @ params[name]["kernel"])
        return x

    marked = as_model(forward)
    return forward, params, params, lambda params, x: jnp.mean(marked(params, x) ** 2)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["linen", "nnx", "function"])
def test_rules_that_the_plan_and_ptq_follow(kind):
    model, params, state, loss = make(kind)
    rules = RULES
    if kind == "function":
        rules = [QuantizationRule(op_names=("dot_general2",)), RULES[1]]
    options = {"method": "hutchinson", "probes": 1, "qtypes": ["int2", "int3"]}
    found = qat.sensitivity(loss, state, rules, [X], **options)
    smallest = sum(min(row.bytes for row in rows) for rows in found.groups)
    # One of the two, of 128 elements each, may have a bit more than the other.
    budget = smallest + 17
    assigned = qat.assign_bits(found, budget)
    assert assigned[2:] == rules

    inputs = (params, X) if kind == "function" else (X,)
    planned = plan(model, assigned, *inputs)
    rows = {
        record["weights"][0]: record["weight_qtype"]
        for record in planned.records()
        if record["weights"]
    }
    assert rows == {
        row.params[0]: row.qtype for row in found.rows if row.rules[0] in assigned
    }
    assert rows.keys() == {"Dense_0/kernel", "Dense_1/kernel"}
    assert len(set(rows.values())) == 2
    # What else the rules say stays.
    assert all("tile" in (r["weight_granularity"] or "tile") for r in planned.records())
    assert {r["act_qtype"] for r in planned.records()} == {"int8", None}

    _, quantized = ptq.quantize(model, params, assigned, X)
    arrays = [
        leaf.nbytes
        for leaf in jax.tree.leaves(quantized, is_leaf=lambda x: isinstance(x, QArray))
        if isinstance(leaf, QArray)
    ]
    assert len(arrays) == 2
    assert sum(arrays) == sum(
        row.bytes for row in found.rows if row.rules[0] in assigned
    )
    assert sum(arrays) <= budget


def test_says_what_cannot_be():
    found = table([[3, 2], [2, 1]], sizes=[[10, 20], [12, 30]])
    with pytest.raises(ValueError, match="budget=21 bytes cannot .* at least 22 bytes"):
        qat.assign_bits(found, 21)
    with pytest.raises(ValueError, match="average_bits=1.5 .* or 2 bits on average"):
        qat.assign_bits(found, average_bits=1.5)
    assert chosen(qat.assign_bits(found, 22)) == [0, 0]
    with pytest.raises(ValueError, match="average_bits=nan.*a finite number"):
        qat.assign_bits(found, average_bits=float("nan"))
    with pytest.raises(TypeError, match="Give one budget"):
        qat.assign_bits(found)
    with pytest.raises(TypeError, match="Give one budget"):
        qat.assign_bits(found, 22, average_bits=3)
    with pytest.raises(TypeError, match="result of qat.sensitivity, got list"):
        qat.assign_bits([], 22)
    with pytest.raises(ValueError, match="op0/dot_general0 with int3: the loss is not"):
        qat.assign_bits(table([[3, np.nan]]), 22)
    rule = models.rule("int8")
    assert qat.assign_bits(dataclasses.replace(found, rules=(rule,)), 50)[-1] is rule
