"""Small models, in Linen and in NNX, and an independent fake quantization of them."""

import functools

import jax
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax import numpy as jnp

import qwix_train
from qwix_train import QuantizationRule
from tests.compare import assert_close as assert_close
from tests.compare import assert_differ as assert_differ
from tests.compare import assert_same as assert_same

MARGIN = 1.1


def rule(weight_qtype, act_qtype=None, module_path=".*", **kwargs):
    """A rule whose range is wider than the array.

    The largest element then is no exact tie between two codes, which two ways to
    compute one scale may break differently.
    """
    act = {"act_calibration_method": f"absmax,{MARGIN}"} if act_qtype else {}
    return QuantizationRule(
        module_path=module_path,
        weight_qtype=weight_qtype,
        weight_calibration_method=f"absmax,{MARGIN}",
        act_qtype=act_qtype,
        **(act | kwargs),
    )


INT8 = [rule("int8", "int8")]
INT4 = [rule("int4", "int8")]
INT2 = [QuantizationRule(weight_qtype="int2")]
NOTHING = [QuantizationRule(module_path="nowhere", weight_qtype="int8")]


@functools.partial(jax.jit, static_argnames=("bits", "shared"))
def fake_quant(x, bits, shared):
    """What the rules above do to an array, in a few lines of its own.

    Args:
      x: the array.
      bits: the width of the type.
      shared: the axes that share a scale.
    """
    bound = 2 ** (bits - 1) - 0.5
    scale = MARGIN * jnp.max(jnp.abs(x), axis=shared, keepdims=True) / bound
    scale = jnp.where(scale == 0, 1, scale)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rounded = jnp.clip(jnp.round(x / scale), low, high) * scale
    return x + jax.lax.stop_gradient(rounded - x)


def dense(params, x, weight_bits=8, act_bits=8):
    """A dense layer with both operands fake-quantized, per channel and per row."""
    kernel = fake_quant(params["kernel"], weight_bits, 0)
    if act_bits:
        x = fake_quant(x, act_bits, -1)
    return x @ kernel + params["bias"]


def normal(*shape, seed=0, dtype="float32"):
    """Normal numbers, without a program that JAX compiles for each shape."""
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jax.device_put(values.astype(jnp.dtype(dtype)))


def params_of(model, *inputs, seed=0, **kwargs):
    """Params of a Linen model by NumPy: `init` is traced, and compiles nothing."""
    shapes = jax.eval_shape(
        lambda *inputs: model.init(jax.random.key(0), *inputs, **kwargs), *inputs
    )["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        # Of the size that initializers give, and no two channels alike.
        std = max(1, leaf.size // leaf.shape[-1]) ** -0.5 if leaf.ndim > 1 else 0.1
        mean = float(path[-1] == jax.tree_util.DictKey("scale"))
        return jax.device_put(rng.normal(mean, std, leaf.shape).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, shapes)


class Mlp(nn.Module):
    """Two layers."""

    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(3)(x)


def mlp(params, x, **bits):
    """`Mlp` by hand."""
    return dense(
        params["Dense_1"], nn.relu(dense(params["Dense_0"], x, **bits)), **bits
    )


class Layers(nn.Module):
    """Three layers under `scan`."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(3 * nn.Dense(6, use_bias=False)(x)), None

        layer = nn.remat(Layer) if self.remat else Layer
        stack = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(name="layers")(x, None)[0]


class Everything(nn.Module):
    """Convolution, BatchNorm, dropout and a dense layer."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(4, (3, 3))(x[..., None])
        x = nn.relu(x).reshape(x.shape[0], -1)
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("intermediates", "features", x)
        x = self.perturb("before_head", x)
        return nn.Dense(3)(nn.relu(x))


class NnxMlp(nnx.Module):
    """Two layers, BatchNorm and dropout."""

    def __init__(self, rngs, rate=0.5):
        self.l1 = nnx.Linear(4, 8, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.l2 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.l2(self.features(x))

    def features(this, x):
        return nnx.relu(this.dropout(this.bn(this.l1(x))))


class BatchState(train_state.TrainState):
    batch_stats: dict


def classes(x):
    """Labels that can be learned."""
    return jnp.argmax(x.reshape(x.shape[0], -1)[:, :3], -1)


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def lora_state(apply_fn, params, tx, rules, rng, *inputs, **kwargs):
    """A state whose params are adapters.

    Args:
      apply_fn: `model.apply` of a Linen model, or a function of params and inputs.
      params: the params of the base.
      tx: the optimizer of the adapters.
      rules: the rules.
      rng: a random key, for the adapters.
      *inputs: inputs of the model.
      **kwargs: keyword arguments of `attach`.
    """
    is_linen = isinstance(getattr(apply_fn, "__self__", None), nn.Module)
    state = train_state.TrainState(0, apply_fn, params, tx, ())
    model = None if is_linen else apply_fn
    return qwix_train.attach(state, rules, *inputs, rng=rng, model=model, **kwargs)
