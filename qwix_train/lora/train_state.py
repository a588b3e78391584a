"""A `TrainState` whose params are adapters alone, next to a base that is frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax import nnx, serialization, struct, traverse_util
from flax.training import train_state
from jax import numpy as jnp
from jax.core import Tracer

from qwix_train.frontends import random_keys
from qwix_train.frontends.model import trace_function
from qwix_train.lora.layout import AdapterLayout
from qwix_train.lora.provider import LoraProvider
from qwix_train.lora.start import Starter
from qwix_train.planning import static_range
from qwix_train.planning.leaves import Leaf, Path
from qwix_train.planning.plan import Plan
from qwix_train.planning.rules import QuantizationRule
from qwix_train.trace import session
from qwix_train.trace.function import TracedCall, param_path
from qwix_train.values import stored


@dataclasses.dataclass(frozen=True)
class AdaptedApply:
    """An `apply_fn` that finds adapters where it expects params.

    Attributes:
      function: the `apply_fn` of the model without adapters.
      provider: the mode, with its rules.
      in_collection: whether the params are in a collection `params` of the variables,
        as for `model.apply`, or are the first argument themselves.
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
          variables: the variables that the model is called with, with adapters in the
            place of params.
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
        self.provider.check(plan)
        parts = by_path(adapters)
        self._check_known(parts)
        adapted = self.provider.adapt(traced, plan, parts)
        open_session = session.current()
        with session.suspended():
            if open_session is not None and not session.marking():
                out = open_session.rewrite(adapted)
                if out is not session.UNCHANGED:
                    return out
            return self.provider.run(adapted, plan)

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

    # Looks for an open session by itself.
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

    As `flax.struct` does, but for what `apply_fn` reads as: that is bound to arrays,
    which the structure of a tree must not hold.
    """

    def __init_subclass__(cls, **kwargs: Any):
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
    of the base, and no optimizer state for it.

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


def create_train_state(
    apply_fn: Callable[..., Any],
    params: Any,
    tx: optax.GradientTransformation,
    rules: Sequence[QuantizationRule],
    rng: jax.Array,
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    allow_unmatched: bool = False,
    donate: bool = False,
    cls: type[LoraTrainState] = LoraTrainState,
    fields: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """A train state whose params are adapters, from a model and its trained params.

    Where params are sharded as the batch is (FSDP), devices send one another codes if
    the mesh is explicit. In another, no trace says how an array is sharded: XLA has
    them send floats, dequantized from codes, unless the weight is constrained to be
    whole before the product: in the model, or in an `apply_fn` around it that
    constrains its variables by `jax.lax.with_sharding_constraint`.

    Args:
      apply_fn: `model.apply` of a Linen module, or a function whose first argument is a
        tree of params.
      params: the float params of the model, or params that `quantize_params` gave.
      tx: the optimizer of the adapters.
      rules: see `LoraProvider`.
      rng: a random key, for the adapters.
      *inputs: inputs of the model, or their shapes. Nothing is computed from them.
      variables: the other collections of the model, such as `batch_stats`.
      allow_unmatched: whether a `LoraRule` may match no weight. An error otherwise.
      donate: whether float arrays are deleted once they are quantized.
      cls: a subclass of `LoraTrainState` to make, which may have more fields.
      fields: values for these fields.
      **kwargs: keyword inputs of the model.

    Returns:
      A `LoraTrainState`. The optimizer has state for the adapters alone.

    Raises:
      TypeError: if `apply_fn` is a module, or `rng` is no random key.
      ValueError: if a `LoraRule` matches no weight; if `params` are whole variables; if
        a rule asks for static ranges that are not among the params.

    Example:
      >>> import jax
      >>> import optax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train.lora import LoraRule, create_train_state
      >>> model, x = nn.Dense(4), jnp.ones((1, 64))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> rules = [LoraRule(rank=2, alpha=4.0, weight_qtype="nf4", tile_size=64)]
      >>> state = create_train_state(
      ...     model.apply, params, optax.adam(1e-3), rules, jax.random.key(1), x
      ... )
      >>> {name: x.shape for name, x in sorted(state.params.items())}
      {'kernel_lora_a': (64, 2), 'kernel_lora_b': (2, 4)}
      >>> state.apply_fn({"params": state.params}, x).shape
      (1, 4)
    """
    adapted, adapters, frozen = _begun(
        apply_fn,
        params,
        rules,
        rng,
        inputs,
        kwargs,
        variables=variables,
        allow_unmatched=allow_unmatched,
        donate=donate,
    )
    return cls.create(
        apply_fn=adapted, params=adapters, tx=tx, frozen=frozen, **(fields or {})
    )


def init(
    params: Any,
    apply_fn: Callable[..., Any],
    rules: Sequence[QuantizationRule],
    rng: jax.Array,
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    allow_unmatched: bool = False,
    donate: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any, dict[Path, AdapterLayout]]:
    """Attaches adapters to trained params; the params are not initialized again.

    Args:
      params: see `create_train_state`.
      apply_fn: see there.
      rules: see there.
      rng: see there.
      *inputs: see there.
      variables: see there.
      allow_unmatched: see there.
      donate: see there.
      **kwargs: see there.

    Returns:
      The adapters, a nested dictionary of arrays; the params of the base, quantized
      where the rules say so; and the layout of each adapter, by the path of its param.
    """
    adapted, adapters, frozen = _begun(
        apply_fn,
        params,
        rules,
        rng,
        inputs,
        kwargs,
        variables=variables,
        allow_unmatched=allow_unmatched,
        donate=donate,
    )
    return adapters, frozen, {layout.path: layout for layout in adapted.layouts}


def by_path(tree: Any) -> dict[Path, Any]:
    """The params of a tree, by path, unboxed."""
    return stored.by_path(stored.unbox(tree))


def _begun(
    apply_fn: Any,
    params: Any,
    rules: Sequence[QuantizationRule],
    rng: jax.Array,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    variables: Mapping[str, Any] | None,
    allow_unmatched: bool,
    donate: bool,
) -> tuple[AdaptedApply, Any, Any]:
    """The apply function of a state, its adapters and its base."""
    provider = LoraProvider(rules, allow_unmatched=allow_unmatched)
    random_keys.checked(rng, "rng")
    if isinstance(apply_fn, nn.Module | nnx.Module):
        raise TypeError(
            f"Expected an apply_fn, got a {type(apply_fn).__name__}. Give model.apply "
            "of a Linen module. An NNX module gets adapters with apply_lora_to_model, "
            "and trains them with nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)."
        )
    if isinstance(params, Mapping) and "params" in params:
        others = sorted(set(params) - {"params"})
        raise ValueError(
            "Expected the params alone, got variables with the collections "
            f"{sorted(params)}. Give variables['params'] as the params, and "
            f"variables={{...}} with what else the model needs"
            + (f" ({', '.join(others)})" if others else "")
            + "; a step calls state.apply_fn({'params': state.params}, *inputs)."
        )
    is_module = isinstance(getattr(apply_fn, "__self__", None), nn.Module)
    adapted = AdaptedApply(apply_fn, provider, is_module or variables is not None)
    named = by_path(params)
    leaves_in = filter(None, (Leaf.parse(path, named) for path in named))
    if found := sorted("/".join(leaf.path) for leaf in leaves_in if leaf.is_adapter):
        raise ValueError(
            f"The params have adapters already, among them {found[0]!r}. Give the "
            "params of the base alone, or merge the adapters first: lora.merge."
        )
    first = {**(variables or {}), "params": params} if adapted.in_collection else params
    options = dict(kwargs)
    if is_module and variables:
        options.setdefault("mutable", list(variables))
    traced = adapted.traced(_shapes(first), [_shapes(x) for x in inputs], options)
    plan = provider.plan(traced)
    provider.check(plan)
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
                "wrap_train_step and with_quant_stats instead."
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
