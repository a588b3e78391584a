"""The models that a step calls: what its author says of them, and where they are.

They are among the arguments of the step, and in what it closes over.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import jax
from flax import linen as nn
from flax import nnx

from qwix_train.core.shortened import shortened
from qwix_train.frontends import attributes, marks, nnx_objects
from qwix_train.frontends import linen as linen_calls
from qwix_train.frontends import nnx as nnx_calls
from qwix_train.frontends.model import call_function
from qwix_train.trace import session, subclasses

Model = TypeVar("Model")

_APPLY = "apply_fn"
# Longer lists hold data.
_MOST_MODELS = 1000


def as_model(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a plain function as the model of the steps that call it.

    A wrapped step finds models of Flax by itself. It cannot know which of the other
    functions that it calls is a model, and which argument holds the params: mark that
    function. Then everything that wraps a step treats it like a Flax model:
    `wrap_train_step`, `wrap_eval_step`, `calib.Calibrator`, `calib.observe`,
    `calib.compare`, and the weight methods of `ptq`. Elsewhere the function stays as it
    is.

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
      >>> from qwix_train import QuantizationRule, as_model, calib
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

    A wrapped step quantizes every model call in it. With Linen, it does not matter
    where the model comes from. An NNX model is found if the step receives it as an
    argument, closes over it or names it. Use `in_float` where the step calls a model
    that should stay in float, such as a teacher, the reference model of DPO, or an
    average of params.

    A step that is given two trees of params of one model, and quantizes both, warns of
    that once. There is no warning of params that the step computes itself, such as an
    average, since some optimizers do that, too. Nor is there one in a step that JAX
    cannot trace, such as one that calls `float(loss)`.

    No static ranges are collected in these calls. `in_float` also works inside of a
    larger model, such as one that holds its own teacher. If a call in float shares a
    param with a quantized one, both see its quantized values, and the plan says so.

    Args:
      model: a Linen module, bound or not; an NNX module or a graph definition; a method
        of any of these, such as `model.apply`; an `apply_fn`; or any other function.

    Returns:
      The same, in float: a module of the same class, with the same fields, or a
      function with the same signature. An NNX module shares its variables with
      `model`: what a call writes to them is seen in both. Other attributes that a call
      sets are not shared.

    Raises:
      TypeError: if `model` is something else, or a model that `quantize_model` made,
        which is quantized wherever it is called.

    Example:
      A student that learns, in int4, from its float teacher:

      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, in_float, wrap_train_step
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


class RewrittenApply:
    """An `apply_fn` that is no Linen module's, rewritten while a session is open.

    Equal to the function it stands for, so that a train state that holds it has the
    same tree structure as the user's.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function, rewritten."""
        return call_function(self.function, args, kwargs)

    def __eq__(self, other: object) -> bool:
        return self.function == getattr(other, "function", other)

    def __hash__(self) -> int:
        return hash(self.function)


class _InterceptedApply(RewrittenApply):
    """The `apply` of an NNX graph definition, whose modules are intercepted."""

    def __call__(self, *args, **kwargs):
        graphdef = nnx_calls.intercepted_graphdef(self.function.__self__)
        return graphdef.apply(*args, **kwargs)


def _enter_apply(apply_fn: Any) -> Any:
    if not callable(apply_fn) or getattr(apply_fn, "rewrites_itself", False):
        return apply_fn
    owner = getattr(apply_fn, "__self__", None)
    if isinstance(owner, nn.Module):
        return apply_fn  # its calls are intercepted
    is_graphdef = isinstance(owner, nnx.GraphDef)
    return (_InterceptedApply if is_graphdef else RewrittenApply)(apply_fn)


def _leave_apply(apply_fn: Any) -> Any:
    return apply_fn.function if isinstance(apply_fn, RewrittenApply) else apply_fn


def entered(tree: Any) -> Any:
    """The arguments of a step with the models in them rewritten while it runs.

    These are the graph definitions and the `apply_fn`s, in the fields of states, too,
    static or not. All else stays the same object: NNX modules are trees, too, but a
    copy of one would not see the step's updates.

    Args:
      tree: the arguments.
    """
    return _map_models(tree, _enter_apply, nnx_calls.intercepted_graphdef)


