"""What rules do to a model, and what they say about it."""

import re

import jax
import numpy as np
import pytest
from flax import errors
from flax import linen as nn
from jax import numpy as jnp

from qwix_train import as_model, wrap_eval_step
from qwix_train.frontends.model import quantize_fn
from qwix_train.frontends.plan_of import plan
from qwix_train.planning.rules import QuantizationRule
from qwix_train.qat import QtProvider
from qwix_train.trace.scopes import module_scope
from tests import models

NO_RULE = "no rule matches"
INT8 = QuantizationRule(weight_qtype="int8", act_qtype="int8")


def rule(**fields):
    return QuantizationRule(**{"weight_qtype": "int8", **fields})


def data(*shape):
    return models.normal(*shape)


def two_layers(p, x):
    with module_scope("encoder/Dense_0"):
        x = x @ p["a"]
    with module_scope("head"):
        return jnp.einsum("bi,io->bo", x, p["b"])


PARAMS = {"a": data(8, 6), "b": data(6, 4), "bias": data(4)}
X = data(2, 8)


def test_records():
    rules = [rule(module_path="encoder/.*", act_qtype="int8"), rule(weight_qtype=None)]
    assert plan(two_layers, rules, PARAMS, X).records() == [
        {
            "module_path": "encoder/Dense_0",
            "op": "dot_general0",
            "shapes": ((2, 8), (8, 6)),
            "weights": ("a",),
            "weight_qtype": "int8",
            "weight_granularity": "channel 1",
            "act_qtype": "int8",
            "act_granularity": "channel 0",
            "act_static_scale": False,
            "rule": 0,
            "quantized": True,
            "product": "",
            "reason": "",
        },
        {
            "module_path": "head",
            "op": "einsum0",
            "shapes": ((2, 6), (6, 4)),
            "weights": (),
            "weight_qtype": None,
            "weight_granularity": None,
            "act_qtype": None,
            "act_granularity": None,
            "act_static_scale": False,
            "rule": 1,
            "quantized": False,
            "product": "",
            "reason": "the rule sets no weight_qtype",
        },
    ]


def test_sizes():
    rules = [
        rule(module_path="encoder/.*", weight_qtype="int4", tile_size=4),
        rule(module_path="head", weight_calibration_method="minmax"),
    ]
    found = plan(two_layers, rules, PARAMS, X)
    assert found.float_bytes == 4 * (48 + 24 + 4)
    # 48 codes of 4 bits and 2 x 6 scales; 24 codes of 8 bits, 4 scales and 4 zero
    # points; the bias.
    a, b, bias = 24 + 4 * 12, 24 + 4 * 4 + 4, 16
    assert {"/".join(k): v.quantized_bytes for k, v in found.params.items()} == {
        "a": a,
        "b": b,
        "bias": bias,
    }
    assert found.quantized_bytes == a + b + bias


def test_size_of_a_fixed_range():
    found = plan(two_layers, [rule(weight_calibration_method="fixed,-1,2")], PARAMS, X)
    # One scale and one zero point for the whole array.
    assert found.params[("a",)].quantized_bytes == 48 + 4 + 1


def test_table():
    rules = [
        rule(module_path="encoder/.*", act_qtype="int8", tile_size=4),
        rule(module_path="encoder/Dense_0"),
        rule(module_path="heads"),
    ]
    found = str(plan(two_layers, rules, PARAMS, X)).splitlines()
    # Columns are as wide as their widest cell, two spaces apart.
    assert [re.split(" {2,}", line) for line in found[:4]] == [
        ["module", "op", "shapes", "weight", "type", "act", "rule", "note"],
        ["-" * max(map(len, found[:4]))],
        [
            "encoder/Dense_0",
            "dot_general0",
            "(2,8) x (8,6)",
            "a",
            "int8 channel 1 tile 0:4",
            "int8 channel 0 tile 1:4",
            "0",
        ],
        ["head", "einsum0", "(2,6) x (6,4)", "-", "float", "float", "-", NO_RULE],
    ]
    assert (
        found[0].index("shapes") == found[2].index("(2,8)") == found[3].index("(2,6)")
    )
    assert found[4:] == [
        "",
        "1 of 2 ops quantized; params 304 B -> 208 B (1.46x smaller)",
        "params of two axes or more that stay in float: b",
        "rule 1 (module_path='encoder/Dense_0') has no effect: rule 0 came first for "
        "all that it matches",
        "rule 2 (module_path='heads') matches no op; module paths that exist: 'head'",
    ]


