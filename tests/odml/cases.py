"""The models of the coverage suite: one for each thing that a phone's model does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from jax import lax
from jax import numpy as jnp


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of the suite.

    Attributes:
      model: a Linen module, a class of NNX modules, or a function of a dict of params.
      shape: the shape of its input; of several, a tuple of shapes.
      single: whether it is one operation, whose outputs must be equal.
      exceptions: the operators that stay in float.
      integers: the number of values of an integer input; None for floats.
      positive: whether inputs are positive.
      params: for a function, the shapes of its params.
    """

    model: Any
    shape: Any = (2, 8)
    single: bool = False
    exceptions: tuple[str, ...] = ()
    integers: int | None = None
    positive: bool = False
    params: Any = None


def module(call: Callable[..., Any]) -> nn.Module:
    """A Linen module from a compact method."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, *args):
            return call(self, *args)

    return Model()


def function(call: Callable[..., Any]) -> nn.Module:
    """A Linen module without params, from a function of its inputs."""
    return module(lambda self, *args: call(*args))


def dense(features, **kwargs):
    return nn.Dense(features, bias_init=nn.initializers.normal(0.2), **kwargs)


def conv(features, kernel=(3, 3), **kwargs):
    return nn.Conv(features, kernel, bias_init=nn.initializers.normal(0.2), **kwargs)


def norm(**kwargs):
    return nn.BatchNorm(use_running_average=True, **kwargs)


def _cnn(self, x):
    x = nn.relu(conv(8)(x))
    x = nn.max_pool(x, (2, 2), (2, 2))
    x = nn.relu(conv(8, strides=(2, 2))(x))
    return dense(10)(x.reshape(x.shape[0], -1))


def _separable(self, x):
    for features in (8, 12):
        x = conv(x.shape[-1], feature_group_count=x.shape[-1], use_bias=False)(x)
        x = nn.relu6(norm()(x))
        x = nn.relu6(norm()(conv(features, (1, 1), use_bias=False)(x)))
    return x.mean((1, 2))


def _residual(self, x):
    x = conv(8)(x)
    y = nn.relu(norm()(conv(8)(x)))
    return nn.relu(x + norm()(conv(8)(y)))


def _concat(self, x):
    return conv(4)(jnp.concatenate([x, nn.relu(conv(4)(x))], axis=-1))


def _inception(self, x):
    a = nn.relu(conv(4, (1, 1))(x))
    b = nn.relu(conv(4)(nn.relu(conv(4, (1, 1))(x))))
    c = conv(4, (1, 1))(nn.max_pool(x, (3, 3), (1, 1), "SAME"))
    return jnp.concatenate([a, b, c], axis=-1)


def _attention(self, x):
    h = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(2)(h)
    h = nn.LayerNorm()(x)
    return x + dense(8)(nn.gelu(dense(16)(h)))


def _causal(self, x):
    mask = nn.make_causal_mask(x[..., 0])
    return nn.MultiHeadDotProductAttention(2)(x, mask=mask)


def _additive_mask(self, x):
    mask = jnp.where(jnp.tril(jnp.ones((6, 6))) > 0, 0.0, -1e9)
    scores = jnp.einsum("bqd,bkd->bqk", dense(8)(x), dense(8)(x)) + mask
    return jnp.einsum("bqk,bkd->bqd", nn.softmax(scores / 4), x)


def _lstm_cell(self, x):
    cell = nn.LSTMCell(8)
    carry = (jnp.zeros((x.shape[0], 8)), jnp.zeros((x.shape[0], 8)))
    (_, h), _ = cell(carry, x)
    return h


def _lstm(self, x):
    return nn.RNN(nn.LSTMCell(4))(x)


def _squeeze_excite(self, x):
    s = x.mean((1, 2), keepdims=True)
    s = nn.sigmoid(conv(x.shape[-1], (1, 1))(nn.relu(conv(2, (1, 1))(s))))
    return x * s


def _mixer(self, x):
    y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
    y = dense(6)(nn.gelu(dense(12)(y)))
    x = x + jnp.swapaxes(y, 1, 2)
    return x + dense(8)(nn.gelu(dense(16)(nn.LayerNorm()(x))))


def _unet(self, x):
    a = nn.relu(conv(4)(x))
    b = nn.relu(conv(8)(nn.max_pool(a, (2, 2), (2, 2))))
    up = jax.image.resize(b, (*a.shape[:3], 8), "nearest")
    return conv(2)(jnp.concatenate([a, up], axis=-1))


def _norm_after_relu(self, x):
    return norm()(nn.relu(conv(6)(x)))


def _shared(self, x):
    layer = dense(8)
    return layer(nn.relu(layer(x)))


def _outputs(self, x):
    h = nn.relu(dense(8)(x))
    return {"logits": dense(4)(h), "value": nn.tanh(dense(1)(h))}


def _scalars(self, x):
    return (dense(6)(x) * 0.5 + 1.25) / 3.0 - x[:, :6] * -2.0


def _einsum(self, x):
    w = self.param("w", nn.initializers.normal(0.5), (8, 3, 4))
    b = self.param("b", nn.initializers.normal(0.5), (3, 4))
    return jnp.einsum("bi,iho->bho", x, w) + b


def _einsum_weight_first(self, x):
    w = self.param("w", nn.initializers.normal(0.5), (3, 4, 8))
    return jnp.einsum("hoi,bi->bho", w, x)


def _embedding(self, ids):
    return dense(4)(nn.Embed(16, 8)(ids))


def _classify(self, x):
    return jnp.argmax(dense(5)(x), axis=-1)


def _gather(self, x):
    return jnp.take(dense(6)(x), jnp.array([3, 0, 5]), axis=1, mode="clip")


def _dense_norm(self, x):
    return nn.relu(norm()(dense(6)(x)))


def _norm_first(self, x):
    return dense(4)(nn.relu(norm()(x)))


def _gru(self, x):
    return nn.RNN(nn.GRUCell(4))(x)


def _mlp_params(params, x):
    h = jax.nn.relu(x @ params["w1"] + params["b1"])
    return h @ params["w2"] + params["b2"]


class NnxCnn(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.dense(self.dropout(x.mean((1, 2))))


class NnxTransformer(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attention(self.norm(x))
        return x + nnx.silu(self.dense(x))


IMAGE = (2, 8, 8, 3)
SEQUENCE = (2, 6, 8)

CASES: dict[str, Case] = {
    # Whole models.
    "cnn": Case(module(_cnn), IMAGE),
    "depthwise_separable": Case(module(_separable), IMAGE),
    "residual": Case(module(_residual), IMAGE),
    "concat": Case(module(_concat), IMAGE),
    "inception": Case(module(_inception), IMAGE),
    "transformer_block": Case(module(_attention), SEQUENCE),
    "causal_attention": Case(module(_causal), SEQUENCE),
    "additive_mask": Case(module(_additive_mask), SEQUENCE),
    "layer_norm": Case(module(lambda self, x: nn.LayerNorm()(x)), SEQUENCE),
    "rms_norm": Case(module(lambda self, x: nn.RMSNorm()(x)), SEQUENCE),
    "group_norm": Case(module(lambda self, x: nn.GroupNorm(2)(x)), (2, 4, 4, 8)),
    "embedding": Case(module(_embedding), (2, 5), integers=16),
    "lstm_cell": Case(module(_lstm_cell)),
    "lstm": Case(module(_lstm), (2, 4, 8)),
    "gru": Case(module(_gru), (2, 3, 8)),
    "squeeze_excite": Case(module(_squeeze_excite), (2, 6, 6, 4)),
    "mlp_mixer": Case(module(_mixer), SEQUENCE),
    "unet": Case(module(_unet), IMAGE),
    "norm_after_relu": Case(module(_norm_after_relu), IMAGE),
    "norm_first": Case(module(_norm_first)),
    "dense_norm": Case(module(_dense_norm)),
    "shared_layer": Case(module(_shared)),
    "outputs": Case(module(_outputs)),
    "scalars": Case(module(_scalars)),
    "classify": Case(module(_classify)),
    "cast": Case(
        module(lambda self, x: dense(4)(x.astype(jnp.float32) / 16)),
        integers=16,
        exceptions=("CAST",),  # what makes floats of integers
    ),
    "gather": Case(module(_gather)),
    "function": Case(
        _mlp_params, params={"w1": (8, 6), "b1": (6,), "w2": (6, 4), "b2": (4,)}
    ),
    "nnx_cnn": Case(NnxCnn, IMAGE),
    "nnx_transformer": Case(NnxTransformer, (2, 5), integers=16),
    # Single operations.
    "dense": Case(module(lambda self, x: dense(8)(x)), single=True),
    "dense_3d": Case(module(lambda self, x: dense(8)(x)), SEQUENCE, single=True),
    "dense_general": Case(
        module(lambda self, x: nn.DenseGeneral((3, 4), axis=(-2, -1))(x)),
        SEQUENCE,
        single=True,
    ),
    "einsum": Case(module(_einsum), single=True),
    "einsum_weight_first": Case(module(_einsum_weight_first), single=True),
    "conv": Case(module(lambda self, x: conv(8)(x)), IMAGE, single=True),
    "conv_dilated": Case(
        module(lambda self, x: conv(8, kernel_dilation=2)(x)), IMAGE, single=True
    ),
    "conv_grouped": Case(
        module(lambda self, x: conv(8, feature_group_count=2)(x)),
        (2, 8, 8, 4),
        single=True,
    ),
    "depthwise": Case(
        module(lambda self, x: conv(8, feature_group_count=4)(x)),
        (2, 8, 8, 4),
        single=True,
    ),
    "conv_1d": Case(
        module(lambda self, x: nn.relu(conv(8, (3,))(x))), SEQUENCE, single=True
    ),
    "conv_causal": Case(
        module(lambda self, x: conv(8, (3,), padding="CAUSAL")(x)),
        SEQUENCE,
        single=True,
    ),
    "conv_transposed": Case(
        module(lambda self, x: nn.ConvTranspose(4, (3, 3), (2, 2))(x)),
        (2, 4, 4, 3),
        single=True,
    ),
    "conv_transposed_valid": Case(
        module(lambda self, x: nn.ConvTranspose(4, (2, 2), (2, 2), padding="VALID")(x)),
        (2, 4, 4, 3),
        single=True,
    ),
    "attention_product": Case(
        function(lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b)),
        ((2, 3, 2, 4), (2, 5, 2, 4)),
        single=True,
    ),
    "add": Case(function(lambda a, b: a + b), ((2, 8), (2, 8)), single=True),
    "subtract": Case(function(lambda a, b: a - b), ((2, 8), (2, 8)), single=True),
    "multiply": Case(function(lambda a, b: a * b), ((2, 8), (2, 1)), single=True),
    "divide": Case(
        function(lambda a, b: a / b), ((2, 8), (2, 8)), single=True, positive=True
    ),
    "power": Case(function(lambda x: x**3)),
    "negative": Case(function(lambda x: -x), single=True),
    "concatenate": Case(
        function(lambda a, b: jnp.concatenate([a, b], -1)),
        ((2, 8), (2, 4)),
        single=True,
    ),
    "stack": Case(
        function(lambda a, b: jnp.stack([a, b], 1)), ((2, 8), (2, 8)), single=True
    ),
    "maximum": Case(function(jnp.maximum), ((2, 8), (2, 8)), single=True),
    "pad": Case(
        function(lambda x: 2.0 * jnp.pad(x, ((0, 0), (1, 2)))), (2, 8), single=True
    ),
    "split": Case(
        function(lambda x: [2.0 * y for y in jnp.split(x, 2, -1)]), single=True
    ),
    "roll": Case(function(lambda x: jnp.roll(x, 3, -1)), single=True),
    "repeat": Case(function(lambda x: 2.0 * jnp.repeat(x, 2, axis=1)), single=True),
    "max_pool": Case(
        function(lambda x: nn.max_pool(x, (2, 2), (2, 2))), IMAGE, single=True
    ),
    "avg_pool": Case(
        function(lambda x: nn.avg_pool(x, (2, 2), (2, 2))), IMAGE, single=True
    ),
    "avg_pool_same": Case(
        function(lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME")), IMAGE, single=True
    ),
    "avg_pool_without_padding": Case(
        function(
            lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
        ),
        IMAGE,
        single=True,
    ),
    "mean": Case(function(lambda x: x.mean((1, 2))), IMAGE, single=True),
    "sum": Case(function(lambda x: x.sum(-1)), single=True),
    "max": Case(function(lambda x: x.max(-1)), single=True),
    "clip": Case(function(lambda x: jnp.clip(x, -0.5, 0.8)), single=True),
    "softmax": Case(function(nn.softmax), single=True),
    "softmax_axis": Case(function(lambda x: nn.softmax(x, 1)), SEQUENCE, single=True),
    "log_softmax": Case(function(nn.log_softmax)),
    "sigmoid": Case(function(nn.sigmoid), single=True),
    "tanh": Case(function(nn.tanh), single=True),
    "gelu": Case(function(nn.gelu), single=True),
    "silu": Case(function(nn.silu), single=True),
    "hard_swish": Case(function(nn.hard_swish), single=True),
    "hard_sigmoid": Case(function(nn.hard_sigmoid)),
    "leaky_relu": Case(function(lambda x: nn.leaky_relu(x, 0.2)), single=True),
    "elu": Case(function(nn.elu)),
    "exp": Case(function(jnp.exp), single=True),
    "log": Case(function(jnp.log), single=True, positive=True),
    "rsqrt": Case(function(lax.rsqrt), single=True, positive=True),
    "sqrt": Case(function(jnp.sqrt), single=True, positive=True),
    "abs": Case(function(jnp.abs), single=True),
    "where": Case(
        function(lambda x: jnp.where(jnp.arange(8) < 3, x, 0.0)), single=True
    ),
    "resize_bilinear": Case(
        function(lambda x: jax.image.resize(x, (2, 16, 16, 3), "bilinear")), IMAGE
    ),
}
