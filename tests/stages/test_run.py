"""The runner: stages of operands and params, of modes from inside and from outside."""

import flax.struct
import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qwix_train import LoraRule, QuantizationProvider, QuantizationRule, quantize_fn
from qwix_train.lora import LoraProvider
from qwix_train.stages.run import CallStages, OpStages
from qwix_train.stages.stage import Constant, ParamStage, Stage
from qwix_train.trace import function
from tests import models

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(3, 4)).astype(np.float32)
RULES = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]


def weights(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


@flax.struct.dataclass
class Plus(Stage):
    """Adds an array, and a number that is the same for all layers."""

    added: jax.Array
    number: Constant = flax.struct.field(pytree_node=False)

    def apply(self, x, at=None):
        CALLS.append(at)
        return x + self.added + self.number.value

    def of_slice(self):
        return Plus(self.added, self.number)


CALLS: list[object] = []
HALF = Constant(0.5)


class Chosen(QuantizationProvider):
    """A mode from outside: every product reads its input, or its param, with stages."""

    def __init__(self, of_input=(), of_param=(), **kwargs):
        super().__init__(RULES, **kwargs)
        self.of_input, self.of_param = of_input, of_param
        CALLS.clear()

    def stages(self, traced, plan):
        params = {path: self.of_param for path in plan.params}
        return CallStages(
            params,
            {op.op.key: OpStages(op.op, (self.of_input, ())) for op in plan.ops},
        )


def three(params, x):
    x = jnp.tanh(x)
    return sum(x @ params[name] for name in "qkv")


QKV = {name: weights(4, 2) for name in "qkv"}


def test_an_array_goes_through_equal_stages_once():
    one = jnp.ones(())
    for stages, number in ((Plus(one, HALF),), 1), ((Plus(one, HALF),) * 2, 2):
        out = quantize_fn(three, Chosen(stages))(QKV, X)
        assert len(CALLS) == number
        models.assert_close(
            out, sum((np.tanh(X) + 1.5 * number) @ QKV[name] for name in "qkv")
        )


def test_stages_with_other_arrays_or_fields_are_not_equal():
    first = Plus(jnp.ones(()), HALF)

    class EachItsOwn(Chosen):
        def stages(self, traced, plan):
            own = first, Plus(jnp.ones(()), HALF), Plus(first.added, Constant(0.5))
            ops = {
                op.op.key: OpStages(op.op, ((stage,), ()))
                for op, stage in zip(plan.ops, own, strict=True)
            }
            return CallStages({}, ops)

    quantize_fn(three, EachItsOwn())(QKV, X)
    assert len(CALLS) == 3


def test_what_a_loop_reads_from_outside_has_its_stages_in_the_loop():
    def loop(params, x):
        outside = x @ params["q"]

        def body(carry, _):
            return carry + x @ params["k"] + x @ params["v"], None

        return jax.lax.scan(body, outside, length=2)[0]

    model = quantize_fn(loop, Chosen((Plus(jnp.ones(()), HALF),)))
    want = (X + 1.5) @ (QKV["q"] + 2 * QKV["k"] + 2 * QKV["v"])
    models.assert_close(jax.jit(model)(QKV, X), want)


def test_layers_of_a_scan_have_their_part_of_a_stage():
    def layers(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    w, of_input, of_param = (
        weights(2, 4, 4),
        np.array([1, 2], np.float32),
        np.array([3, 4], np.float32),
    )
    for jitted in (False, True):
        mode = Chosen(
            (Plus(jax.device_put(of_input), HALF),),
            (Plus(jax.device_put(of_param), HALF),),
        )
        model = quantize_fn(layers, mode)
        want = X
        for i in range(2):
            want = (want + of_input[i] + 0.5) @ (w[i] + of_param[i] + 0.5)
        models.assert_close((jax.jit(model) if jitted else model)({"w": w}, X), want)


def test_a_param_is_changed_wherever_it_is_read():
    class Double(ParamStage):
        def on_param(self, value):
            return 2 * value

    def twice(params, x):
        return x @ params["w"], params["w"].sum()

    mode = Chosen(of_param=(Double(), Plus(jnp.ones(()), HALF)))
    w = weights(4, 2)
    out = quantize_fn(twice, mode)({"w": w}, X)
    models.assert_close(out, (X @ (2 * w + 1.5), (2 * w + 1.5).sum()))


def test_a_mode_without_stages_says_so():
    class Nothing(QuantizationProvider):
        pass

    with pytest.raises(NotImplementedError, match=r"Nothing says in neither stages\("):
        quantize_fn(three, Nothing(RULES))(QKV, X)


def test_adapters_are_added_to_the_stages_of_any_mode():
    w, a, b = weights(4, 2), weights(4, 1), weights(1, 2)
    lora = LoraProvider([LoraRule(rank=1, alpha=1.0)])
    arrays = ({"w": w, "w_lora_a": a, "w_lora_b": b}, X)
    traced = function.trace(lambda p, x: x @ p["w"], arrays, function.param_path)
    plan = lora.plan(traced)
    adapted = lora.adapt(traced, plan)
    mode = Chosen((Plus(jnp.ones(()), HALF),), (Plus(jnp.ones(()), HALF),))
    out = mode.transform(adapted, mode.plan(adapted))
    # The adapter meets the input as it is.
    models.assert_close(out, (X + 1.5) @ (w + 1.5) + X @ a @ b)
    with pytest.raises(TypeError, match="have adapters"):
        adapted.run([], lambda *args: None, lambda param: None)
