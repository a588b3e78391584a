"""What users add from outside: a mode, an observer, an averaging (docs/extending.md).

A kind of operation is in `tests/ops/test_kinds.py`.
"""

import dataclasses

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import numpy as jnp

from qwix_train import (
    QuantizationProvider,
    QuantizationRule,
    attach,
    calib,
    plan,
    ptq,
    quantize_model,
    ranges,
    wrap_eval_step,
    wrap_train_step,
)
from tests import models

MODEL = nn.Dense(3)
BATCHES = [scale * models.normal(8, 6, seed=scale) for scale in (1, 2, 4)]
PARAMS = models.params_of(MODEL, BATCHES[0])
STATIC = {"weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": True}


class Bfloat16(QuantizationProvider):
    """Products take what bfloat16 has of their operands."""

    def transform(self, traced, plan):
        def handler(op, operands, run, given):
            del op, given
            return run(*(x.astype(jnp.bfloat16).astype(x.dtype) for x in operands))

        products = [found.op for found in plan.quantized_ops]
        return traced.run(products, handler, lambda param: None)


def narrow(x):
    return np.asarray(jax.device_put(x).astype(jnp.bfloat16), np.float64)


def test_a_mode():
    provider = Bfloat16([QuantizationRule(weight_qtype="int8", act_qtype="int8")])
    x = BATCHES[0]
    want = narrow(x) @ narrow(PARAMS["kernel"]) + PARAMS["bias"]
    step = wrap_eval_step(lambda p, x: MODEL.apply({"params": p}, x), provider)
    np.testing.assert_allclose(jax.jit(step)(PARAMS, x), want, 1e-5, 1e-5)
    model = quantize_model(MODEL, provider)
    np.testing.assert_allclose(model.apply({"params": PARAMS}, x), want, 1e-5, 1e-5)
    assert len(plan(MODEL, provider, x).quantized_ops) == 1


@dataclasses.dataclass(frozen=True)
class MeanMagnitude:
    """A range of some mean magnitudes."""

    factor: float

    def observe(self, x, how):
        del how
        return {"absmax": self.factor * jnp.abs(x).mean(keepdims=True)}


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest range that a batch had, kept under a name of its own."""

    def init(self, calibration):
        empty = {f"largest_{end}": jnp.zeros_like(x) for end, x in calibration.items()}
        return {"count": jnp.zeros((), jnp.int32), **empty}

    def update(self, state, calibration):
        ends = {
            f"largest_{end}": jnp.maximum(state[f"largest_{end}"], x)
            for end, x in calibration.items()
        }
        return {"count": state["count"] + 1, **ends}

    def merge(self, a, b):
        ends = {key: jnp.maximum(a[key], b[key]) for key in a if key != "count"}
        return {"count": a["count"] + b["count"], **ends}

    def calibration(self, state):
        names = (key for key in state if key.startswith("largest_"))
        return {key.removeprefix("largest_"): state[key] for key in names}


def test_an_observer_and_an_averaging():
    observer, averaging = MeanMagnitude(3.0), Largest()
    assert isinstance(observer, calib.RangeObserver)
    rules = [QuantizationRule(**STATIC, act_observer=observer, act_averaging=averaging)]
    want = max(3 * np.abs(x).mean(dtype=np.float64) for x in BATCHES)

    calibrator = calib.Calibrator(rules)
    eval_step = calibrator.wrap(jax.jit(lambda p, x: MODEL.apply({"params": p}, x)))
    state = TrainState.create(
        apply_fn=MODEL.apply, params=PARAMS, tx=optax.set_to_zero()
    )
    state = attach(state, rules, BATCHES[0])

    def train_step(state, x):
        grads = jax.grad(lambda p: state.apply_fn({"params": p}, x).sum())(state.params)
        return state.apply_gradients(grads=grads)

    step = jax.jit(wrap_train_step(train_step, rules))
    for x in BATCHES:
        eval_step(PARAMS, x)
        state = step(state, x)
    for found in (calibrator.quant_stats, ranges(state, rules)):
        model, params = ptq.quantize(
            MODEL, PARAMS, rules, BATCHES[0], quant_stats=found
        )
        scale = params["dot_general0_lhs_scale"].array
        np.testing.assert_allclose(scale, [[want / 127.5]], 1e-5)
        assert np.isfinite(model.apply({"params": params}, BATCHES[0])).all()
