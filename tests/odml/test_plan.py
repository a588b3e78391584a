"""Which tensors have a range, what it is called, and what stays in float."""

import warnings

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

import qwix_train
from qwix_train import QuantizationRule, odml, quantize_model
from qwix_train.frontends.model import trace_function
from qwix_train.odml.plan import TensorPlan
from qwix_train.odml.planner import make_odml_plan
from tests import models, reference_process
from tests.odml import parity

INT8 = QuantizationRule(weight_qtype="int8", act_qtype="int8")
X = models.normal(2, 6, seed=0)
IMAGE = models.normal(2, 4, 4, 3, seed=1)


def module(call):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, *args):
            return call(self, *args)

    return Model()


def plan_of(call, *inputs, rules=(INT8,), **kwargs):
    model = call if isinstance(call, nn.Module) else module(call)
    inputs = inputs or (X,)
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    traced = trace_function(model.apply, (variables, *inputs), {})
    return make_odml_plan(traced, rules, **kwargs)


def names(plan):
    return [tensor.name for tensor in plan.tensors]


# Names, as `qwix` has them.


# What `qwix` keeps beside, by case.
ONLY_THEIRS = {
    # Ranges that are fixed: of a softmax, a tanh, a sigmoid.
    "mlp": {"Dense_2/dot_general0_lhs", "final_output0"},
    "gates": {"silu0_sigmoid"},
    # `jnp.einsum` swaps the operands of this product, and we name them as it does.
    "attention": {"einsum1_rhs"},
    # Subtraction of a constant from a product, which `qwix` does not fuse.
    "concat": {"subtract0_lhs"},
}


# One test, so that `qwix` runs once, in a process that its patches cannot leave.
@pytest.mark.slow
def test_ranges_are_called_as_in_qwix_and_are_the_same(tmp_path):
    reference_process.run("tests.odml.parity", tmp_path / "reference.npz")
    with np.load(tmp_path / "reference.npz") as results:
        reference = dict(results)
    for name in parity.CASES:
        ours = parity.collect(qwix_train, name)
        theirs = {
            key.split("|")[1]: value
            for key, value in reference.items()
            if key.split("|")[0] == name
        }
        ends = {key for key in ours if "sum_of" in key}
        assert {k for k in theirs if "sum_of" in k} - ends == {
            f"{path}/sum_of_{end}"
            for path in ONLY_THEIRS.get(name, ())
            for end in ("min", "max")
        }, name
        assert ends <= theirs.keys(), name
        for key in ends:
            path, _, _ = key.rpartition("/")
            if path == "einsum1_lhs" and name == "attention":
                continue  # the other operand
            width = theirs[f"{path}/sum_of_max"] - theirs[f"{path}/sum_of_min"]
            np.testing.assert_allclose(
                ours[key], theirs[key], 0, 0.03 * width.item(), err_msg=f"{name} {key}"
            )
            assert ours[f"{path}/count"] == theirs[f"{path}/count"] == 1


# Which tensors have a range.


def test_fused_operations_have_one_range():
    plan = plan_of(lambda self, x: nn.relu(nn.Dense(4)(x)))
    assert names(plan) == ["Dense_0/dot_general0_lhs", "final_output0"]
    product, add, relu = plan.ops
    assert plan.first_of(add) is plan.first_of(relu) is product
    assert plan.end_of(product) is plan.graph.outputs[0]


def test_what_moves_elements_shares_the_range():
    def fn(self, x):
        y = x.reshape(x.shape[0], -1)[:, ::2].T
        return jnp.exp(y)

    plan = plan_of(fn, IMAGE)
    assert names(plan) == ["exp0", "final_output0"]
    moved = [n.node.out for n in plan.nodes if n.name != "exp"]
    assert len(moved) >= 3
    assert {plan.range_of(value) for value in moved} == {plan.tensors[0]}


