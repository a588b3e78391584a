"""Models that run on packed params, which behave as the arrays that they stand for."""

import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax import numpy as jnp

from qwix_train import PtqProvider, QuantizationRule, ptq, quantize_fn
from qwix_train.core.how import HowToQuantize
from qwix_train.core.packed_array import PackedQArray, unpack
from qwix_train.values import stored
from tests.spellings import data

RULES = [QuantizationRule(weight_qtype="nf4", tile_size=16)]
CONVOLUTIONS = QuantizationRule(weight_qtype="nf4", op_names=("conv_general_dilated",))
X = jax.device_put(data(4, 32, seed=4) - 0.5)


def param(*shape, tiled, layers=(), seed=0):
    how = HowToQuantize(
        qtype="nf4",
        channelwise_axes=[a for a in range(len(shape)) if a != tiled],
        tiled_axes={tiled: 16},
    )
    w = jax.device_put(data(*shape, seed=seed) - 0.5)
    return jax.jit(lambda w: stored.quantize_param_packed(w, how, layers))(w)


@functools.cache
def params_of(name):
    """Params by name, which are compiled when the first test asks for them."""
    if name == "layers":
        return {"w": param(3, 32, 32, tiled=1, layers=(0,), seed=2)}
    if name == "layers with shared scales":
        array, how = params_of("layers")["w"].array, params_of("layers")["w"].how
        return {"w": stored.packed(stored.WithAux(unpack(array), how))}
    return {"w": param(32, 16, tiled=0), "v": param(16, 32, tiled=0, seed=1)}


def in_float(params):
    return jax.tree.map(stored.dequantized, params, is_leaf=stored.is_quantized)


def layers(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def convolution(p, x):
    kernel = p["w"].reshape(1, 32, 16)
    return lax.conv_general_dilated(
        x[None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


FUNCTIONS = {
    "two products": ("plain", lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]),
    "transposed": ("plain", lambda p, x: x @ p["v"].T),
    "on the left": ("plain", lambda p, x: p["w"].T @ x.T),
    "cast": ("plain", lambda p, x: x @ p["w"].astype(jnp.bfloat16)),
    "convolution": ("plain", convolution),
    "read otherwise": ("plain", lambda p, x: x @ p["w"] + p["w"].sum()),
    "a slice": ("plain", lambda p, x: x @ p["w"][:, ::2]),
    "remat": ("plain", lambda p, x: jax.checkpoint(lambda p, x: x @ p["w"])(p, x)),
    "scan": ("layers", layers),
    "remat in a scan": (
        "layers",
        lambda p, x: lax.scan(
            jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"]
        )[0],
    ),
    "scan, packed across layers": ("layers with shared scales", layers),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_the_array_that_it_stands_for(name):
    which, function = FUNCTIONS[name]
    params = params_of(which)
    rules = [CONVOLUTIONS, *RULES]
    run = quantize_fn(function, PtqProvider(rules, allow_unmatched=True))

    def loss(function, x, params):
        return jnp.sum(jnp.square(function(params, x).astype(jnp.float32)))

    got = jax.jit(lambda x: jax.value_and_grad(loss, 1)(run, x, params))(X)
    want = jax.value_and_grad(loss, 1)(function, X, in_float(params))
    tolerance = 1e-2 if name == "cast" else 2e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * np.abs(b).max()
        ),
        got,
        want,
    )


@pytest.mark.slow
def test_quantized_activations():
    rules = [
        QuantizationRule(weight_qtype="int4", act_qtype="int8"),
    ]
    how = HowToQuantize(qtype="int4", channelwise_axes=(1,))
    params = {"w": stored.quantize_param(jax.device_put(data(32, 16) - 0.5), how)}
    packed = {"w": stored.packed(params["w"])}
    unpacked = {"w": stored.WithAux(unpack(packed["w"].array), how)}
    run = quantize_fn(lambda p, x: x @ p["w"], PtqProvider(rules))
    grad = jax.grad(lambda x, p: jnp.sum(jnp.square(run(p, x))))
    np.testing.assert_allclose(run(packed, X), run(unpacked, X), rtol=1e-6)
    np.testing.assert_allclose(grad(X, packed), grad(X, unpacked), rtol=1e-5, atol=1e-6)


def test_returned_as_it_came():
    run = quantize_fn(
        lambda p, x: (p, x @ p["w"]), PtqProvider(RULES, allow_unmatched=True)
    )
    returned, _ = run(params_of("plain"), X)
    is_same(returned, params_of("plain"))


def is_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_checkpoints(tmp_path):
    params = {**params_of("plain"), "layers": params_of("layers"), "bias": jnp.ones(3)}
    ptq.save(tmp_path / "own", params, rules=RULES)
    is_same(ptq.restore(tmp_path / "own"), params)
    is_same(ptq.restore(tmp_path / "own", jax.eval_shape(lambda: params)), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", params)
        checkpointer.wait_until_finished()
        is_same(checkpointer.restore(tmp_path / "orbax", params), params)
    other = {**params, "w": params_of("plain")["v"]}
    with pytest.raises(ValueError, match="Different: w"):
        ptq.restore(tmp_path / "own", other)


def test_restored_on_a_mesh(tmp_path):
    mesh = jax.make_mesh(
        (2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    sharding = jax.NamedSharding(mesh, jax.P("a", "b"))
    ptq.save(tmp_path / "own", params_of("plain"))
    got = ptq.restore(tmp_path / "own", shardings={"w": sharding})
    assert got["w"].array.packed.sharding.is_equivalent_to(sharding, 2)
    assert got["w"].array.scale_codes.sharding.is_equivalent_to(sharding, 2)
    is_same(got, params_of("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("save", ["ptq", "orbax"])
def test_at_most_4_13_bits_on_disk(tmp_path, save):
    how = HowToQuantize(qtype="nf4", channelwise_axes=(1,), tiled_axes={0: 64})
    # Codes of nothing, which cannot be compressed further.
    w = jax.random.normal(jax.random.key(0), (2048, 4096))
    params = {"w": stored.quantize_param_packed(w, how)}
    if save == "ptq":
        ptq.save(tmp_path / "p", params)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "p", params)
    written = sum(f.stat().st_size for f in (tmp_path / "p").rglob("*") if f.is_file())
    assert 8 * written <= 4.13 * w.size


def test_linen_boxes_and_nnx():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return nn.Dense(16, kernel_init=init)(x)

    params = jax.jit(Layer().init)(jax.random.key(0), X)["params"]
    boxed = params["Dense_0"]["kernel"]
    quantized = stored.box(params_of("plain")["w"], boxed)
    assert quantized.array.packed.names == ("in", "out")
    assert quantized.array.scale_steps.names == (None,)
    assert quantized.array.scale_mean.names == ()
    specs = nn.get_partition_spec(quantized).array
    assert specs.packed == specs.scale_codes == jax.P("in", "out")
    is_same(stored.unbox(quantized), params_of("plain")["w"])

    layer = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    layer.kernel = stored.box(params_of("plain")["w"], layer.kernel)
    tree = ptq.to_tree(layer)
    assert isinstance(tree["kernel"].array, PackedQArray)
    is_same(tree["kernel"], params_of("plain")["w"])
    other = nnx.clone(layer)
    is_same(ptq.to_tree(ptq.trees.with_tree(other, tree)), tree)
