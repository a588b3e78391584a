"""A quantized model computes what QAT trained, and behaves as the float model does."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.extend
import numpy as np
import pytest
from jax import export
from jax import numpy as jnp

import qwix_train
from qwix_train import (
    PtqProvider,
    QtProvider,
    QuantizationRule,
    dequantize,
    ptq,
    quantize_fn,
    quantize_model,
)
from tests import models, spellings

KEY = jax.random.key(0)
X = jax.device_put(spellings.data(3, 8, seed=1))
INT8 = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
WEIGHTS = [QuantizationRule(weight_qtype="int8")]


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(6)(x)))


@pytest.mark.thinned(16)
@pytest.mark.parametrize("name", spellings.CASES)
def test_path_into_a_product(name):
    """Whatever QAT accepts, against the same float64 references."""
    case = spellings.CASES[name]
    params, x = jax.tree.map(jnp.asarray, (case.params, case.x))
    rules = [spellings.RULE]
    if all(not weights for _, weights, _ in case.ops):
        quantized = quantize_fn(case.function, PtqProvider(rules, allow_unmatched=True))
        values = params
    else:
        quantized, values = ptq.quantize(case.function, params, rules, x)
    wide = (
        spellings.cast(case.params, np.float64),
        spellings.cast(case.x, np.float64),
    )
    tolerance = 2e-2 if name == "bfloat16" else 2e-6
    np.testing.assert_allclose(
        jax.jit(quantized)(values, x),
        case.reference(*wide),
        rtol=tolerance,
        atol=tolerance,
    )


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(10, 8)
        return table.attend(nn.Dense(8)(table(tokens)))


def values_of(tree):
    return jax.tree.map(
        lambda leaf: dequantize(leaf.array) if is_quantized(leaf) else leaf,
        tree,
        is_leaf=is_quantized,
    )


def is_quantized(leaf):
    return isinstance(leaf, qwix_train.WithAux)


# Of all rows, also such as do not exist: Flax looks those up as NaN.
TOKENS = jnp.array([[1, 2, 9], [0, -1, -10], [10, -11, 100]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "qtype, method, tile",
    [
        ("int8", "absmax", None),
        ("int8", "minmax", 4),
        ("int4", "absmax", 4),
        ("int4", "minmax", None),
        ("int1", "absmax", 4),
        ("nf4", "absmax", None),
        ("float8_e4m3fn", "absmax", 4),
    ],
)
def test_lookups_in_a_quantized_table(qtype, method, tile):
    rule = QuantizationRule(
        op_names=("gather", "dot_general"),
        weight_qtype=qtype,
        weight_calibration_method=method,
        tile_size=tile,
    )
    params = models.params_of(Tied(), TOKENS)
    model, quantized = ptq.quantize(Tied(), params, [rule], TOKENS)
    table = quantized["Embed_0"]["embedding"].array
    assert table.scale.shape == (10, 1 if tile is None else 2)
    values = values_of(quantized)
    expected = jax.jit(Tied().apply)({"params": values}, TOKENS)
    assert np.isnan(expected).any(-1).tolist() == [[False] * 3] * 2 + [[True] * 3]
    got = jax.jit(model.apply)({"params": quantized}, TOKENS)
    np.testing.assert_allclose(got, expected, 2e-6, 2e-6)
    qat = jax.jit(quantize_model(Tied(), QtProvider([rule])).apply)
    np.testing.assert_allclose(qat({"params": params}, TOKENS), got, 2e-6, 2e-6)

    # Rows are taken as codes, bit for bit.
    def look_up(params, tokens):
        return params["table"][tokens], jnp.take(params["table"], tokens, axis=0)

    lookup = quantize_fn(look_up, PtqProvider([rule]))
    stored = {"table": quantized["Embed_0"]["embedding"]}
    expected = jax.jit(look_up)(values_of(stored), TOKENS)
    got = jax.jit(lookup)(stored, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    jaxpr = jax.make_jaxpr(lookup)(stored, TOKENS)
    gathered = [e.invars[0].aval for e in jaxpr.eqns if e.primitive.name == "gather"]
    assert table.qvalue.dtype in {aval.dtype for aval in gathered}


def test_a_table_that_is_only_looked_up_stays_in_float():
    class Embedded(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(4)(nn.Embed(10, 8)(tokens))

    provider = PtqProvider(WEIGHTS)
    model = quantize_model(Embedded(), provider)
    params = jax.jit(model.init)(KEY, TOKENS)["params"]
    assert not is_quantized(params["Embed_0"]["embedding"])
    assert is_quantized(params["Dense_0"]["kernel"])
    plan = qwix_train.plan(Embedded(), provider, TOKENS)
    assert "lookups are quantized where a rule's op_names has 'gather'" in str(plan)
    assert not plan.dequantized


def test_the_plan_says_what_is_dequantized_and_nothing_else():
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (8, 8))
            penalty = jnp.exp(kernel).max()
            return nn.Dense(8)(x @ kernel) * penalty

    plan = qwix_train.plan(Normalized(), PtqProvider(INT8), X)
    assert plan.dequantized == {"kernel": ("exp",)}
    line = "kernel is dequantized for what has no quantized form: exp"
    assert line in str(plan).splitlines()
    assert not qwix_train.plan(Normalized(), INT8, X).dequantized
    model = quantize_model(Normalized(), PtqProvider(INT8))
    variables = jax.jit(model.init)(KEY, X)
    again = qwix_train.plan(model, PtqProvider(INT8), X, variables=variables)
    assert again.dequantized == plan.dequantized


def test_the_plan_says_in_which_form_a_product_is_computed():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(16, name="nf4")(nn.Dense(64, name="int8")(x))
            return nn.Conv(2, (3,), name="conv")(x[None])

    rules = [
        QuantizationRule(module_path="nf4", weight_qtype="nf4", tile_size=32),
        QuantizationRule(weight_qtype="int8", act_qtype="int8"),
    ]
    # A plan of the same shapes again: nothing that was traced before is left out.
    for rows, form in ((1, "rows"), (64, "whole"), (1, "rows")):
        plan = qwix_train.plan(Model(), PtqProvider(rules), jnp.ones((rows, 64)))
        found = {entry["module_path"]: entry["product"] for entry in plan.records()}
        codes = "codes; rows on CPU" if rows == 1 else "codes"
        assert found == {
            "int8": codes,
            "nf4": f"dequantized; {form} on CPU",
            "conv": "",
        }
        assert f"dequantized; {form} on CPU" in str(plan)
        assert "<th>product</th>" in plan._repr_html_()
    assert "product" not in str(qwix_train.plan(Model(), rules, jnp.ones((1, 64))))


@pytest.mark.slow
def test_readme_of_qwix():
    """Its code, with the name of the import changed."""
    qwix = qwix_train

    class MLP(nn.Module):
        dhidden: int
        dout: int

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(self.dhidden, use_bias=False)(x)
            x = nn.relu(x)
            x = nn.Dense(self.dout, use_bias=False)(x)
            return x

    model = MLP(64, 16)
    model_input = jax.random.uniform(jax.random.key(0), (8, 16))
    rules = [
        qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    ]
    ptq_model = qwix.quantize_model(model, qwix.PtqProvider(rules))
    abs_ptq_params = jax.eval_shape(ptq_model.init, jax.random.key(0), model_input)[
        "params"
    ]
    for name, shape in {"Dense_0": (16, 64), "Dense_1": (64, 16)}.items():
        kernel = abs_ptq_params[name]["kernel"]
        assert isinstance(kernel, qwix.WithAux) and isinstance(
            kernel.array, qwix.QArray
        )
        scale = jax.ShapeDtypeStruct((1, shape[1]), jnp.float32)
        assert kernel.array.qvalue == jax.ShapeDtypeStruct(shape, jnp.int8)
        assert kernel.array.scale == scale
    printed = repr(abs_ptq_params["Dense_0"]["kernel"])
    start = "WithAux(array=QArray(qvalue=ShapeDtypeStruct(shape=(16, 64), dtype=int8), "
    assert printed.startswith(start)
    fp_params = jax.jit(model.init)(jax.random.key(0), model_input)["params"]
    ptq_params = qwix.quantize_params(fp_params, abs_ptq_params)
    quantized_model_output = ptq_model.apply({"params": ptq_params}, model_input)
    expected = model.apply({"params": fp_params}, model_input)
    error = np.linalg.norm(quantized_model_output - expected)
    assert 0 < error < 0.02 * np.linalg.norm(expected)


def _setup():
    floats = jax.jit(Mlp().init)(KEY, X)
    model = quantize_model(Mlp(), PtqProvider(INT8))
    return floats, model, jax.jit(model.init)(KEY, X)


def test_float_params_are_refused():
    floats, model, _ = _setup()
    with pytest.raises(ValueError, match="2 params .* among them 'Dense_0/kernel'"):
        model.apply(floats, X)


def test_params_that_other_rules_quantized_are_refused():
    _, _, variables = _setup()
    other = quantize_model(
        Mlp(), PtqProvider([QuantizationRule(weight_qtype="int4", act_qtype="int8")])
    )
    with pytest.raises(ValueError, match="codes of int8, a rule asks for int4"):
        other.apply(variables, X)


def test_qat_refuses_quantized_params():
    _, _, variables = _setup()
    message = "QtProvider takes float params, and 2 are quantized, among them 'Dense_0/"
    with pytest.raises(ValueError, match=message):
        quantize_model(Mlp(), QtProvider(INT8)).apply(variables, X)
    step = qwix_train.wrap_eval_step(lambda v, x: Mlp().apply(v, x), INT8)
    with pytest.raises(ValueError, match=message):
        step(variables, X)


def test_two_rules_for_one_weight_are_refused():
    rules = [
        QuantizationRule(op_names=("dot_general0",), weight_qtype="int8"),
        QuantizationRule(weight_qtype="int4"),
    ]

    def function(params, x):
        return x @ params["w"] + x @ params["w"][::-1]

    with pytest.raises(ValueError, match="rule 0 at dot_general0 .*rule 1 at dot_gen"):
        ptq.quantize(function, {"w": jnp.ones((8, 4))}, rules, X)


def test_rules_that_match_nothing_are_refused():
    rules = [QuantizationRule(module_path="Dense_7", weight_qtype="int8")]
    model = quantize_model(Mlp(), PtqProvider(rules))
    with pytest.raises(ValueError, match="'Dense_1'"):
        model.init(KEY, X)
    with pytest.raises(ValueError, match="'Dense_1'"):
        model.apply(Mlp().init(KEY, X), X)
    model = quantize_model(Mlp(), PtqProvider(rules, allow_unmatched=True))
    variables = jax.jit(model.init)(KEY, X)
    np.testing.assert_array_equal(model.apply(variables, X), Mlp().apply(variables, X))


def test_ops_that_no_rule_matches_are_exact():
    rules = [QuantizationRule(module_path="Dense_0", weight_qtype="int8")]
    floats = jax.jit(Mlp().init)(KEY, X)["params"]
    model, params = ptq.quantize(Mlp(), floats, rules, X)
    values = values_of(params)
    np.testing.assert_array_equal(
        values["Dense_1"]["kernel"], floats["Dense_1"]["kernel"]
    )
    for x in (X, X.astype(jnp.bfloat16)):
        got, expected = (
            model.apply({"params": params}, x),
            Mlp().apply({"params": values}, x),
        )
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, 2e-6, 2e-6)


def test_the_trace_stays_small():
    _, model, variables = _setup()
    floats = jax.jit(Mlp().init)(KEY, X)

    def count(jaxpr):
        inner = (
            count(j)
            for e in jaxpr.eqns
            for j in jax.extend.core.jaxprs_in_params(e.params)
        )
        return len(jaxpr.eqns) + sum(inner)

    before = count(jax.make_jaxpr(Mlp().apply)(floats, X).jaxpr)
    after = count(jax.make_jaxpr(model.apply)(variables, X).jaxpr)
    assert after - before < 2 * 60


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((2, 4), name=name)(x) for name in "qkv")
        scores = nn.softmax(jnp.einsum("...qhd,...khd->...hqk", q, k))
        mixed = jnp.einsum("...hqk,...khd->...qhd", scores, v)
        return nn.DenseGeneral(8, axis=(-2, -1), name="out")(mixed)


@pytest.mark.slow
@pytest.mark.parametrize("act_act", [True, False])
def test_attention(act_act):
    x = jax.device_put(spellings.data(2, 5, 8, seed=3))
    rules = [
        QuantizationRule(
            weight_qtype="int8",
            act_qtype="int8",
            act_act=act_act,
            act_calibration_method="absmax,1.1",
        )
    ]
    params = jax.jit(Attention().init)(KEY, x)["params"]
    model, quantized = ptq.quantize(Attention(), params, rules, x)
    got = jax.jit(model.apply)({"params": quantized}, x)
    qat = quantize_model(Attention(), QtProvider(rules)).apply({"params": params}, x)
    np.testing.assert_allclose(got, qat, 2e-5, 2e-5)
    products = [
        eqn.invars[0].aval.dtype
        for jaxpr in _all_jaxprs(jax.make_jaxpr(model.apply)({"params": quantized}, x))
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "dot_general"
    ]
    floats = sum(jnp.issubdtype(dtype, jnp.floating) for dtype in products)
    assert floats == (0 if act_act else 2)


def _all_jaxprs(jaxpr):
    yield jaxpr
    for eqn in jaxpr.eqns:
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _all_jaxprs(inner)


RELOAD = """
import sys
import jax, numpy as np
from jax import export
exported = export.deserialize(open(sys.argv[1], "rb").read())
x = np.load(sys.argv[2])
np.save(sys.argv[3], exported.call(x))
assert not any(name.startswith("qwix") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rules", [INT8, WEIGHTS], ids=["int8", "weights"])
def test_an_exported_model_runs_without_this_package(rules, tmp_path):
    model = quantize_model(Mlp(), PtqProvider(rules))
    variables = jax.jit(model.init)(KEY, X)
    apply = jax.jit(lambda x: model.apply(variables, x))
    platforms = ["cpu", "cuda", "tpu"]
    exported = export.export(apply, platforms=platforms)(X)
    assert exported.platforms == tuple(platforms)
    (tmp_path / "model").write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", X)
    subprocess.run(
        [sys.executable, "-c", RELOAD, "model", "x.npy", "out.npy"],
        cwd=tmp_path,
        check=True,
        timeout=120,
    )
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), apply(X))
