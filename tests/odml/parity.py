"""Models whose ranges `qwix` and this package are compared on.

`python -m tests.odml.parity FILE` collects them with `qwix`, in a process of its own,
since `qwix` patches JAX.
"""

import functools
import sys
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import numpy as jnp


def bias(*args):
    return nn.initializers.normal(0.2)(*args)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, bias_init=bias)(x))
        x = nn.tanh(nn.Dense(6, bias_init=bias)(x))
        return nn.softmax(nn.Dense(4)(x))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), bias_init=bias)(x)
        y = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(nn.relu(x)))
        x = nn.relu(x + y)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu6(nn.Conv(4, (1, 1))(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class Concat(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Dense(4, bias_init=bias)(x))
        b = nn.Dense(3)(x) * x[:, :3]
        x = jnp.concatenate([a, b], axis=-1)
        return {"out": nn.Dense(2)(x) - 1.0, "sum": jnp.sum(x, axis=-1)}


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((2, 4), name=name)(x) for name in "qkv")
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        y = x + nn.DenseGeneral(8, axis=(-2, -1), name="out")(out)
        y = y + nn.Dense(8)(nn.gelu(nn.Dense(12)(y)))
        return jnp.mean(y, axis=1)


class Gates(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.silu(nn.Dense(8)(x)) * nn.leaky_relu(nn.Dense(8)(x))
        return jnp.concatenate([y, x - y], axis=-1).mean(-1)


CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "mlp": (Mlp(), (6, 8)),
    "residual": (Residual(), (2, 8, 8, 3)),
    "concat": (Concat(), (6, 8)),
    "attention": (Attention(), (2, 5, 8)),
    "gates": (Gates(), (6, 8)),
}
# The range of a whole batch, which `qwix` has only if told so.
RULE = {
    "weight_qtype": "int8",
    "act_qtype": "int8",
    "act_static_scale": True,
    "act_batch_axes": (),
}


def provider(library: Any, rules: Any) -> Any:
    return getattr(library, "odml", library).OdmlQatProvider(rules)


def collect(library: Any, name: str) -> dict[str, np.ndarray]:
    """The ranges of a model after one batch, by their path, and the output."""
    model, shape = CASES[name]
    x = jax.random.normal(jax.random.key(5), shape)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    rules = [library.QuantizationRule(**RULE)]
    quantized = library.quantize_model(model, provider(library, rules))
    if library.__name__ != "qwix":  # which makes them on the way
        stats = jax.eval_shape(quantized.init, jax.random.key(0), x)["quant_stats"]
        stats = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stats)
        variables = {**variables, "quant_stats": stats}
    apply = jax.jit(functools.partial(quantized.apply, mutable=["quant_stats"]))
    out, updated = apply(variables, x)
    flat = traverse_util.flatten_dict(updated["quant_stats"], sep="/")
    leaves = {f"out/{i}": leaf for i, leaf in enumerate(jax.tree.leaves(out))}
    return {k: np.asarray(v, np.float32) for k, v in (flat | leaves).items()}


def main(path: str) -> None:
    import qwix

    results = {
        f"{name}|{key}": value
        for name in CASES
        for key, value in collect(qwix, name).items()
    }
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])