def test_pooling_and_clips_share_the_range():
    def fn(self, x):
        x = nn.max_pool(x, (2, 2), (2, 2))
        return jnp.clip(nn.avg_pool(x, (2, 2)), -0.3, 0.4)

    plan = plan_of(fn, IMAGE)
    assert names(plan) == ["max_pool0"]
    assert plan.range_of(plan.graph.outputs[0]) is plan.tensors[0]


def test_fixed_ranges_are_those_of_litert():
    def fn(self, x):
        return nn.softmax(x), nn.tanh(x), nn.sigmoid(x), nn.log_softmax(x)

    plan = plan_of(fn)
    assert names(plan) == ["softmax0", *(f"final_output{i}" for i in range(4))]
    fixed = [(t.scale, t.zero_point) for t in plan.tensors[1:]]
    # https://ai.google.dev/edge/litert/conversion/tensorflow/quantization
    assert fixed == [(1 / 256, -128), (1 / 128, 0), (1 / 256, -128), (1 / 16, 127)]
    assert [t.measured for t in plan.tensors] == [True, *[False] * 4]


def test_ranges_of_inputs_and_outputs_that_are_given():
    plan = plan_of(
        lambda self, x: (nn.Dense(3)(x), nn.softmax(x)),
        fixed_range_for_inputs=(0, 1),
        fixed_range_for_outputs=(-2, 2),
    )
    methods = {t.name: t.how.calibration_method for t in plan.tensors}
    assert methods["Dense_0/dot_general0_lhs"] == "fixed,0,1"
    assert methods["final_output0"] == "fixed,-2,2"
    assert plan.tensors[-1].scale == 1 / 256  # LiteRT knows no other
    assert plan.measured == ()


def test_several_outputs_and_integers_among_them():
    def fn(self, x):
        return {"a": nn.Dense(2)(x), "b": jnp.argmax(x, -1), "c": nn.Dense(3)(x)}

    plan = plan_of(fn)
    assert names(plan)[1:] == ["final_output0", "final_output1"]


def test_a_method_gives_its_outputs_its_name():
    class Model(nn.Module):
        def setup(self):
            self.layer = nn.Dense(2)

        def encode(self, x):
            return self.layer(x)

        def __call__(self, x):
            return self.encode(x)

    variables = jax.jit(Model().init)(jax.random.key(0), X)
    traced = trace_function(Model().apply, (variables, X), {"method": "encode"})
    assert names(make_odml_plan(traced, [INT8]))[-1] == "encode_output0"


# Ties.


def test_inputs_of_a_concatenation_take_over_its_range():
    def fn(self, x):
        return jnp.concatenate([nn.relu(nn.Dense(3)(x)), nn.Dense(2)(x)], -1) * 2

    plan = plan_of(fn)
    assert names(plan) == [
        "Dense_0/dot_general0_lhs",
        "multiply0_lhs",
        "final_output0",
    ]


def test_an_input_of_a_concatenation_that_others_read_keeps_its_range():
    def fn(self, x):
        y = nn.Dense(3)(x)
        return jnp.concatenate([y, jnp.exp(y), nn.softmax(x)], -1)

    plan = plan_of(fn)
    # A softmax has no other range, and `exp` none but that of the concatenation.
    assert set(names(plan)) == {
        "Dense_0/dot_general0_lhs",
        "exp0",
        "concatenate0_input2",
        "final_output0",
    }
    assert plan.range_of(plan.graph.outputs[0]).name == "final_output0"


def test_a_range_knows_what_stands_for_minus_infinity():
    def fn(self, x, mask):
        return nn.softmax(jnp.where(mask, x, -1e9)), jnp.where(mask, 0.0, x) * 2

    plan = plan_of(fn, X, X > 0)
    masked = {t.name: t.mask for t in plan.tensors}
    assert masked["softmax0"]
    assert not masked["multiply0_lhs"]


