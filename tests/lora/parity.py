"""Models with adapters that `qwix` and this package are compared on.

`python -m tests.lora.parity FILE NAME ...` runs cases with `qwix`, in a process of its
own, since `qwix` patches JAX.
"""

import dataclasses
import pickle
import sys
import zlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx, traverse_util
from jax import numpy as jnp

from tests.qat.parity import Convolution, Mlp, NnxMlp


class Heads(nn.Module):
    """Kernels with more than two axes."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.DenseGeneral((2, 3))(x))
        return nn.DenseGeneral(4, axis=(-2, -1), use_bias=False)(x)


class Strided(nn.Module):
    """Convolutions of one and of three spatial axes."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(4, (3,), kernel_dilation=2)(x))
        return nn.Conv(3, (2, 2, 1), strides=(2, 1, 1))(x[..., None])


class NnxEinsums(nnx.Module):
    """Attention's products, and experts. Those of Linen fail in `qwix`."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.q_einsum = nnx.Einsum("btd,dnh->btnh", (8, 2, 3), (2, 3), rngs=rngs)
        self.out_einsum = nnx.Einsum("btnh,nhd->btd", (2, 3, 8), rngs=rngs)
        self.experts = nnx.Einsum("ebtd,edf->ebtf", (2, 8, 4), rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.out_einsum(jnp.tanh(self.q_einsum(x))))
        return self.experts(jnp.stack([x, 2 * x]))


class NnxLayers(nnx.Module):
    """Layers of other kinds."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.general = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
        self.back = nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=rngs)
        self.conv = nnx.Conv(4, 3, kernel_size=(3,), rngs=rngs)

    def __call__(self, x):
        return self.conv(jnp.tanh(self.back(jnp.tanh(self.general(x)))))


class NnxList(nnx.Module):
    """Layers in a list."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@dataclasses.dataclass
class Case:
    model: Any
    rule: dict[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = (6, 8)
    dtype: Any = jnp.float32


# The largest weight is no tie between two codes, where `qwix` may take the other.
WIDE = {"weight_calibration_method": "absmax,1.1"}
INT8 = {"weight_qtype": "int8", **WIDE}
INT4 = {"weight_qtype": "int4", "tile_size": 2, **WIDE}
NF4 = {"weight_qtype": "nf4"}
W8A8 = {
    "weight_qtype": "int8",
    "act_qtype": "int8",
    "act_calibration_method": "absmax,1.1",
    **WIDE,
}
IMAGES = {"shape": (2, 6, 6)}
SEQUENCE = {"shape": (2, 5, 8)}
# Quantized convolutions of `qwix` need quantized activations, through which it has no
# gradient.
CASES = {
    "dense": Case(Mlp()),
    "dense bfloat16": Case(Mlp(), dtype=jnp.bfloat16),
    "dense int4": Case(Mlp(), INT4),
    "dense nf4": Case(Mlp(), NF4),
    "dense activations": Case(Mlp(), W8A8),
    "dense of one layer": Case(Mlp(), {"module_path": ".*_1", **NF4}),
    "general": Case(Heads()),
    "general int4": Case(Heads(), {"weight_qtype": "int4", **WIDE}),
    "conv": Case(Convolution(), **IMAGES),
    "conv dilated": Case(Strided(), **IMAGES),
    "conv activations": Case(Convolution(), W8A8, **IMAGES),
    "nnx dense": Case(NnxMlp),
    "nnx dense nf4": Case(NnxMlp, NF4),
    "nnx einsum": Case(NnxEinsums, **SEQUENCE),
    "nnx einsum int8": Case(NnxEinsums, INT8, **SEQUENCE),
    "nnx einsum activations": Case(NnxEinsums, W8A8, **SEQUENCE),
    "nnx layers": Case(NnxLayers, **SEQUENCE),
    "nnx list": Case(NnxList, {"module_path": "layers/1", **INT8}),
}


def run(library: Any, case: Case) -> dict[str, Any]:
    """The params, output and gradients of adapters of a model that has some."""
    x = jax.random.normal(jax.random.key(5), case.shape, case.dtype)
    options = {"module_path": ".*", "rank": 2, "alpha": 3.0, **case.rule}
    provider = library.LoraProvider(**options)
    start = run_linen if isinstance(case.model, nn.Module) else run_nnx
    shapes, adapters, call = start(library, case, provider, x)
    drawn = {
        path: jnp.asarray(drawn_array(path, adapter.shape), adapter.dtype)
        for path, adapter in adapters.items()
    }

    def loss(adapters, x):
        out = call(adapters, x)
        return (out.astype(jnp.float32) ** 2).mean(), out

    grad = jax.value_and_grad(jax.jit(loss), (0, 1), has_aux=True)
    (_, out), (grads, x_grad) = grad(drawn, x)
    results = {"shapes": shapes, "out": np.asarray(out, np.float32)}
    if "act_qtype" not in case.rule:
        results["x"] = np.asarray(x_grad, np.float32)
        results |= {path: np.asarray(g, np.float32) for path, g in grads.items()}
    return results


def run_linen(library, case, provider, x):
    model = library.apply_lora_to_model(case.model, provider)
    floats = jax.jit(case.model.init)(jax.random.key(0), x)["params"]
    floats = jax.tree.map(lambda p: p.astype(case.dtype), floats)
    # Params of `qwix` do not come out of a compiled function.
    init = model.init if library.__name__ == "qwix" else jax.jit(model.init)
    held = init(jax.random.key(1), x)["params"]
    shapes = shapes_of(traverse_util.flatten_dict(held, sep="/"))
    held = jax.tree.map(lambda p: p.astype(case.dtype), held)
    base = library.quantize_params(floats, held)
    base = traverse_util.flatten_dict(base, sep="/")
    adapters = {
        path: leaf
        for path, leaf in traverse_util.flatten_dict(held, sep="/").items()
        if "_lora_" in path
    }

    def call(adapters, x):
        params = traverse_util.unflatten_dict({**base, **adapters}, sep="/")
        return model.apply({"params": params}, x)

    return shapes, adapters, call


def run_nnx(library, case, provider, x):
    model = case.model()
    model = library.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    flat = {
        "/".join(map(str, path)): leaf
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    }
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}

    def call(values, x):
        filled = {
            path: variable.replace(values["/".join(map(str, path))])
            for path, variable in nnx.to_flat_state(adapters)
        }
        state = nnx.from_flat_state(list(filled.items()))
        return nnx.merge(graphdef, state, rest)(x)

    return shapes, {path: leaf[...] for path, leaf in flat.items()}, call


def shapes_of(flat: dict[str, Any]) -> dict[str, Any]:
    """The shape of each leaf; of a quantized one, of its codes and scales."""
    return {
        path: [tuple(part.shape) for part in jax.tree.leaves(leaf)]
        for path, leaf in flat.items()
    }


def drawn_array(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that depend on the path alone."""
    return np.random.default_rng(zlib.crc32(path.encode())).uniform(-0.5, 0.5, shape)


def main(path: str, *names: str) -> None:
    import qwix

    results = {name: run(qwix, CASES[name]) for name in names}
    with open(path, "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
