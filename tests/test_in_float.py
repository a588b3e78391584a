"""Calls that stay in float in a wrapped step, such as those of a teacher."""

import warnings

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train import (
    OdmlQatProvider,
    QtProvider,
    QuantizationRule,
    as_model,
    calib,
    in_float,
    plan,
    quantize_model,
    wrap_eval_step,
    wrap_train_step,
)
from tests import models

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4)).astype(np.float32)
KERNELS = RNG.normal(size=(2, 4, 3)).astype(np.float32)
STUDENT, TEACHER = ({"params": {"kernel": jax.device_put(k)}} for k in KERNELS)
MODEL = nn.Dense(3, use_bias=False)
TWO_TREES = "2 different trees of params of one model.*'kernel'.*in_float"


def linear(which):
    model = nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = KERNELS[which]
    return model


def in_int8(which):
    """The product as the rules quantize it, by hand."""
    quantized = models.fake_quant(X, 8, -1), models.fake_quant(KERNELS[which], 8, 0)
    return np.asarray(quantized[0]) @ np.asarray(quantized[1])


def outputs(step, *args, jit=jax.jit):
    """What a step that returns the student's and the teacher's outputs gives."""
    return jit(wrap_eval_step(step, models.INT8))(*args)


def check_teacher_in_float(out):
    student, teacher = out
    np.testing.assert_allclose(student, in_int8(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(teacher, X @ KERNELS[1], rtol=1e-5, atol=1e-6)


COMPILED = jax.jit(MODEL.apply)
LINEN_CALLS = {
    "a module": lambda v: in_float(MODEL).apply(v, X),
    "a method": lambda v: in_float(MODEL.apply)(v, X),
    "a bound module": lambda v: in_float(MODEL.bind(v))(X),
    "a module that is bound then": lambda v: in_float(MODEL).bind(v)(X),
    "a function": lambda v: in_float(lambda v: MODEL.apply(v, X))(v),
    "a compiled function": lambda v: in_float(COMPILED)(v, X),
    "within a compiled function": jax.jit(lambda v: in_float(MODEL).apply(v, X)),
    "a marked function": lambda v: in_float(as_model(lambda v: X @ v))(
        v["params"]["kernel"]
    ),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("call", LINEN_CALLS.values(), ids=LINEN_CALLS)
def test_a_linen_teacher_stays_in_float(call):
    def step(params, teacher):
        return COMPILED(params, X), call(teacher)

    check_teacher_in_float(outputs(step, STUDENT, TEACHER))


NNX_TEACHER = linear(1)
NNX_CALLS = {
    "an argument": lambda teacher: in_float(teacher)(X),
    "a method": lambda teacher: in_float(teacher.__call__)(X),
    "closed over": lambda teacher: in_float(NNX_TEACHER)(X),
    "a function": lambda teacher: in_float(lambda t: t(X))(teacher),
    "handed to a compiled function": lambda teacher: nnx.jit(lambda t: t(X))(
        in_float(teacher)
    ),
    "a graph definition": lambda teacher: (
        lambda graphdef, state: in_float(graphdef).apply(state)(X)[0]
    )(*nnx.split(teacher)),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("call", NNX_CALLS.values(), ids=NNX_CALLS)
def test_an_nnx_teacher_stays_in_float(call):
    def step(student, teacher):
        return student(X), call(teacher)

    teacher = linear(1)
    check_teacher_in_float(outputs(step, linear(0), teacher, jit=nnx.jit))
    assert type(teacher) is nnx.Linear


def test_a_teacher_that_is_in_float_may_be_an_argument():
    out = outputs(
        lambda s, t: (s(X), t(X)), linear(0), in_float(linear(1)), jit=nnx.jit
    )
    check_teacher_in_float(out)


def test_an_nnx_module_in_float_shares_its_variables():
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    in_float(norm)(X)
    np.testing.assert_allclose(norm.mean[...], 0.01 * X.mean(0), rtol=1e-4)


COMPILED_NNX = jax.jit(lambda: NNX_TEACHER(X))
TEACHERS = {
    "Linen, an argument": lambda v, t: MODEL.apply(v, X),
    "Linen, closed over": lambda v, t: MODEL.apply(TEACHER, X),
    "Linen, compiled": lambda v, t: COMPILED(v, X),
    "Linen, under another name": lambda v, t: nn.Dense(
        3, use_bias=False, name="teacher"
    ).apply(v, X),
    "NNX, an argument": lambda v, t: t(X),
    "NNX, closed over": lambda v, t: NNX_TEACHER(X),
    "NNX, compiled": lambda v, t: COMPILED_NNX(),
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("name", TEACHERS)
def test_two_trees_of_one_model_are_quantized_with_one_warning(name):
    def step(params, student, teacher_params, teacher):
        def loss(params):
            is_linen = name.startswith("Linen")
            out = COMPILED(params, X) if is_linen else student(X)
            return jnp.mean(out), (out, TEACHERS[name](teacher_params, teacher))

        return jax.value_and_grad(loss, has_aux=True)(params)[0][1]

    args = STUDENT, linear(0), TEACHER, linear(1)
    wrapped = wrap_train_step(step, models.INT8)
    with pytest.warns(UserWarning, match=TWO_TREES) as caught:
        out = wrapped(*args)
        wrapped(*args)
        nnx.jit(wrapped)(*args)
    assert len(caught) == 1
    for which, found in enumerate(out):
        np.testing.assert_allclose(found, in_int8(which), rtol=1e-5, atol=1e-6)


def test_static_ranges_warn_once_of_all_batches():
    def step(student, teacher):
        return student(X), teacher(X)

    calibrator = calib.Calibrator([models.rule("int8", "int8", act_static_scale=True)])
    wrapped = calibrator.wrap(step)
    with pytest.warns(UserWarning, match=TWO_TREES) as caught:
        for _ in range(2):
            wrapped(linear(0), linear(1))
    assert len(caught) == 1


def test_a_teacher_in_a_step_of_another_mode():
    def step(params, teacher):
        return MODEL.apply(params, X), MODEL.apply(teacher, X)

    provider = OdmlQatProvider([QuantizationRule(weight_qtype="int8")])
    with pytest.warns(UserWarning, match=TWO_TREES):
        jax.eval_shape(wrap_train_step(step, provider), STUDENT, TEACHER)


def test_one_tree_that_is_called_in_many_ways_is_one():
    def step(params, x):
        def loss(params):
            return jnp.mean(MODEL.apply(params, x) ** 2)

        ahead = jax.tree.map(jnp.add, params, jax.grad(loss)(params))
        looked = jax.grad(loss)(ahead)  # as an optimizer that looks ahead
        scanned = jax.lax.scan(lambda c, x: (c + loss(params), None), 0.0, X)[0]
        return looked, COMPILED(params, x), jax.checkpoint(loss)(params), scanned

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(wrap_train_step(step, models.INT8))(STUDENT, X)


def test_no_range_is_collected_of_a_call_in_float():
    def step(params, teacher, x):
        return MODEL.apply(params, x), in_float(MODEL).apply(teacher, 100 * x)

    calibrator = calib.Calibrator([models.rule("int8", "int8", act_static_scale=True)])
    calibrator.wrap(step)(STUDENT, TEACHER, X)
    stats = calibrator.quant_stats["dot_general0_lhs"]
    np.testing.assert_allclose(
        stats["sum_of_absmax"] / stats["count"], [[models.MARGIN * np.abs(X).max()]]
    )


class WithTeacher(nn.Module):
    """Holds its own teacher."""

    def setup(self):
        self.student = nn.Dense(3, use_bias=False)
        self.teacher = nn.Dense(3, use_bias=False)

    def __call__(self, x):
        return self.student(x), in_float(self.teacher)(x)


def test_a_part_of_a_model_stays_in_float_and_the_plan_says_so():
    params = {"student": STUDENT["params"], "teacher": TEACHER["params"]}
    variables = {"params": params}
    ops = plan(WithTeacher(), models.INT8, X, variables=variables).records()
    assert [op["weights"] for op in ops] == [("student/kernel",), ()]
    assert ops[1]["reason"] == "its call is in_float"
    check_teacher_in_float(outputs(WithTeacher().apply, variables, X))
    quantized = quantize_model(WithTeacher(), QtProvider(models.INT8))
    check_teacher_in_float(quantized.apply(variables, X))


class NnxWithTeacher(nnx.Module):
    def __init__(self):
        self.student, self.teacher = linear(0), linear(1)

    def __call__(self, x):
        return self.student(x), in_float(self.teacher)(x)


def test_a_part_of_an_nnx_model_stays_in_float():
    check_teacher_in_float(outputs(lambda m: m(X), NnxWithTeacher(), jit=nnx.jit))


def test_in_float_twice_is_in_float():
    once = in_float(MODEL)
    assert in_float(once) is once and once == in_float(MODEL)


def test_what_cannot_stay_in_float():
    with pytest.raises(TypeError, match="made by quantize_model"):
        in_float(quantize_model(MODEL, QtProvider(models.INT8)))
    for wrong in (TEACHER, nn.Dense):
        with pytest.raises(
            TypeError, match="Flax module or a function, got .{3,99}: in"
        ):
            in_float(wrong)
