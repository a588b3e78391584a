"""Every way for a weight to reach a product, against float64 NumPy references."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qwix_train.frontends.model import quantize_fn
from qwix_train.frontends.plan_of import plan
from qwix_train.qat import QtProvider
from qwix_train.trace import provenance
from qwix_train.trace.factors import Atom
from qwix_train.trace.provenance import ACTIVATION, CONSTANT, Derived, Weight
from tests import spellings
from tests.spellings import CASES, RULE, cast


@pytest.mark.thinned(16)
@pytest.mark.parametrize("name", CASES)
def test_path_into_a_product(name, monkeypatch):
    case = CASES[name]
    params, x = jax.tree.map(jnp.asarray, (case.params, case.x))
    found = [
        (record["op"], record["weights"], record["weight_granularity"])
        for record in plan(case.function, [RULE], params, x).records()
        if not record["op"].startswith("gather")
    ]
    assert found == case.ops
    quantized = quantize_fn(case.function, QtProvider([RULE], allow_unmatched=True))
    wide = cast(case.params, np.float64), cast(case.x, np.float64)
    expected = case.reference(*wide)
    tolerance = 2e-2 if name == "bfloat16" else 2e-6
    np.testing.assert_allclose(
        jax.jit(quantized)(params, x),
        expected,
        rtol=tolerance,
        atol=tolerance,
    )
    if any(weights for _, weights, _ in case.ops):
        monkeypatch.setattr(spellings, "fq", lambda x, *args, **kwargs: x)
        difference = np.abs(case.reference(*wide) - expected).max()
        assert difference > 10 * 2e-6, "the numbers do not tell float apart"


def test_weight_views_of_a_reshaped_axis():
    weight = provenance.param(("w",), (12, 5))
    (split,) = propagate("reshape", weight, (12, 5), (3, 4, 5), dimensions=None)
    assert split.views[0].dims == ((Atom(0, 3, 4),), (Atom(0, 4, 1),), (Atom(1, 5, 1),))
    (moved,) = propagate(
        "transpose", split, (3, 4, 5), (4, 3, 5), permutation=(1, 0, 2)
    )
    (merged,) = propagate("reshape", moved, (4, 3, 5), (12, 5), dimensions=None)
    # Side by side, but not in the order of the stored axis.
    assert merged.views[0].dims[0] == (Atom(0, 4, 1), Atom(0, 3, 4))
    (back,) = propagate("reshape", split, (3, 4, 5), (60,), dimensions=None)
    (whole,) = propagate("reshape", back, (60,), (12, 5), dimensions=None)
    assert whole.views[0].dims[0] == (Atom(0, 3, 4), Atom(0, 4, 1))
    assert whole.views[0].dims[1] == (Atom(1, 5, 1),)


def test_a_strided_slice_keeps_its_stride():
    weight = provenance.param(("w",), (12,))
    (part,) = propagate("slice", weight, (12,), (4,), strides=(3,))
    assert part.views[0].dims == ((Atom(0, 4, 3, False),),)


def test_an_axis_of_which_one_element_is_taken_holds_none():
    weight = provenance.param(("w",), (3, 4))
    (part,) = propagate("slice", weight, (3, 4), (1, 4), strides=None)
    assert part.views[0].dims == ((), (Atom(1, 4, 1),))


def test_a_scale_times_constants_of_its_batch_is_no_weight():
    scale = provenance.param(("scale",), (4,))
    (wide,) = propagate(
        "broadcast_in_dim", scale, (4,), (3, 4), broadcast_dimensions=(1,)
    )
    assert wide.views[0].dims == ((), (Atom(0, 4, 1),))
    shapes = [(3, 4), (3, 4)], [(3, 4)]
    assert provenance.propagate("mul", {}, [wide, CONSTANT], *shapes) == [
        Derived((("scale",),), "mul")
    ]
    # A scalar cannot differ along the batch.
    assert provenance.propagate(
        "mul", {}, [wide, CONSTANT], [(3, 4), ()], [(3, 4)]
    ) == [wide]


@pytest.mark.parametrize("primitive", ["add", "mul", "sub", "max"])
def test_two_params_combined_are_derived(primitive):
    a, b = (provenance.param((name,), (4,)) for name in "ab")
    shapes = [(4,), (4,)], [(4,)]
    (result,) = provenance.propagate(primitive, {}, [a, b], *shapes)
    assert result == Derived((("a",), ("b",)), primitive)
    (result,) = provenance.propagate(primitive, {}, [a, ACTIVATION], *shapes)
    assert result == ACTIVATION


def test_what_is_looked_up_and_combined_is_an_activation():
    table, place = (provenance.param((name,), (4,)) for name in "ab")
    row = dataclasses.replace(table, selected=True)
    shapes = [(4,), (4,)], [(4,)]
    assert provenance.propagate("add", {}, [row, place], *shapes) == [ACTIVATION]
    assert provenance.join(row, CONSTANT) == ACTIVATION


def test_join_of_two_views_of_one_param_is_derived():
    square = provenance.param(("w",), (4, 4))
    (turned,) = propagate("transpose", square, (4, 4), (4, 4), permutation=(1, 0))
    assert provenance.join(square, turned) == Derived((("w",),), "a branch or a loop")
    other = provenance.param(("v",), (4, 4))
    assert provenance.join(square, other) == Weight((*square.views, *other.views))


def test_results_are_told_apart():
    weight = provenance.param(("w",), (4,))
    shapes = [(4,), (4,)], [(4,), (4,)]
    operands = [weight, ACTIVATION]
    assert provenance.propagate("optimization_barrier", {}, operands, *shapes) == (
        operands
    )


def propagate(primitive, operand, shape, out_shape, **params):
    return provenance.propagate(primitive, params, [operand], [shape], [out_shape])
