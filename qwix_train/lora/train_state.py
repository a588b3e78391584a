"""A `TrainState` whose params are adapters alone, next to a base that is frozen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import serialization, struct, traverse_util
from flax.training import train_state
from jax import numpy as jnp
from jax.core import Tracer

from qwix_train.frontends import random_keys
from qwix_train.frontends.model import trace_function
from qwix_train.frontends.targets import model_call
from qwix_train.lora.layout import AdapterLayout
from qwix_train.lora.provider import LoraProvider
from qwix_train.lora.start import Starter
from qwix_train.planning import static_range
from qwix_train.planning.leaves import Leaf, Path
from qwix_train.planning.plan import Plan
from qwix_train.planning.provider import check
from qwix_train.planning.rules import QuantizationRule
from qwix_train.trace import session
from qwix_train.trace.function import TracedCall, param_path
from qwix_train.values import stored


@dataclasses.dataclass(frozen=True)
class AdaptedApply:
    """An `apply_fn` that takes adapters in the place of params.

    Attributes:
      function: the `apply_fn` of the model without adapters.
      provider: the mode, with its rules.
      in_collection: whether the params are in a collection `params` of the variables,
        as for `model.apply`. Otherwise they are the first argument.
      layouts: the shapes of the adapters.
    """

    function: Callable[..., Any]
    provider: LoraProvider
    in_collection: bool
    layouts: tuple[AdapterLayout, ...] = ()

    def __call__(
        self, frozen: Any, variables: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Calls the function with a base and adapters.

        Args:
          frozen: the params of the base.
          variables: the variables of the call, with adapters in the place of params.
          args: the arguments after the variables.
          kwargs: the keyword arguments.
        """
        adapters = variables
        if self.in_collection:
            if not isinstance(variables, Mapping) or "params" not in variables:
                raise ValueError(
                    "apply_fn takes variables with the adapters as their params: "
                    'state.apply_fn({"params": state.params}, *inputs).'
                )
            adapters = variables["params"]
        first = {**variables, "params": frozen} if self.in_collection else frozen
        traced = self.traced(first, args, kwargs)
        plan = self.provider.plan(traced)
        check(self.provider, plan)
        parts = by_path(adapters)
        self._check_known(parts)
        adapted = self.provider.adapt(traced, plan, parts)
        open_session = session.current()
        with session.suspended():
            if open_session is not None and not session.marking():
                out = open_session.rewrite(adapted)
                if out is not session.UNCHANGED:
                    return out
            return self.provider.transform(adapted, plan)

    def traced(
        self, first: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> TracedCall:
        """A trace of the function."""
        return trace_function(self.function, (first, *args), dict(kwargs))

    def _check_known(self, parts: Mapping[Path, Any]) -> None:
        known = {path for layout in self.layouts for path in layout.shapes}
        if unknown := sorted(set(parts) - known):
            names = ["/".join(path) for path in unknown]
            raise ValueError(
                f"{len(names)} params are no adapters of this state, among them "
                f"{names[0]!r}. Its params are adapters alone (state.params), and the "
                "base is in state.frozen."
            )


class _BoundApply:
    """The `apply_fn` of a state, with the base of that state."""

    # It looks for an open session itself, so it must not be wrapped.
    rewrites_itself = True

    def __init__(self, adapted: AdaptedApply, frozen: Any):
        self.adapted = adapted
        self.frozen = frozen

    def __call__(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        return self.adapted(self.frozen, variables, args, kwargs)


class _ApplyField:
    """The static field `apply_fn`, which reads bound to the base of the state."""

    def __get__(self, state: Any, owner: Any = None) -> Any:
        if state is None:
            return self
        held = vars(state)["apply_fn"]
        return _BoundApply(held, state.frozen) if _is_adapted(held) else held

    def __set__(self, state: Any, value: Any) -> None:
        vars(state)["apply_fn"] = getattr(value, "adapted", value)


def _is_adapted(value: Any) -> bool:
    return isinstance(value, AdaptedApply)


class _BoundFields:
    """Registers its subclasses as trees, by the fields that they hold.

    `flax.struct` does the same, but it would take `apply_fn` as a part of the structure
    of the tree. That function is bound to arrays, which a structure must not hold.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        dataclasses.dataclass(frozen=True, **kwargs)(cls)
        fields = {
            field.name: field.metadata.get("pytree_node", True)
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        }
        data = [name for name, is_node in fields.items() if is_node]
        meta = [name for name, is_node in fields.items() if not is_node]

        def flatten(state):
            keys = map(jax.tree_util.GetAttrKey, data)
            children = tuple((key, getattr(state, key.name)) for key in keys)
            return children, tuple(vars(state)[name] for name in meta)

        def unflatten(static, children):
            state = object.__new__(cls)
            pairs = [*zip(data, children, strict=True), *zip(meta, static, strict=True)]
            for name, value in pairs:
                object.__setattr__(state, name, value)
            return state

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)

        def to_state_dict(state):
            return {
                name: serialization.to_state_dict(getattr(state, name)) for name in data
            }

        def from_state_dict(state, values):
            restored = {
                name: serialization.from_state_dict(
                    getattr(state, name), values[name], name=name
                )
                for name in data
            }
            return state.replace(**restored)

        serialization.register_serialization_state(cls, to_state_dict, from_state_dict)
        cls._flax_dataclass = True  # type: ignore[attr-defined]


class LoraTrainState(_BoundFields, train_state.TrainState):
    """A `TrainState` that trains adapters.

    A step that takes the gradient with respect to `params`, and calls
    `state.apply_fn({"params": params}, ...)`, trains the adapters: there is no gradient
    of the base, and no optimizer state for it. `qwix_train.attach` makes one.

    With params that are sharded as the batch is (FSDP), devices send one another codes
    if the mesh is explicit. On an auto mesh, the trace does not say how an array is
    sharded, and XLA sends floats. To send codes there, too, constrain the weight to be
    whole before the product, with `jax.lax.with_sharding_constraint`: in the model, or
    in an `apply_fn` around it that constrains its variables.

    Attributes:
      params: the adapters: a nested dictionary of arrays.
      frozen: the params of the base, some of which may be quantized.
    """

    frozen: Any = struct.field(default_factory=dict)

    def replace(self, **updates: Any) -> LoraTrainState:
        """A new state with other values for some of its fields."""
        return dataclasses.replace(self, **updates)

    @property
    def layouts(self) -> dict[Path, AdapterLayout]:
        """The shapes of the adapters, by the path of their param."""
        return {layout.path: layout for layout in vars(self)["apply_fn"].layouts}

    @property
    def provider(self) -> LoraProvider:
        """The mode of the model, with its rules."""
        return vars(self)["apply_fn"].provider

    def deterministic(self, switch: bool | None = True) -> LoraTrainState:
        """The same state with dropout of adapters off, or as its model says.

        Args:
          switch: True for off, False for on, None for what each call says.
        """
        held = vars(self)["apply_fn"]
        provider = LoraProvider(
            held.provider.rules,
            deterministic=switch,
            allow_unmatched=held.provider.allow_unmatched,
        )
        return self.replace(apply_fn=dataclasses.replace(held, provider=provider))


LoraTrainState.apply_fn = _ApplyField()  # type: ignore[assignment]


def with_adapters(
    state: Any,
    adapted: AdaptedApply,
    first: Any,
    rng: Any,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    donate: bool = False,
) -> LoraTrainState:
    """Makes a train state that trains adapters from one that trains the whole model.

    Args:
      state: the state: a `TrainState`, of a class of your own, too.
      adapted: see `begin`.
      first: see `begin`.
      rng: see `begin`.
      inputs: see `begin`.
      kwargs: see `begin`.
      donate: see `begin`.

    Returns:
      A `LoraTrainState`, which is of the class of the state, too. Its optimizer has
      state for the adapters alone.

    Raises:
      ValueError: if the state has adapters already.
    """
    if _is_adapted(vars(state).get("apply_fn")):
        raise ValueError(
            "The state has adapters already: its params are adapters alone. Merge them "
            "first, with lora.merge, or attach to the float state once more."
        )
    adapted, adapters, frozen = begin(
        adapted, first, rng, inputs, kwargs, donate=donate
    )
    fields = {
        field.name: getattr(state, field.name) for field in dataclasses.fields(state)
    }
    fields["apply_fn"], fields["params"] = adapted, adapters
    fields["opt_state"] = state.tx.init(adapters)
    return _with_frozen(type(state))(**fields, frozen=frozen)


@functools.cache
def _with_frozen(cls: type) -> type:
    """A subclass of the class of a train state that trains adapters."""
    if cls is train_state.TrainState:
        return LoraTrainState
    if issubclass(cls, LoraTrainState):
        return cls
    fields = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(f"{cls.__name__}WithAdapters", (LoraTrainState, cls), fields)


def init(
    params: Any,
    apply_fn: Callable[..., Any],
    rules: Sequence[QuantizationRule],
    rng: jax.Array,
    *inputs: Any,
    allow_unmatched: bool = False,
    donate: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any, dict[Path, AdapterLayout]]:
    """Adapters for trained params, and their base, as separate trees.

    `attach` gives adapters to a train state, or to a model and its params.

    Args:
      params: the float params of the model, or params that `quantize_params` gave; or
        the variables of a Linen model with other collections, such as `batch_stats`.
      apply_fn: the Linen module or its `apply`, or a function whose first argument is
        `params`.
      rules: see `LoraProvider`.
      rng: a random key, for the adapters.
      *inputs: inputs of the model, or their shapes. Nothing is computed from them.
      allow_unmatched: whether a `LoraRule` may match no weight. An error otherwise.
      donate: whether float arrays are deleted once they are quantized.
      **kwargs: keyword inputs of the model.

    Returns:
      The adapters, a nested dictionary of arrays; the params of the base, quantized
      where the rules say so; and the layout of each adapter, by the path of its param.

    Raises:
      TypeError: if `apply_fn` is an NNX module, or `rng` is not a random key.
      ValueError: if a `LoraRule` matches no weight, a rule asks for static ranges that
        are not among the params, or the model has a collection that is not given.
    """
    call = model_call(params, apply_fn)
    provider = LoraProvider(rules, allow_unmatched=allow_unmatched)
    adapted = AdaptedApply(call.function, provider, call.in_collection)
    given = {**call.kwargs, **kwargs}
    with call.naming_missing_collections(inputs, kwargs):
        adapted, adapters, frozen = begin(
            adapted, call.first, rng, inputs, given, donate=donate
        )
    return adapters, frozen, {layout.path: layout for layout in adapted.layouts}


def by_path(tree: Any) -> dict[Path, Any]:
    """The params of a tree, by path, unboxed."""
    return stored.by_path(stored.unbox(tree))


def begin(
    adapted: AdaptedApply,
    first: Any,
    rng: Any,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    donate: bool = False,
) -> tuple[AdaptedApply, Any, Any]:
    """The apply function of a model with adapters, its adapters and its base.

    Args:
      adapted: the apply function, which has no adapters yet.
      first: what the model takes first: params, or variables.
      rng: a random key, for the adapters.
      inputs: inputs of the model, or their shapes.
      kwargs: keyword inputs.
      donate: whether float arrays are deleted once they are quantized.
    """
    random_keys.checked(rng, "rng")
    provider = adapted.provider
    params = first["params"] if adapted.in_collection else first
    named = by_path(params)
    leaves_in = filter(None, (Leaf.parse(path, named) for path in named))
    if found := sorted("/".join(leaf.path) for leaf in leaves_in if leaf.is_adapter):
        raise ValueError(
            f"The params have adapters already, among them {found[0]!r}. Give the "
            "params of the base alone, or merge the adapters first: lora.merge."
        )
    traced = adapted.traced(_shapes(first), [_shapes(x) for x in inputs], kwargs)
    plan = provider.plan(traced)
    check(provider, plan)
    provider.check_rules_matched(plan)
    _check_ranges(plan, traced)
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=stored.is_whole
    )
    boxes = {param_path(path): leaf for path, leaf in leaves if stored.is_box(leaf)}
    starter = Starter(plan, rng, boxes)
    last = {id(leaf): index for index, (_, leaf) in enumerate(leaves)}
    frozen = []
    for index, (key_path, leaf) in enumerate(leaves):
        value = stored.unbox(leaf)
        base = starter.base(param_path(key_path), value)
        frozen.append(leaf if base is value else stored.box(base, leaf))
        if donate and base is not value and last[id(leaf)] == index:
            _delete(value, base)
    adapted = dataclasses.replace(adapted, layouts=tuple(starter.layouts.values()))
    adapters = traverse_util.unflatten_dict(starter.adapters)
    return adapted, adapters, jax.tree.unflatten(structure, frozen)


def _check_ranges(plan: Plan, traced: TracedCall) -> None:
    """Complains of rules for static ranges that are not among the params."""
    for static in static_range.static_operands(plan):
        if Leaf(static.path, "scale").among(traced.named) is None:
            remedy = (
                "Give params that quantize_params made with quant_stats; or, to have "
                "ranges in the state that steps update, give that rule to "
                "wrap_train_step, and to attach once more."
            )
            raise static_range.missing(static.path, static.op, remedy)


def _delete(value: Any, base: Any) -> None:
    if isinstance(value, jax.Array) and not isinstance(value, Tracer):
        jax.block_until_ready(base)
        value.delete()


def _shapes(tree: Any) -> Any:
    """The shapes of the arrays in a tree; all else stays."""

    def shape(x):
        if isinstance(x, np.ndarray):
            return jax.eval_shape(jnp.asarray, x)  # in a dtype that JAX has
        return stored.shape_of(x) if isinstance(x, jax.Array) else x

    return jax.tree.map(shape, tree)
