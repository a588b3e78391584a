"""What the author of a step says of the models that it calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from flax import linen as nn
from flax import nnx

from qwix_train.core.shortened import shortened
from qwix_train.frontends import linen as linen_calls
from qwix_train.frontends import marks
from qwix_train.frontends import nnx as nnx_calls
from qwix_train.frontends.model import call_function
from qwix_train.frontends.step_arguments import RewrittenApply
from qwix_train.trace import session, subclasses

Model = TypeVar("Model")


def as_model(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a plain function as the model of the steps that call it.

    Models of Flax are known for what they are. Of any other function that a step calls
    it takes a word that it is the model: which of its arguments are params, and where
    the names of its ops begin. What wraps a step then treats it as any model:
    `wrap_train_step`, `wrap_eval_step`, `calib.Calibrator`, `calib.observe`,
    `calib.compare`, and the weight methods of `ptq`. Everywhere else the function is
    what it was.

    Args:
      fn: any JAX function whose first argument is a tree of params, as for
        `quantize_fn`. The `apply_fn` of a train state need not be marked.

    Returns:
      A function with the signature of `fn`.

    Raises:
      TypeError: if `fn` is no function.

    Example:
      >>> import jax
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, calib
      >>> forward = as_model(lambda params, x: x @ params["w"])
      >>> rule = QuantizationRule(
      ...     weight_qtype="int8", act_qtype="int8", act_static_scale=True
      ... )
      >>> calibrator = calib.Calibrator([rule])
      >>> eval_step = calibrator.wrap(jax.jit(lambda p, x: forward(p, x).mean()))
      >>> mean = eval_step({"w": jnp.ones((4, 2))}, 3 * jnp.ones((1, 4)))
      >>> calibrator.quant_stats["dot_general0_lhs"]["sum_of_absmax"]
      Array([[3.]], dtype=float32)
    """
    if not callable(fn):
        raise TypeError(f"Expected a function, got {shortened(fn)}: as_model(forward).")

    @functools.wraps(fn)
    def call(*args, **kwargs):
        return call_function(fn, args, kwargs)

    return call


def in_float(model: Model) -> Model:
    """A model or function whose calls in a wrapped step stay in float.

    A wrapped step quantizes every model call in it: with Linen wherever the model comes
    from, with NNX if the step receives it as an argument, closes over it or names it.
    A teacher, the reference model of DPO or an average of params should mostly stay in
    float: say so where they are called. A step that quantizes two trees of params of
    one model warns of that once, if it was given both of them. One that the step
    computes itself, such as an average of params, looks like the params that an
    optimizer evaluates on its way, and is not warned of; nor is anything in a step that
    JAX cannot trace, such as one that calls `float(loss)`.

    Static ranges are collected of no call that is in float. In a larger model, such as
    one that holds its own teacher, the calls are in float, too; a param that such a
    call shares with one that is quantized has its quantized values in both, as the
    plan says.

    Args:
      model: a Linen module, bound or not; an NNX module or a graph definition; a method
        of any of these, such as `model.apply`; an `apply_fn`; or any other function.

    Returns:
      The same, in float: a module of the same class, with the same fields, or a
      function with the same signature. An NNX module shares its variables with
      `model`, so that what a call writes to them is seen in both; other attributes that
      a call sets are not.

    Raises:
      TypeError: if `model` is something else, or a model that `quantize_model` made,
        which is quantized wherever it is called.

    Example:
      A student that learns, in int4, from its float teacher:

      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, wrap_train_step
      >>> model = nn.Dense(1)
      >>> teacher = model.init(jax.random.key(0), jnp.ones((2, 8)))
      >>> def train_step(params, teacher, x):
      ...     target = in_float(model).apply(teacher, x)
      ...     loss = lambda params: jnp.mean((model.apply(params, x) - target) ** 2)
      ...     grads = jax.grad(loss)(params)
      ...     return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
      >>> rules = [QuantizationRule(weight_qtype="int4")]
      >>> step = jax.jit(wrap_train_step(train_step, rules))
      >>> params = step(teacher, teacher, jnp.ones((2, 8)))
    """
    return cast(Model, _in_float(model))


def _in_float(model: Any) -> Any:
    if isinstance(model, RewrittenApply):
        model = model.function
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module | nnx.Module | nnx.GraphDef):
        method = getattr(_in_float(owner), getattr(model, "__name__", ""), None)
        if method is not None:
            return method
    if isinstance(model, nn.Module | nnx.Module):
        if subclasses.mode(model) is not None:
            raise TypeError(
                f"This {type(model).__name__} was made by quantize_model, and is "
                "quantized wherever it is called. Give in_float the model that it was "
                "made from."
            )
        if subclasses.in_float(model):
            return model
    if isinstance(model, nn.Module):
        return linen_calls.with_class(model, marks.float_class(type(model)))
    if isinstance(model, nnx.Module):
        return nnx_calls.in_float(model)
    if isinstance(model, nnx.GraphDef):
        return nnx_calls.graphdef_in_float(model)
    if not callable(model) or isinstance(model, type):
        raise TypeError(
            f"Expected a Flax module or a function, got {shortened(model)}: "
            "in_float(model).apply(teacher_params, x), or in_float(teacher)(x)."
        )

    @functools.wraps(model)
    def call(*args, **kwargs):
        with session.in_float():
            return model(*args, **kwargs)

    return call