def test_a_table_of_embeddings_is_the_range_of_what_is_looked_up():
    plan = plan_of(lambda self, i: nn.Embed(7, 3)(i) * 2, jnp.arange(4))
    (lookup,) = [n for n in plan.nodes if n.name == "take"]
    assert lookup.constants == (0,)
    table = plan.range_of(lookup.node.out)
    assert not isinstance(table, TensorPlan) and table.static
    assert names(plan) == ["final_output0"]


def test_an_activation_function_names_a_range_only_if_nothing_else_does():
    plan = plan_of(lambda self, x: nn.relu(x) + jnp.exp(x))
    assert names(plan)[0] == "exp0"
    plan = plan_of(lambda self, x: nn.relu(x))
    assert names(plan) == ["relu0", "final_output0"]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "layer", [nn.softmax, nn.LayerNorm(), nn.gelu, nn.log_softmax, nn.relu6]
)
def test_a_model_in_bfloat16_has_the_ranges_of_one_in_float32(layer):
    def plan(dtype):
        if isinstance(layer, nn.Module):
            return plan_of(lambda self, x: nn.LayerNorm(dtype=dtype)(x))
        return plan_of(lambda self, x: layer(nn.Dense(4, dtype=dtype)(x)))

    assert names(plan(jnp.bfloat16)) == names(plan(jnp.float32))


# Rules.


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5, name="first")(x))
        return nn.Dense(3, name="second")(jnp.exp(x))


def test_a_module_left_in_float():
    rules = [QuantizationRule(module_path="second"), INT8]
    plan = plan_of(Two(), rules=rules)
    second = next(n for n in plan.ops if n.module_path == "second")
    assert not second.quantized and second.weight is None
    assert second.reason == "the rule sets no weight_qtype"
    assert second.rule_index == 0
    # Its input was quantized by what computes it; its output is by nothing.
    assert names(plan) == ["first/dot_general0_lhs", "exp0", "exp0_output"]
    assert plan.range_of(plan.graph.outputs[0]) is None


def test_an_operation_that_no_rule_matches():
    rules = [QuantizationRule(module_path="first", weight_qtype="int8")]
    plan = plan_of(Two(), rules=rules)
    reasons = {n.where: n.reason for n in plan.ops}
    assert reasons["second/dot_general0"] == "no rule matches"


def test_weights_alone():
    plan = plan_of(Two(), rules=[QuantizationRule(weight_qtype="int4")])
    assert plan.tensors == ()
    products = [n for n in plan.ops if n.name == "dot_general"]
    assert [n.weight for n in products] == [1, 1]
    assert not any(n.in_integers or n.dynamic for n in plan.ops)
    assert [n.where for n in plan.quantized_ops] == [n.where for n in products]
    types = [r["weight_qtype"] for r in plan.records() if r["weights"]]
    assert types == ["int4_narrow"] * 2


def test_activations_that_are_quantized_when_they_run():
    rule = QuantizationRule(
        weight_qtype="int8", act_qtype="int8", act_static_scale=False
    )
    plan = plan_of(Two(), rules=[rule])
    assert plan.tensors == ()
    assert [n.dynamic for n in plan.ops if n.name == "dot_general"] == [True, True]
    acts = {r["act_granularity"] for r in plan.records() if r["act_qtype"]}
    assert acts == {"channel 0"} and " static" not in str(plan)


def test_one_operation_by_its_id():
    rules = [QuantizationRule(op_names=("exp0",)), INT8]
    plan = plan_of(Two(), rules=rules)
    assert [n.quantized for n in plan.ops if n.name == "exp"] == [False]
    assert plan.unsupported == ()


