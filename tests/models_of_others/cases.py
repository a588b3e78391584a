"""The models, what they take, and the weights that a rule for all of it quantizes."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx, traverse_util
from jax import numpy as jnp

from tests import models
from tests.models_of_others import linen_models as linen
from tests.models_of_others import nnx_models


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


TOKENS = np.random.default_rng(0).integers(0, 11, (2, 5))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model in use.

    Attributes:
        model: A Linen module, or a class of NNX modules.
        inputs: What it is called with.
        weights: Of each weight, by its path, the axes that have a scale for each index.
    """

    model: Any
    inputs: tuple[Any, ...]
    weights: dict[str, tuple[int, ...]]

    @property
    def is_linen(self) -> bool:
        return isinstance(self.model, nn.Module)

    @functools.cached_property
    def _start(self) -> Any:
        if self.is_linen:
            init = jax.jit(lambda *inputs: self.model.init(jax.random.key(1), *inputs))
            return init(*self.inputs)["params"]
        return self.model(nnx.Rngs(0))

    def params(self) -> Any:
        """The params of a Linen model, or an NNX model, of one initialization."""
        if self.is_linen:
            return jax.tree.map(lambda leaf: leaf, self._start)
        return nnx.clone(self._start)

    @functools.cached_property
    def run(self) -> Any:
        """`call`, compiled once for all tests."""
        return (jax.jit if self.is_linen else nnx.jit)(self.call)

    def call(self, params: Any) -> Any:
        """The user's code: the model, or one with these params, and its inputs."""
        if self.is_linen:
            return self.model.apply({"params": params}, *self.inputs)
        capturing = nnx.capture(params, nnx.Intermediate)
        out, _ = capturing(*self.inputs, capture=True)
        return out


CASES = {
    "gemma": Case(
        linen.Gemma(),
        (TOKENS,),
        {
            # The logits' product quantizes the table, which the lookup sees, too.
            "embedding": (0,),
            **{
                f"layer_{i}/{name}/w": axes
                for i in range(2)
                for name, axes in {
                    "qkv_einsum": (0, 1, 3),
                    "attn_vec_einsum": (2,),
                    "gating_einsum": (0, 2),
                    "linear": (1,),
                }.items()
            },
        },
    ),
    "experts": Case(
        linen.Experts(),
        (floats(2, 5, 8),),
        {"router/kernel": (1,), "w_in": (0, 2), "w_out": (0, 2)},
    ),
    "scanned on axis 1": Case(
        linen.ScannedDecoder(),
        (floats(2, 5, 8),),
        {
            "layers/up/kernel": (1, 2),
            "layers/down/kernel": (1, 2),
            "logits/kernel": (1,),
        },
    ),
    "vae": Case(
        linen.Vae(),
        (floats(3, 8),),
        {
            f"{name}/kernel": (1,)
            for name in ("hidden", "mean", "log_variance", "up", "out")
        },
    ),
    "padded encoder": Case(
        linen.PaddedEncoder(),
        (floats(2, 5, 8), np.array([5, 3])),
        {
            "attention/query/kernel": (1, 2),
            "attention/key/kernel": (1, 2),
            "attention/value/kernel": (1, 2),
            "attention/out/kernel": (2,),
            "head/kernel": (1,),
        },
    ),
    "nnx decoder": Case(
        nnx_models.Decoder,
        (TOKENS,),
        {
            "head/kernel": (1,),
            **{
                f"layers/{i}/{name}/kernel": axes
                for i in range(2)
                for name, axes in {
                    "qkv": (1, 2, 3),
                    "out": (2,),
                    "up": (1,),
                    "down": (1,),
                }.items()
            },
        },
    ),
}


def rounded(weight: Any, channels: tuple[int, ...]) -> np.ndarray:
    """An int8 weight of `models.rule`, in float64, as floats."""
    weight = np.asarray(weight, np.float64)
    shared = tuple(a for a in range(weight.ndim) if a not in channels)
    scale = models.MARGIN * np.abs(weight).max(shared, keepdims=True) / 127.5
    return np.clip(np.round(weight / scale), -128, 127) * scale


def by_hand(case: Case, params: Any) -> Any:
    """The params, or a model, with every weight rounded in NumPy."""
    if case.is_linen:
        flat = traverse_util.flatten_dict(params, sep="/")
        for path, channels in case.weights.items():
            flat[path] = jnp.asarray(rounded(flat[path], channels), jnp.float32)
        return traverse_util.unflatten_dict(flat, sep="/")
    model = nnx.clone(params)
    for path, channels in case.weights.items():
        *parents, leaf = path.split("/")
        holder: Any = model
        for parent in parents:
            holder = (
                holder[int(parent)] if parent.isdigit() else getattr(holder, parent)
            )
        param = getattr(holder, leaf)
        param[...] = jnp.asarray(rounded(param[...], channels), jnp.float32)
    return model
