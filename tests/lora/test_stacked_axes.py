"""Adapters of stacked weights are stacked along the axis that their weight is."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, traverse_util
from jax import numpy as jnp

import qwix_train
from qwix_train import lora
from tests import models
from tests.spellings import data

X = jax.device_put(data(4, 6))
RULE = lora.LoraRule(rank=2, alpha=3.0)


class Layer(nn.Module):
    adapted: bool = False

    @nn.compact
    def __call__(self, x, _):
        layers = {
            "heads": nn.DenseGeneral((2, 5), parent=None),
            "out": nn.DenseGeneral(6, axis=(-2, -1), parent=None),
        }
        for name, layer in layers.items():
            if self.adapted:
                layer = qwix_train.apply_lora_to_model(layer, lora.LoraProvider([RULE]))
            layers[name] = layer.copy(parent=self, name=name)
        heads, out = layers.values()
        return jnp.tanh(out(heads(x))), None


class Stack(nn.Module):
    """Layers under `scan` along an axis of their params, as MaxText has them."""

    axis: int
    adapted: bool = False

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Layer,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return stack(self.adapted, name="layers")(x, None)[0]


def shapes_of(params):
    return {
        path: leaf.shape
        for path, leaf in traverse_util.flatten_dict(params, sep="/").items()
    }


def initial(model):
    return jax.eval_shape(model.init, jax.random.key(0), X)["params"]


def filled(params):
    flat = traverse_util.flatten_dict(params)
    flat = {
        path: jax.device_put(data(*leaf.shape, seed=seed)) / 3
        for seed, (path, leaf) in enumerate(sorted(flat.items()))
    }
    return traverse_util.unflatten_dict(flat)


def merged(params, axis):
    """The params of the float model, in NumPy, a layer at a time."""
    result = {}
    for name, layer in params["layers"].items():
        kernels = []
        for index in range(3):
            kernel, a, b = (
                np.take(np.float64(layer[part]), index, axis)
                for part in ("kernel", "kernel_lora_a", "kernel_lora_b")
            )
            kernels.append(kernel + 1.5 * (a @ b).reshape(kernel.shape))
        kernel = jnp.asarray(np.stack(kernels, axis), jnp.float32)
        result[name] = {"kernel": kernel, "bias": layer["bias"]}
    return {"layers": result}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_adapters_of_a_model_are_those_that_its_layers_have_alone(axis):
    model = qwix_train.apply_lora_to_model(Stack(axis), lora.LoraProvider([RULE]))
    params = initial(model)
    assert shapes_of(params) == shapes_of(initial(Stack(axis, adapted=True)))
    params = filled(params)
    got = jax.jit(model.apply)({"params": params}, X)
    want = jax.jit(Stack(axis).apply)({"params": merged(params, axis)}, X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - X).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{"dora": True}, {"init": "pissa"}], ids=str)
def test_adapters_of_a_state(tmp_path, kwargs):
    model = Stack(1)
    params = filled(initial(model))
    rules = [lora.LoraRule(rank=2, alpha=3.0, **kwargs)]
    state = models.lora_state(
        model.apply, params, optax.sgd(0.1), rules, jax.random.key(1), X
    )
    shapes = shapes_of(state.params)
    assert shapes["layers/heads/kernel_lora_a"] == (6, 3, 2)
    assert shapes["layers/heads/kernel_lora_b"] == (2, 3, 10)
    if "dora" in kwargs:
        # Where an unstacked one would be (2, 5), and (6,).
        assert shapes["layers/heads/kernel_lora_magnitude"] == (2, 3, 5)
        assert shapes["layers/out/kernel_lora_magnitude"] == (6, 3)
    # It begins as the model.
    got = state.apply_fn({"params": state.params}, X)
    np.testing.assert_allclose(got, model.apply({"params": params}, X), 1e-4, 1e-4)
    state = state.replace(params=filled(state.params))
    got = state.apply_fn({"params": state.params}, X)
    want = model.apply({"params": lora.merge(state)}, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    lora.save(tmp_path / "a", state)
    lora.save_peft(tmp_path / "b", state)
    for again in (
        lora.restore(tmp_path / "a", state),
        lora.load_peft(tmp_path / "b", state),
    ):
        jax.tree.map(np.testing.assert_array_equal, again.params, state.params)


def test_each_layer_starts_as_if_it_stood_alone():
    model = Stack(0)
    params = filled(initial(model))
    adapters, *_ = lora.init(params, model.apply, [RULE], jax.random.key(1), X)
    a = np.asarray(adapters["layers"]["out"]["kernel_lora_a"])
    # He's uniform initializer of ten inputs, for each of the three layers.
    assert 0.9 * np.sqrt(6 / 10) < np.abs(a).max() <= np.sqrt(6 / 10)
    assert len(np.unique(a)) == a.size


class Member(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


class Ensemble(nnx.Module):
    def __init__(self, axis):
        # The axis of a kernel of (6, 4); a bias has its members in front.
        self.axes = nnx.StateAxes(
            {
                nnx.PathContains("bias"): 0,
                nnx.Any(nnx.Param, nnx.LoRAParam): axis,
                ...: 0,
            }
        )

        @nnx.vmap(in_axes=0, out_axes=self.axes)
        def create(key):
            return Member(nnx.Rngs(key))

        self.members = create(jax.random.split(jax.random.key(0), 3))

    def __call__(self, x):
        run = nnx.vmap(lambda member, x: member(x), in_axes=(self.axes, None))
        return run(self.members, x)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_each_member_of_an_ensemble_has_an_adapter(axis, said):
    model = Ensemble(axis)
    kernel, bias = model.members.linear.kernel[...], model.members.linear.bias[...]
    provider = lora.LoraProvider(rank=2, alpha=3.0, mapped_axes=(axis,) if said else ())
    model = qwix_train.apply_lora_to_model(model, provider, X, rngs=nnx.Rngs(0))
    linear = model.members.linear
    a, b = linear.kernel_lora_a, linear.kernel_lora_b
    assert a.shape == [(3, 6, 2), (6, 3, 2)][axis]
    assert b.shape == [(3, 2, 4), (2, 3, 4)][axis]
    b.set_value(jax.device_put(data(*b.shape, seed=1)))
    got = nnx.jit(lambda model, x: model(x))(model, X)
    for index in range(3):
        w, one_a, one_b = (
            np.take(np.float64(x), index, axis) for x in (kernel, a[...], b[...])
        )
        want = np.tanh(np.float64(X) @ (w + 1.5 * one_a @ one_b) + bias[index])
        np.testing.assert_allclose(got[index], want, rtol=1e-4, atol=1e-5)


class LinenEnsemble(nn.Module):
    axis: int
    features: int = 4
    x_axis: int | None = None

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            nn.Dense,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            in_axes=self.x_axis,
            axis_size=3,
        )
        return members(self.features, use_bias=False, name="members")(x)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("x_axis", [None, 0])
def test_members_of_a_linen_ensemble_need_no_word(axis, x_axis):
    model = LinenEnsemble(axis, x_axis=x_axis)
    x = X if x_axis is None else jax.device_put(data(3, 4, 6, seed=2))
    model = qwix_train.apply_lora_to_model(model, lora.LoraProvider([RULE]))
    params = filled(model.init(jax.random.key(0), x)["params"])
    one = params["members"]
    got = model.apply({"params": params}, x)
    for index in range(3):
        w, a, b = (
            np.take(np.float64(one[name]), index, axis)
            for name in ("kernel", "kernel_lora_a", "kernel_lora_b")
        )
        assert a.shape == (6, 2) and b.shape == (2, 4)
        given = x if x_axis is None else x[index]
        want = np.float64(given) @ (w + 1.5 * a @ b)
        np.testing.assert_allclose(got[index], want, rtol=1e-4, atol=1e-4)


def test_an_axis_that_the_sizes_do_not_tell_is_asked_for():
    model = LinenEnsemble(axis=1)
    x = X[:, :3]
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match=r"\(3, 3, 4\).*LoraRule\(mapped_axes=\(0,\)"):
        lora.init(params, model.apply, [RULE], jax.random.key(1), x)
    rule = lora.LoraRule(rank=2, alpha=3.0, mapped_axes=(1,))
    adapters, *_ = lora.init(params, model.apply, [rule], jax.random.key(1), x)
    assert adapters["members"]["kernel_lora_b"].shape == (2, 3, 4)


def test_mapped_axes_that_are_contracted_are_refused():
    params = {"w": jax.device_put(data(3, 6, 4))}

    def apply(params, x):
        return jax.vmap(lambda w: x @ w)(params["w"])

    for axis, message in [(1, "which the op contracts"), (3, "has the shape")]:
        rules = [lora.LoraRule(rank=2, alpha=3.0, mapped_axes=(axis,))]
        with pytest.raises(ValueError, match=f"mapped_axes=.*{message}"):
            lora.init(params, apply, rules, jax.random.key(0), X)