def test_unused_rules():
    rules = [INT8, INT8, rule(module_path="encoder/Dense_1"), rule(module_path="x")]
    found = plan(two_layers, rules, PARAMS, X)
    assert found.unused_rules == (1, 2, 3)
    assert found.shadowed_by(1) == (0,) and found.shadowed_by(2) == ()
    assert found.near_misses(2) == ["encoder/Dense_0"]
    assert found.near_misses(3) == []


def test_no_match_message():
    found = plan(two_layers, [rule(module_path="nope")], PARAMS, X)
    message = found.no_match_message()
    assert "'encoder/Dense_0': dot_general0" in message and "'head': einsum0" in message
    with pytest.raises(ValueError, match="No rule quantizes an op"):
        quantize_fn(two_layers, QtProvider([rule(module_path="nope")]))(PARAMS, X)


def test_no_match_message_says_why_a_match_had_no_effect():
    def fn(p, x):
        return x @ (p["a"] - p["a"].mean(0))

    message = plan(fn, [INT8], PARAMS, X).no_match_message()
    assert "dot_general0: an operand is computed from a by sub" in message


# Products without a weight.


@pytest.mark.parametrize(
    "which, reason",
    [
        (INT8, ""),
        (rule(act_qtype="int8", act_act=False), "sets act_act=False"),
        (rule(), "sets no act_qtype"),
    ],
)
def test_products_without_a_weight(which, reason):
    def fn(p, x):
        y = x @ p["a"]
        return y @ y.T

    first, second = plan(fn, [which], PARAMS, X).ops
    assert first.quantized and second.quantized == (reason == "")
    assert reason in second.reason
    assert (second.activations[0] is not None) == (reason == "")


# Tiles.


@pytest.mark.parametrize(
    "tile, granularity",
    [(4, "channel 1 tile 0:4"), (0.5, "channel 1 tile 0:4"), (8, "channel 1")],
)
def test_tiles(tile, granularity):
    def fn(p, x):
        return x @ p["a"]

    which = rule(tile_size=tile)
    (record,) = plan(fn, [which], PARAMS, X).records()
    assert record["weight_granularity"] == granularity
    length = 8 if tile == 8 else 4
    blocks = np.asarray(PARAMS["a"], np.float64).reshape(-1, length, 6)
    scale = np.abs(blocks).max(1, keepdims=True) / 127.5
    fq = np.clip(np.round(blocks / scale), -127.5, 127) * scale
    actual = quantize_fn(fn, QtProvider([which]))(PARAMS, X)
    # A negative maximum is a tie between two codes, half a step away at most.
    np.testing.assert_allclose(
        actual, X @ fq.reshape(8, 6), atol=float(np.abs(X).sum(1).max() * scale.max())
    )
    weight = jnp.asarray(blocks, jnp.float32)
    codes = np.asarray(quantize_fn(fn, QtProvider([which]))(PARAMS, jnp.eye(8)))
    codes = codes.reshape(weight.shape) / scale
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
    assert np.abs(codes).max() >= 127


def test_a_tile_through_a_merged_axis():
    def fn(p, x):
        return x @ p["w"].reshape(8, 5)

    params = {"w": data(2, 4, 5)}
    (record,) = plan(fn, [rule(tile_size=2)], params, X).records()
    assert record["weight_granularity"] == "channel 2 tile 0:1 tile 1:2"
    (record,) = plan(fn, [rule(tile_size=4)], params, X).records()
    assert record["weight_granularity"] == "channel 2 tile 0:1"
    with pytest.raises(ValueError, match=r"dot_general0, param 'w': a tile of 6"):
        plan(fn, [rule(tile_size=6, pad_tiles=True)], params, X)


@pytest.mark.parametrize("act", [None, "int8"])
def test_a_tile_that_does_not_divide_names_all(act):
    with pytest.raises(ValueError) as error:
        plan(two_layers, [rule(tile_size=3, act_qtype=act)], PARAMS, X)
    assert str(error.value).startswith(
        "encoder/Dense_0/dot_general0, param 'a': a tile of 3 does not divide axis 0, "
        "of length 8, of the shape (8, 6)."
    )
    found = plan(
        two_layers, [rule(tile_size=3, act_qtype=act, pad_tiles=True)], PARAMS, X
    )
    how = found.params[("a",)].how
    assert how is not None and how.scale_shape((8, 6)) == (3, 6)


