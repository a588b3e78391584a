"""Params that go to models of `qwix` 0.1.8, and come from there."""

import pickle
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, traverse_util
from jax import numpy as jnp

import qwix_train
from qwix_train import QArray, WithAux, dequantize
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import quantize_array
from qwix_train.ptq.qwix_trees import from_qwix, to_qwix
from tests import reference_process
from tests.ptq import qwix_reference
from tests.ptq.qwix_reference import CASES

HOW = HowToQuantize(qtype="int8", channelwise_axes=(1,))
BY_DEFAULT = ("int8", "int4 tiles", "attention")
NNX = [name for name in CASES if name.startswith("nnx")]
# Their int1 has no codes, and their table is in float.
BACK = [name for name in CASES if name not in ("int1", "embedding", *NNX)]


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory):
    """What `qwix` computes, in a process that its patches cannot leave."""
    path = tmp_path_factory.mktemp("qwix") / "reference.pickle"
    names = reference_process.selected(request)
    reference_process.run("tests.ptq.qwix_reference", path, *names)
    return pickle.loads(path.read_bytes())


def leaf(shape=(8, 6), qtype="int8", **layout):
    layout = layout or {"channelwise_axes": (1,)}
    how = HowToQuantize(qtype=qtype, **layout)
    x = jax.device_put(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    return WithAux(jax.jit(lambda x: quantize_array(x, how))(x), how)


@pytest.mark.slow
@pytest.mark.parametrize("name", reference_process.cases(CASES, BY_DEFAULT))
def test_their_models_compute_the_same_from_our_params(reference, name):
    outputs = dict(reference[name]["outputs"])
    theirs, values = outputs.pop("theirs"), outputs.pop("dequantized", None)
    assert np.abs(theirs).max() > 0.5
    if values is not None and name != "embedding":
        np.testing.assert_allclose(outputs["converted"], values, 1e-5, 1e-5)
    if name == "int1":
        return
    for output in outputs.values():
        np.testing.assert_array_equal(output, theirs)


@pytest.mark.parametrize("name", reference_process.cases(BACK, BY_DEFAULT))
def test_their_params_become_ours(reference, name):
    ours, back = (
        traverse_util.flatten_dict(reference[name][key], sep="/")
        for key in ("ours", "back")
    )
    assert ours.keys() == back.keys()
    for path, expected in ours.items():
        got = back[path]
        assert type(got) is type(expected), path
        if not isinstance(expected, WithAux):
            np.testing.assert_array_equal(got, expected)
            continue
        assert got.how == expected.how
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
        if isinstance(expected.array, QArray):
            assert got.array.qtype == expected.array.qtype
            got, expected = jax.tree.map(jnp.asarray, (got.array, expected.array))
            np.testing.assert_array_equal(dequantize(got), dequantize(expected))


# Without those whose static ranges are of the data that `qwix` saw.
@pytest.mark.parametrize(
    "name", [name for name in (*BACK, "int1", "embedding") if "static" not in name]
)
@pytest.mark.slow
def test_the_params_that_go_there_are_those_of_quantize_params(reference, name):
    case, results = CASES[name], reference[name]
    rule = dict(case.rule, **({"weight_qtype": "int1"} if name == "int1" else {}))
    model = qwix_train.quantize_model(
        case.model, qwix_train.PtqProvider([qwix_train.QuantizationRule(**rule)])
    )
    x = qwix_reference.inputs(case)
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    ours = qwix_train.quantize_params(results["floats"], abstract)
    expected = traverse_util.flatten_dict(results["ours"])
    for path, leaf in traverse_util.flatten_dict(ours).items():
        if path != ("embedding",):
            for got, want in zip(
                jax.tree.leaves(leaf), jax.tree.leaves(expected[path]), strict=True
            ):
                np.testing.assert_array_equal(got, want)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", reference_process.cases(BACK, BY_DEFAULT))
def test_our_models_compute_the_same_from_their_params(reference, name):
    case, results = CASES[name], reference[name]
    rules = [qwix_train.QuantizationRule(**case.rule)]
    model = qwix_train.quantize_model(case.model, qwix_train.PtqProvider(rules))
    params = jax.tree.map(jnp.asarray, results["back"])
    out = jax.jit(model.apply)({"params": params}, qwix_reference.inputs(case))
    expected = results["outputs"]["theirs"]
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", NNX)
def test_our_nnx_models_compute_the_same_from_their_params(reference, name):
    case, results = CASES[name], reference[name]
    rules = [qwix_train.QuantizationRule(**case.rule)]
    x = qwix_reference.inputs(case)
    model = qwix_train.quantize_model(case.model(), qwix_train.PtqProvider(rules), x)
    params = jax.tree.map(jnp.asarray, results["back"])
    nnx.update(model, jax.tree.map(jnp.zeros_like, params))
    nnx.update(model, params)
    expected = results["outputs"]["theirs"]
    np.testing.assert_allclose(model(x), expected, 1e-5, 1e-5 * np.abs(expected).max())


def test_boxes_and_abstract_params():
    kernel = leaf()
    boxed = kernel.replace(
        array=kernel.array.replace(
            qvalue=nn.Partitioned(kernel.array.qvalue, ("a", None)),
            scale=nn.Partitioned(kernel.array.scale, (None, None)),
        )
    )
    assert isinstance(from_qwix({"kernel": boxed})["kernel"].array.qvalue, jax.Array)
    theirs = jax.eval_shape(lambda: to_qwix({"kernel": leaf(qtype="int3")}))
    back = from_qwix(theirs)["kernel"]
    assert back.array.qvalue == jax.ShapeDtypeStruct((8, 6), jnp.int4)
    assert (back.array.qtype, back.how.qtype) == ("int3", "int3")


def test_a_subtree_and_its_namesakes():
    like = jax.eval_shape(
        lambda: to_qwix({"a": {"kernel": leaf((8, 6)), "bias": jnp.ones(6)}})
    )
    ours = leaf((8, 2, 3), channelwise_axes=(1, 2))
    theirs = to_qwix({"a": {"kernel": ours}}, like)
    assert theirs["a"]["kernel"].array.scale.shape == (1, 6)
    assert theirs["a"]["kernel"].how == like["a"]["kernel"].how
    back = from_qwix(theirs, {"a": {"kernel": ours}})
    assert back["a"]["kernel"].how == ours.how
    np.testing.assert_array_equal(
        dequantize(back["a"]["kernel"].array), dequantize(ours.array)
    )


def test_pure_dicts_are_reshaped():
    ours = leaf((8, 2, 3), "nf4", channelwise_axes=(1, 2)).array
    pure = {"l": {"kernel": {"array": {"qvalue": ours.qvalue, "scale": ours.scale}}}}
    like = {"l": {"kernel": leaf((8, 6), "nf4")}}
    for convert in (to_qwix, from_qwix):
        parts = convert(pure, like)["l"]["kernel"]["array"]
        np.testing.assert_array_equal(parts["qvalue"], ours.qvalue.reshape(8, 6))
        np.testing.assert_array_equal(parts["scale"], ours.scale.reshape(1, 6))


@pytest.mark.parametrize(
    "convert, params, like, message",
    [
        (to_qwix, {"a": {"w": 1.0}}, {"a": {}}, "no a/w in the qwix model"),
        (to_qwix, {"a": {"w": 1.0}}, {"a": {"w": leaf()}}, "a/w is not quantized"),
        (
            to_qwix,
            {"w": WithAux(jnp.ones((1, 1)), HOW)},
            {"w": jnp.ones(1)},
            "w is quantized, but the qwix model keeps it in float",
        ),
        (
            to_qwix,
            {"w": leaf((10, 3), tiled_axes={0: 4}, pad_tiles=True)},
            None,
            r"w of shape \(10, 3\) has tiles of unequal length",
        ),
        (
            to_qwix,
            {"w": leaf((8, 6))},
            {"w": leaf((6, 8))},
            r"w of shape \(8, 6\) does not fit the model, where it has shape \(6, 8\)",
        ),
        (from_qwix, {"w": 1.0}, {}, "no w in the model"),
        (from_qwix, {"w": leaf()}, {"w": jnp.ones((8, 6))}, "w is quantized, but the"),
    ],
)
def test_what_does_not_fit_is_refused(convert, params, like, message):
    with pytest.raises(ValueError, match=message):
        convert(params, like)


@pytest.mark.parametrize(
    "qtype, message",
    [
        ("int1", "Quantize the float params"),
        ("mxfp5", "Unknown quantized type 'mxfp5'"),
    ],
)
def test_their_types_that_we_do_not_have(qtype, message):
    array = jnp.ones((4, 32), jnp.int8)

    class WithAuxOfTheirs:
        class how:
            channelwise_axes, tiled_axes = (), {1: 32}
            calibration_method, noise_fn = "absmax", None

    theirs = WithAuxOfTheirs()
    theirs.how.qtype, theirs.array = qtype, array
    with pytest.raises(ValueError, match=f"a/w .*{message}"):
        from_qwix({"a": {"w": theirs}})


def test_qwix_is_optional(monkeypatch):
    params = {"w": leaf()}
    theirs = to_qwix(params)
    for name in [name for name in sys.modules if name.split(".")[0] == "qwix"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match="pip install qwix"):
        to_qwix(params)
    assert isinstance(from_qwix(theirs)["w"], WithAux)


@pytest.mark.parametrize("qtype", ["mxfp8", "mxfp4", "nvfp4"])
def test_blocks_there_and_back(qtype):
    """Their scales are floats, of the values that ours have."""
    import qwix

    block = 16 if qtype == "nvfp4" else 32
    how = HowToQuantize(qtype=qtype, channelwise_axes=(1,), tiled_axes={0: block})
    w = jax.device_put(np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32))
    ours = {"w": WithAux(quantize_array(w, how), how)}
    theirs = to_qwix(ours)["w"]
    assert theirs.array.scale.dtype == jnp.float32
    values = dequantize(ours["w"].array)
    np.testing.assert_allclose(qwix.dequantize(theirs.array), values, rtol=1e-6)
    of_them = qwix.quantize(w, qtype, channelwise_axes=(1,), tiled_axes={0: block})
    back = from_qwix({"w": type(theirs)(of_them, theirs.how)})["w"]
    assert back.array.scale.dtype == ours["w"].array.scale.dtype
    assert jax.tree.structure(back) == jax.tree.structure(ours["w"])
    np.testing.assert_array_equal(dequantize(back.array), qwix.dequantize(of_them))


def test_blocks_that_qwix_does_not_have():
    how = HowToQuantize(qtype="mxint8", channelwise_axes=(1,), tiled_axes={0: 32})
    param = WithAux(quantize_array(jnp.ones((32, 4)), how), how)
    with pytest.raises(ValueError, match="qwix has no type mxint8"):
        to_qwix({"w": param})
