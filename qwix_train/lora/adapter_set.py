"""Several adapters for one base, switched without compiling again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp
from jax.core import Tracer

from qwix_train.core.errors import located
from qwix_train.lora.layout import AdapterLayout
from qwix_train.lora.parts import Layouts, checked, layouts_of, tree_of, without
from qwix_train.lora.train_state import LoraTrainState, by_path
from qwix_train.planning import table as plan_table
from qwix_train.planning.plan import Path
from qwix_train.trace.function import param_path
from qwix_train.values import stored


class AdapterSet(Mapping[str, Any]):
    """Adapters for one base, by name, in the form that one program takes.

    To switch adapters, pass other arrays to the same jitted function. It is not
    compiled again, because all adapters of the set have the same structure, shapes,
    dtypes and shardings: those of the params of the state or, if the set is made of
    layouts, those of the first adapters that were added. Adapters of a smaller rank
    than the program's are padded with zeros. If their scaling is another one, ``B`` is
    multiplied by the ratio of the two. The program then computes what the adapter was
    trained to do, up to the rounding of ``B``.

    Example:
      >>> import jax
      >>> from jax import numpy as jnp
      >>> from qwix_train.lora import AdapterSet, LoraRule, init
      >>> def model(params, x):
      ...     return x @ params["kernel"]
      >>> params, x = {"kernel": jnp.ones((8, 4))}, jnp.ones((1, 8))
      >>> def adapters(rank):
      ...     rules = [LoraRule(rank=rank, alpha=4.0)]
      ...     return init(params, model, rules, jax.random.key(0), x)
      >>> prose, _, layouts = adapters(rank=4)
      >>> code, _, narrow = adapters(rank=2)
      >>> known = AdapterSet(layouts)
      >>> known.add("prose", prose)
      >>> known.add("code", code, narrow)
      >>> [known[name]["kernel_lora_a"].shape for name in known]
      [(8, 4), (8, 4)]
    """

    def __init__(self, layouts: Layouts | LoraTrainState):
        """Takes the layouts of the program.

        Args:
          layouts: the layouts of the adapters that the jitted function takes, or the
            state whose `apply_fn` it calls. The rank of these layouts is the largest
            that adapters of the set may have.

        Raises:
          TypeError: if it is neither.
          ValueError: if there are no layouts.
        """
        is_state = isinstance(layouts, LoraTrainState)
        self._like = layouts.params if is_state else None
        self.layouts: dict[Path, AdapterLayout] = dict(layouts_of(layouts))
        if not self.layouts:
            raise ValueError(
                "There are no layouts, so the set could hold no adapter. Give the "
                "layouts that lora.init or lora.split returned, or a LoraTrainState."
            )
        self._adapters: dict[str, Any] = {}

    def add(self, name: str, adapters: Any, layouts: Layouts | None = None) -> None:
        """Adds adapters, or replaces those of this name.

        Args:
          name: a name for the adapters.
          adapters: a `LoraTrainState`, or a nested dictionary of arrays.
          layouts: their layouts. Leave them out for a state, or if they are those of
            the set. For restored adapters they are `lora.read_manifest(path).layouts`.

        Raises:
          ValueError: if the adapters are for another model, or of a larger rank; or if
            only one of adapters and program has magnitudes (DoRA). The message names
            the params.
        """
        if isinstance(adapters, LoraTrainState):
            adapters, layouts = adapters.params, adapters.layouts
        own = self.layouts if layouts is None else layouts
        with located(f"Adapters {name!r}"):
            adapters = fitted(adapters, own, self.layouts)
        if self._like is None:
            self._like = jax.tree.map(jnp.asarray, adapters)
        self._adapters[name] = _alike(adapters, self._like)

    def __getitem__(self, name: str) -> Any:
        """The adapters of a name, as the program takes them."""
        try:
            return self._adapters[name]
        except KeyError:
            known = ", ".join(map(repr, self._adapters)) or "none"
            raise KeyError(f"No adapters {name!r}; there are {known}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def stacked(self, names: Sequence[str]) -> Any:
        """The adapters of several names in one tree, for batches that mix them.

        Args:
          names: a name for each entry, such as one for each example of a batch.

        Returns:
          Adapters whose arrays have an axis for the names in front.

        Raises:
          KeyError: if there are no adapters of a name.
          ValueError: if there are no names.

        Example:
          >>> from qwix_train.lora import LoraRule, init
          >>> adapters, _, layouts = init(
          ...     {"kernel": jnp.ones((8, 4))}, lambda p, x: x @ p["kernel"],
          ...     [LoraRule(rank=2, alpha=4.0)], jax.random.key(0), jnp.ones((1, 8)),
          ... )
          >>> known = AdapterSet(layouts)
          >>> known.add("a", adapters)
          >>> known.stacked(["a", "a", "a"])["kernel_lora_a"].shape
          (3, 8, 2)

          With a `LoraTrainState` for a model that takes batches, each example of `x`
          is computed with the adapters of its name by::

              one = lambda adapters, x: state.apply_fn({"params": adapters}, x[None])[0]
              jax.vmap(one)(known.stacked(names), x)
        """
        if not names:
            raise ValueError("Give at least one name, such as one for each example.")
        return jax.tree.map(lambda *x: jnp.stack(x), *(self[name] for name in names))


def fitted(adapters: Any, layouts: Layouts, target: Layouts) -> Any:
    """Adapters in the shapes of other layouts, which add the same to each weight.

    Args:
      adapters: a nested dictionary of arrays.
      layouts: their layouts.
      target: layouts for the same params, of the same rank or a larger one.

    Returns:
      Adapters for `target`, which add to each weight what `adapters` do.

    Raises:
      ValueError: see `AdapterSet.add`.
    """
    parts = checked(adapters, layouts)
    missing, unknown = without(target, layouts), without(layouts, target)
    if missing or unknown:
        said = [f"None for {plan_table.some(missing, 3)}."] if missing else []
        if unknown:
            said.append(f"For {plan_table.some(unknown, 3)}, which have none here.")
        raise ValueError(f"they are for other params. {' '.join(said)}")
    found: dict[Path, Any] = {}
    for path, wanted in target.items():
        _check_fits(layouts[path], wanted)
        found |= _fitted(layouts[path], wanted, parts)
    return tree_of(found)


def _alike(adapters: Any, like: Any) -> Any:
    """Adapters in the structure, dtypes, boxes and shardings of others."""
    parts = by_path(adapters)

    def one(key_path, leaf):
        value, wanted = parts[param_path(key_path)], stored.unbox(leaf)
        value = jnp.asarray(value, wanted.dtype)
        if isinstance(wanted, jax.Array) and not isinstance(wanted, Tracer):
            if wanted.committed:
                value = jax.device_put(value, wanted.sharding)
            elif value.committed:  # `jit` would compile again for committed arrays.
                value = jnp.asarray(jax.device_get(value))
        return stored.box(value, leaf)

    return jax.tree_util.tree_map_with_path(one, like, is_leaf=stored.is_whole)


def _fitted(
    own: AdapterLayout, wanted: AdapterLayout, parts: Mapping[Path, Any]
) -> dict[Path, Any]:
    a, b = parts[own.name("a")], parts[own.name("b")]
    if own.scaling != wanted.scaling:
        b = b * (own.scaling / wanted.scaling)
    if own.rank != wanted.rank:
        a, b = _filled_up(a, wanted.a_shape), _filled_up(b, wanted.b_shape)
    fitted = {wanted.name("a"): a, wanted.name("b"): b}
    if wanted.dora:
        fitted[wanted.name("magnitude")] = parts[own.name("magnitude")]
    return fitted


def _filled_up(factor: Any, shape: Sequence[int]) -> Any:
    """A factor with zeros behind it, up to a shape."""
    sizes = zip(jnp.shape(factor), shape, strict=True)
    return jnp.pad(factor, [(0, wanted - size) for size, wanted in sizes])


def _check_fits(own: AdapterLayout, wanted: AdapterLayout) -> None:
    name = "/".join(own.path)
    axes = [
        dataclasses.replace(
            x, rank=1, alpha=1.0, scaling=1.0, dora=False, op="", particulars=()
        )
        for x in (own, wanted)
    ]
    if axes[0] != axes[1]:
        raise ValueError(
            f"the one of {name!r} is for a param of shape {own.shape} that is "
            f"contracted along {own.contracted}, and here it has shape "
            f"{wanted.shape} and is along {wanted.contracted}: it is another model's."
        )
    if own.rank > wanted.rank:
        raise ValueError(
            f"the one of {name!r} has rank {own.rank}, and the program has rank "
            f"{wanted.rank}. Make the state with rules of the largest rank of all."
        )
    if own.dora != wanted.dora:
        has = "a magnitude (DoRA), and the program has none"
        lacks = "no magnitude, and the program has them (DoRA)"
        raise ValueError(
            f"the one of {name!r} has {has if own.dora else lacks}. Make a state for "
            "each kind: what one computes is not what the other does."
        )
