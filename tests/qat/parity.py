"""Models and rules that `qwix` and this package are compared on.

`python -m tests.qat.parity FILE NAME ...` runs cases with `qwix`, in a process of its
own, since `qwix` patches JAX.
"""

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

ACT = {"act_qtype": "int8", "act_calibration_method": "absmax,1.1"}
BWD = {"bwd_qtype": "int8", "bwd_calibration_method": "absmax,1.1"}
MARGIN = {"weight_calibration_method": "absmax,1.1"}


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(jnp.tanh(nn.Dense(8)(x)))


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(4, (3, 3))(x[..., None]))
        return nn.Conv(3, (2, 2), strides=2, padding="VALID")(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((2, 4))(x)
        k = nn.DenseGeneral((2, 4))(x)
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        out = jnp.einsum("bhqk,bkhd->bqhd", scores, k)
        weight = self.param("out", nn.initializers.normal(1.0), (2, 4, 8))
        return jnp.einsum("bqhd,hdo->bqo", out, weight)


class NnxMlp(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.l1 = nnx.Linear(8, 8, rngs=rngs)
        self.l2 = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.l2(jnp.tanh(self.l1(x)))


@dataclasses.dataclass
class Case:
    model: Any
    rule: dict[str, Any]
    shape: tuple[int, ...] = (6, 8)
    dtype: Any = jnp.float32


CASES = {
    "int8": Case(Mlp(), {"weight_qtype": "int8", **MARGIN, **ACT}),
    "int4 weights": Case(Mlp(), {"weight_qtype": "int4", **MARGIN}),
    "int4 tiles": Case(Mlp(), {"weight_qtype": "int4", "tile_size": 4, **MARGIN}),
    "int8 tiles": Case(
        Mlp(), {"weight_qtype": "int8", "tile_size": 4, **MARGIN, **ACT}
    ),
    "minmax": Case(
        Mlp(),
        {
            "weight_qtype": "int8",
            **MARGIN,
            "act_qtype": "int8",
            "act_calibration_method": "minmax",
        },
    ),
    "rms": Case(Mlp(), {"weight_qtype": "int4", "weight_calibration_method": "rms,4"}),
    "fixed": Case(
        Mlp(),
        {
            "weight_qtype": "int8",
            **MARGIN,
            "act_qtype": "int8",
            "act_calibration_method": "fixed,-4,4",
        },
    ),
    "bfloat16": Case(
        Mlp(), {"weight_qtype": "int8", **MARGIN, **ACT}, dtype=jnp.bfloat16
    ),
    "convolution": Case(
        Convolution(), {"weight_qtype": "int8", **MARGIN, **ACT}, shape=(2, 6, 6)
    ),
    "attention": Case(
        Attention(), {"weight_qtype": "int8", **MARGIN, **ACT}, shape=(2, 5, 8)
    ),
    "bwd int8": Case(Mlp(), {"weight_qtype": "int8", **MARGIN, **ACT, **BWD}),
    "bwd float8": Case(
        Mlp(),
        {
            "weight_qtype": "float8_e4m3fn",
            **MARGIN,
            "act_qtype": "float8_e4m3fn",
            "act_calibration_method": "absmax,1.1",
            **BWD,
            "bwd_qtype": "float8_e5m2",
        },
    ),
    "bwd weights only": Case(Mlp(), {"weight_qtype": "int8", **MARGIN, **BWD}),
    "bwd int4 in groups": Case(
        Mlp(),
        {
            "weight_qtype": "int8",
            **MARGIN,
            **ACT,
            **BWD,
            "bwd_qtype": "int4",
            "bwd_weight_grad_tile_size": 2,
        },
    ),
    "bwd per tensor": Case(
        Mlp(),
        {
            "weight_qtype": "int8",
            **MARGIN,
            **ACT,
            **BWD,
            "disable_channelwise_axes": True,
        },
    ),
    "bwd convolution": Case(
        Convolution(),
        {"weight_qtype": "int8", **MARGIN, **ACT, **BWD},
        shape=(2, 6, 6),
    ),
    "bwd attention": Case(
        Attention(), {"weight_qtype": "int8", **MARGIN, **ACT, **BWD}, shape=(2, 5, 8)
    ),
    "bwd nnx": Case(NnxMlp, {"weight_qtype": "int8", **MARGIN, **ACT, **BWD}),
    "nnx int8": Case(NnxMlp, {"weight_qtype": "int8", **MARGIN, **ACT}),
    "nnx int4": Case(NnxMlp, {"weight_qtype": "int4", **MARGIN}),
}


def run(library: Any, case: Case) -> dict[str, np.ndarray]:
    """The output, and the gradients, of a quantized model."""
    x = jax.random.normal(jax.random.key(5), case.shape, case.dtype)
    # Differently by design: unless told otherwise, `qwix` multiplies the gradients of
    # products with the unquantized operands, if it does not quantize gradients.
    residuals = {"use_original_residuals": False}
    rule = library.QtRule(**case.rule, additional_qt_config=residuals)
    provider = library.QtProvider([rule])

    if isinstance(case.model, nn.Module):
        params = jax.jit(case.model.init)(jax.random.key(0), x)["params"]
        params = jax.tree.map(lambda p: p.astype(case.dtype), params)
        quantized = library.quantize_model(case.model, provider)

        def call(params, x):
            return quantized.apply({"params": params}, x)
    else:
        model = case.model()
        quantized = library.quantize_model(model, provider, x)
        graphdef, state = nnx.split(quantized)
        params = nnx.to_pure_dict(state)

        def call(params, x):
            filled = nnx.clone(state)
            nnx.replace_by_pure_dict(filled, params)
            return nnx.merge(graphdef, filled)(x)

    @jax.jit
    def loss(params, x):
        out = call(params, x)
        return (out.astype(jnp.float32) ** 2).mean(), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    leaves = jax.tree_util.tree_leaves_with_path({"out": out, "grads": grads})
    return {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float32)
        for path, leaf in leaves
    }


def main(path: str, *names: str) -> None:
    import qwix

    results = {
        f"{name}|{key}": value
        for name in names
        for key, value in run(qwix, CASES[name]).items()
    }
    np.savez(path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