def left(tree: Any) -> Any:
    """The results of a step with the models in them as they were before it.

    Args:
      tree: the results.
    """
    return _map_models(tree, _leave_apply, nnx_calls.original_graphdef)


def _map_models(tree, change_apply, change_graphdef):
    def change(value):
        if isinstance(value, nnx.GraphDef):
            return change_graphdef(value)
        if nnx_objects.is_node(value) or not _is_state(value):
            return value
        changes = {}
        for name in _fields_of(value):
            old = getattr(value, name)
            new = change_apply(old) if name == _APPLY else changed(old)
            if new is not old:
                changes[name] = new
        return _replaced(value, changes) if changes else value

    def changed(tree):
        leaves, structure = jax.tree.flatten(tree, is_leaf=_is_whole)
        new = [change(leaf) for leaf in leaves]
        if all(map(operator.is_, leaves, new)):
            return tree
        return jax.tree.unflatten(structure, new)

    return changed(tree)


def _is_whole(value: Any) -> bool:
    is_model = nnx_objects.is_node(value) or isinstance(value, nnx.GraphDef)
    return is_model or _is_state(value)


def _is_state(value: Any) -> bool:
    """Whether an object has fields that may hold models: a dataclass, as most have."""
    is_dataclass, has_replace = _kind_of_state(type(value))
    return is_dataclass or (has_replace and attributes.has(value, _APPLY))


@functools.cache
def _kind_of_state(cls: type) -> tuple[bool, bool]:
    # Cached, since each leaf of a state is asked.
    if issubclass(cls, type | nn.Module):
        return False, False
    return dataclasses.is_dataclass(cls), attributes.has(cls, "replace")


def _fields_of(state: Any) -> list[str]:
    if not dataclasses.is_dataclass(state):
        return [_APPLY]
    names = [field.name for field in dataclasses.fields(state)]
    return [name for name in names if attributes.has(state, name)]


def _replaced(state: Any, changes: dict[str, Any]) -> Any:
    if attributes.has(state, "replace"):
        return state.replace(**changes)
    state = copy.copy(state)
    for name, value in changes.items():
        object.__setattr__(state, name, value)
    return state


def held_modules(step: Callable[..., Any]) -> list[Any]:
    """The NNX objects that a step holds without receiving them as arguments.

    These are what it, and the functions that it calls, close over or name as globals
    of their module, and the attributes of the object whose method it is.

    Args:
      step: the step.
    """
    function = step
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(inspect.unwrap(function), "__globals__", {})
    return list(_held(step, module, set()))


def _held(value: Any, module: dict[str, Any], seen: set[int]) -> Iterator[Any]:
    """The NNX objects within a value.

    Args:
      value: any object.
      module: the globals of the step. Functions of other modules are libraries, and
        hold no models.
      seen: the identities of the objects met before.
    """
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: Iterable[Any] = ()
    if nnx_objects.is_node(value):
        yield value
    elif isinstance(value, functools.partial):
        inner = (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        held = value.__self__
        inner = (value.__func__, held, *getattr(held, "__dict__", {}).values())
    elif isinstance(value, types.FunctionType):
        inner = _named_in(value, module)
    elif isinstance(value, list | tuple | dict) and len(value) < _MOST_MODELS:
        inner = value.values() if isinstance(value, dict) else value
    elif callable(value) and attributes.has(value, "__wrapped__"):
        inner = (value.__wrapped__,)  # compiled
    for part in inner:
        yield from _held(part, module, seen)


def _named_in(function: types.FunctionType, module: dict[str, Any]) -> Iterator[Any]:
    """What a function closes over, and the globals of a module that it names."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            yield cell.cell_contents
    if function.__globals__ is module:
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            yield from (module[name] for name in code.co_names if name in module)
            codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    yield getattr(function, "__wrapped__", None)
