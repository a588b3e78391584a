"""What each kind of operation says of its operands, and how a kind is added."""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import qwix_train
from qwix_train import ops
from qwix_train.trace import analyze


def equation(function, *args, primitive):
    """The parameters of the equation of a primitive in a traced function."""
    eqns = jax.make_jaxpr(function)(*args).eqns
    return next(eqn.params for eqn in eqns if eqn.primitive.name == primitive)


def test_the_axes_of_a_matrix_product():
    numbers = (((1, 3), (0, 2)), ((0,), (1,)))
    lhs, rhs = np.ones((2, 3, 4, 5)), np.ones((3, 2, 5, 6))
    params = equation(
        lambda a, b: lax.dot_general(a, b, numbers), lhs, rhs, primitive="dot_general"
    )
    assert ops.DOT.axes(params, 0, 4) == ops.OperandAxes((1, 3), (0,), (2,))
    assert ops.DOT.axes(params, 1, 4) == ops.OperandAxes((0, 2), (1,), (3,))
    assert ops.DOT.channelwise(params, 0, 4) == (0, 2)
    assert ops.DOT.channelwise(params, 1, 4) == (1, 3)
    assert ops.DOT.scaled_axes(params, 0, 4) == (1, 3, 0)


@pytest.mark.parametrize("spec", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
def test_the_axes_of_a_convolution(spec):
    shapes = {"NHWC": (2, 8, 8, 3), "NCHW": (2, 3, 8, 8)}
    kernels = {"HWIO": (3, 3, 3, 5), "OIHW": (5, 3, 3, 3)}
    numbers = lax.conv_dimension_numbers(shapes[spec[0]], kernels[spec[1]], spec)
    params = {"dimension_numbers": numbers}
    out = spec[1].index("O")
    assert ops.CONV.channelwise(params, 0, 4) == (0,)
    assert ops.CONV.channelwise(params, 1, 4) == (out,)
    assert set(ops.CONV.axes(params, 1, 4).contracted) == set(range(4)) - {out}
    assert ops.CONV.axes(params, 0, 4).contracted[0] == spec[0].index("C")


def test_the_rows_of_a_lookup_are_what_a_one_hot_product_contracts():
    params = equation(
        lambda t, i: t[i],
        jnp.ones((5, 3)),
        jnp.array([1, 2]),
        primitive="gather",
    )
    assert ops.GATHER.axes(params, 0, 2) == ops.OperandAxes((0,), (), (1,))
    assert ops.GATHER.channelwise(params, 0, 2) == (0,)


def test_the_scope_of_an_einsum_names_it():
    assert ops.DOT.name_in("layer/bi,io->bo") == "einsum"
    assert ops.DOT.name_in("layer/jvp(bi, io)") == "einsum"
    assert ops.DOT.name_in("layer/Dense_0") == "dot_general"


def test_a_kind_from_outside_is_found_planned_and_named_in_rules(monkeypatch):
    class Triangular(ops.OpKind):
        """A solve with a triangular matrix, which is not quantized here."""

        primitive = "triangular_solve"
        names = ("triangular_solve",)
        plural = "triangular solves"
        has_tiles = False

        def axes(self, params, side, ndim):
            contracted = ndim - 2 if params["left_side"] else ndim - 1
            return ops.OperandAxes.of(ndim, [contracted])

    # What is registered stays for the process; here it goes after the test.
    monkeypatch.setattr(analyze, "kinds", dict(analyze.kinds))
    ops.register(Triangular())
    with pytest.raises(ValueError, match="Triangular: there is a kind of operation"):
        ops.register(Triangular())
    rule = qwix_train.QuantizationRule(
        weight_qtype="int8", op_names=("triangular_solve",)
    )

    def model(params, x):
        return lax.linalg.triangular_solve(params["w"], x, left_side=True)

    params = {"w": np.eye(3, dtype=np.float32)}
    plan = qwix_train.plan(qwix_train.as_model(model), [rule], params, np.ones((3, 2)))
    (op,) = plan.ops
    assert op.op.id == "triangular_solve0"
    assert plan.params["w",].how.channelwise_axes == (1,)