def test_a_tile_that_does_not_divide_a_product_of_activations_names_act_act():
    def attention(p, x):
        return x @ x.T

    rules = [rule(tile_size=3, act_qtype="int8")]
    with pytest.raises(ValueError, match=r"dot_general0: a tile of 3.*act_act=False"):
        plan(attention, rules, PARAMS, X)


def test_a_tile_of_a_slice_must_divide_the_slice():
    def fn(p, x):
        return x[:, :3] @ p["a"][:3]

    with pytest.raises(ValueError, match=r"param 'a': a tile of 4 does not divide"):
        plan(fn, [rule(tile_size=4)], PARAMS, X)


def test_tiles_and_convolutions():
    def fn(p, x):
        return jax.lax.conv(x, p["w"], (1, 1), "SAME")

    params, x = {"w": data(4, 2, 3, 3)}, data(1, 2, 5, 5)
    with pytest.raises(ValueError, match="conv_general_dilated0: rule 0 gives each 4"):
        plan(fn, [rule(tile_size=4)], params, x)
    first = rule(op_names=["conv_general_dilated"])
    (record,) = plan(fn, [first, rule(tile_size=4)], params, x).records()
    assert record["weight_granularity"] == "channel 0"


# One param, several ops.


def test_a_param_used_twice():
    def fn(p, x):
        with module_scope("first"):
            x = x @ p["w"]
        with module_scope("second"):
            return x @ p["w"]

    found = plan(fn, [rule()], {"w": data(8, 8)}, X)
    assert [op.reason for op in found.ops] == ["", ""]
    rules = [rule(module_path="first"), rule(weight_qtype="int4")]
    with pytest.raises(ValueError, match="'w' is asked .* two ways") as error:
        plan(fn, rules, {"w": data(8, 8)}, X)
    for part in ("rule 0 at first/dot_general0", "rule 1 at second/dot_general0"):
        assert part in str(error.value)


def test_a_param_used_along_two_layouts():
    def fn(p, x):
        return x @ p["w"] @ p["w"].T

    params = {"w": data(8, 5)}
    found = plan(fn, [rule()], params, X)
    assert [op.reason for op in found.ops] == [
        "",
        "its weight is quantized along the axes of dot_general0",
    ]
    how = found.params[("w",)].how
    assert how is not None and how.channelwise_axes == (1,)


def test_an_op_in_float_that_reads_a_quantized_param_says_so():
    def fn(p, x):
        with module_scope("a"):
            y = x @ p["w"]
        with module_scope("b"):
            return y + x @ p["w"]

    found = plan(fn, [rule(module_path="a")], {"w": data(8, 5)}, X)
    assert found.ops[1].reason == (
        "no rule matches; it reads w, which is quantized because of a/dot_general0"
    )


def test_how_a_slice_is_quantized():
    found = plan(
        lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0],
        [rule(tile_size=4)],
        {"w": data(3, 8, 8)},
        X,
    )
    param = found.params[("w",)]
    assert param.how is not None
    of_slice = param.how.of_slice()
    assert of_slice is not None
    assert param.how.channelwise_axes == (0, 2)
    assert dict(param.how.tiled_axes) == {1: 4}
    assert of_slice.channelwise_axes == (1,)
    assert dict(of_slice.tiled_axes) == {0: 4}


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda p, x: jnp.arange(4).reshape(2, 2) @ jnp.ones((2, 2), int), "int32"),
        (lambda p, x: jnp.ones((2, 2)) @ jnp.ones((2, 2)), "constants"),
    ],
)
def test_ops_left_in_float_say_why(function, reason):
    (op,) = plan(function, [INT8], PARAMS, X).ops
    assert not op.quantized and reason in op.reason and not op.unsupported


def test_a_static_scale_is_one_for_the_whole_activation():
    rules = [rule(act_qtype="int8", act_static_scale=True)]
    made = plan(two_layers, rules, PARAMS, X)
    for op in made.ops:
        how = op.activations[0]
        assert op.static and how is not None and how.scale_shape((4, 8)) == (1, 1)
    assert "int8 tensor static" in str(made)
    with pytest.raises(ValueError, match="Collect them with calib.Calibrator"):
        quantize_fn(two_layers, QtProvider(rules))(PARAMS, X)