def test_a_plan_says_what_happens_to_every_operation():
    plan = plan_of(Two())
    records = plan.records()
    assert [r["op"] for r in records] == [
        "dot_general0",
        "add0",
        "relu0",
        "exp0",
        "dot_general0",
        "add0",
    ]
    first = records[0]
    assert first == {
        "module_path": "first",
        "op": "dot_general0",
        "shapes": ((2, 6), (6, 5)),
        "weights": ("first/kernel",),
        "weight_qtype": "int8_narrow",
        "weight_granularity": "channel 1",
        "act_qtype": "int8",
        "act_granularity": "tensor",
        "act_static_scale": True,
        "rule": 0,
        "quantized": True,
        "range": "exp0",
        "reason": "",
        "product": "",
    }
    assert records[1]["reason"] == records[2]["reason"] == "part of first/dot_general0"
    lines = str(plan).splitlines()
    assert lines[0].split()[:2] == ["module", "op"] and "range" in lines[0]
    assert "exp0" in lines[2] and "6 of 6 ops quantized" in lines[-1]
    assert "0 of 0 ops" in str(plan_of(lambda self, x: x))


# What LiteRT cannot do.


class Unsupported(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.cumsum(nn.Dense(3, name="layer")(x), axis=1)


def test_the_strict_error_says_what_where_and_how_to_go_on():
    variables = jax.jit(Unsupported().init)(jax.random.key(0), X)
    quantized = quantize_model(
        Unsupported(), odml.OdmlQatProvider([INT8], quant_stats={})
    )
    with pytest.raises(ValueError) as error:
        quantized.apply(variables, X)
    message = str(error.value)
    for part in (
        "cumsum0 (cumsum of (2, 3), in the model)",
        "matches rule 0",
        "LiteRT has no integer form of it (it reads floats)",
        "strict=False",
        "no weight_qtype",
    ):
        assert part in message
    # A rule before it leaves it in float.
    with pytest.raises(ValueError, match="erfc?0.*in module 'inner'.*approximate=True"):

        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.gelu(x, approximate=False)

        model = module(lambda self, x: Inner(name="inner")(x))
        quantize_model(model, odml.OdmlQatProvider([INT8])).init(jax.random.key(0), X)


@pytest.mark.slow
def test_a_provider_that_is_not_strict_warns_once():
    provider = odml.OdmlQatProvider([INT8], strict=False)
    quantized = quantize_model(Unsupported(), provider)
    with pytest.warns(UserWarning, match="cumsum0.*cannot be quantized"):
        variables = quantized.init(jax.random.key(0), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = quantized.apply(variables, X, mutable=["quant_stats"])[0]
    # In float, of a quantized product.
    plan = plan_of(Unsupported())
    assert names(plan) == ["layer/dot_general0_lhs", "layer/dot_general0_output"]
    variables = {"params": variables["params"]}
    np.testing.assert_allclose(out, Unsupported().apply(variables, X), atol=0.1)


def test_the_message_of_rules_that_match_nothing_lists_the_modules():
    rules = [QuantizationRule(module_path="third", weight_qtype="int8")]
    plan = plan_of(Two(), rules=rules)
    message = plan.no_match_message()
    assert "No rule quantizes an op" in message
    assert "'first'" in message and "'second'" in message
    with pytest.raises(ValueError, match="No rule quantizes an op"):
        quantize_model(Two(), odml.OdmlQatProvider(rules)).apply(
            jax.jit(Two().init)(jax.random.key(0), X), X
        )


@pytest.mark.parametrize(
    ("call", "shape", "reason"),
    [
        (lambda self, x: nn.Conv(2, (2, 2, 2))(x), (1, 3, 3, 3, 2), "over 3 axes"),
        (
            lambda self, x: jax.lax.conv(x, 2.0 * x, (1, 1), "SAME"),
            (2, 2, 3, 3),
            "its kernel is computed from the inputs",
        ),
    ],
)
def test_convolutions_that_litert_does_not_have(call, shape, reason):
    plan = plan_of(call, jnp.ones(shape))
    (conv,) = (n for n in plan.ops if n.name == "conv_general_dilated")
    assert conv.unsupported and reason in conv.reason