def test_a_matrix_that_stays_in_float_is_listed():
    def masked(p, x, mask):
        return (x @ (p["a"] * mask)) @ p["b"]

    table = str(plan(masked, [rule()], PARAMS, X, jnp.ones((8, 6))))
    assert "params of two axes or more that stay in float: a\n" in table + "\n"


def test_stacked_biases_are_no_matrices():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.LayerNorm()(nn.Dense(8)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}}
            x, _ = nn.scan(Layer, length=3, **axes)()(x, None)
            return x @ (self.param("masked", nn.initializers.ones, (8, 2)) * x[0, 0])

    rules = [rule(module_path=".*Dense_0")]
    found = str(plan(Stack(), rules, X))
    assert "params of two axes or more that stay in float: masked\n" in found + "\n"


def test_long_notes_stand_below_the_table():
    @jax.custom_vjp
    def opaque(x, w):
        return x @ w

    opaque.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, g))
    table = plan(lambda p, x: opaque(opaque(x, p), p), [rule()], jnp.eye(8), X)
    note = table.records()[0]["reason"]
    lines = str(table).splitlines()
    width = len(lines[1])
    assert len(note) > 80 and width < 120
    assert [line.split()[-1] for line in lines[2:4]] == ["(1)", "(1)"]
    below = str(table).partition("\n\n")[2].partition("\n\n")[0]
    assert below.replace("\n", " ") == f"(1) {note}"
    assert all(len(line) <= width for line in below.splitlines())


def test_activations_of_16_bits_are_for_litert():
    with pytest.raises(ValueError, match=r"Rule 0 \(act_qtype='int16'\).*OdmlQat"):
        plan(two_layers, [rule(act_qtype="int16")], PARAMS, X)


def test_inputs_that_do_not_fit_the_variables_are_refused():
    variables = nn.Dense(3).init(jax.random.key(0), X)
    with pytest.raises(errors.ScopeParamShapeError, match="kernel"):
        plan(nn.Dense(3), [rule()], data(2, 7), variables=variables)
    with pytest.raises(TypeError, match="contracting dimensions"):
        plan(two_layers, [rule()], PARAMS, data(2, 7))


TOKENS = np.array([[1, 0, 2], [3, 3, 1]])


def attend(params, tokens):
    """A lookup, a projection, and a product of two activations."""
    x = params["table"][tokens]
    scores = jnp.einsum("bqi,bki->bqk", x @ params["query"], x)
    return jnp.einsum("bqk,bki->bqi", scores, x)


LANGUAGE = {"table": PARAMS["b"], "query": data(4, 4)}
LOOKUPS = [
    rule(op_names=("gather",), act_qtype=None),
    rule(act_qtype="int8", op_names=("dot_general", "einsum")),
]


def test_a_plan_of_a_data_loaders_tokens_is_that_of_the_jitted_step():
    plans = []

    class Recording(QtProvider):
        def plan(self, traced):
            plans.append(super().plan(traced))
            return plans[-1]

    jax.eval_shape(quantize_fn(attend, Recording(LOOKUPS)), LANGUAGE, TOKENS)
    found = plan(attend, LOOKUPS, LANGUAGE, TOKENS)
    assert found.records() == plans[0].records()
    assert [op["op"] for op in found.records() if op["quantized"]] == [
        "gather0",
        "dot_general0",
        "einsum0",
        "einsum1",
    ]


def test_an_eager_step_with_a_data_loaders_tokens_is_the_jitted_one():
    step = wrap_eval_step(as_model(attend), LOOKUPS)
    got, want = step(LANGUAGE, TOKENS), jax.jit(step)(LANGUAGE, TOKENS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.abs(got - attend(LANGUAGE, TOKENS)).max() > 1e-3


def test_scales_beside_params_are_not_listed_as_matrices():
    rules = [
        rule(
            weight_qtype="int4",
            weight_calibration_method="lsq",
            act_qtype="int8",
            act_calibration_method="lsq",
        )
    ]
    params = {
        "w": data(4, 2),
        "w_scale": jnp.ones((1, 2)),
        "dot_general0_lhs_scale": jnp.ones((1, 1)),
        "other": data(2, 2),
    }
    found = str(
        plan(lambda p, x: x @ p["w"] + p["other"][0], rules, params, data(3, 4))
    )
    assert "params of two axes or more that stay in float: other\n" in found + "\n"
