"""What travels from one format of saved params to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from flax import traverse_util

from qwix_train.core.numerics import qtype_name
from qwix_train.planning.leaves import Leaf, Path
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq import compressed_tensors, params
from qwix_train.ptq.hugging_face.places import Place, TensorMapping
from qwix_train.saved import products
from qwix_train.values import stored


@dataclasses.dataclass(frozen=True)
class Params:
    """The params of a model, and what a file says beside them.

    Attributes:
      shapes: nested dictionaries of their shapes, as they are saved: a `WithAux` of
        shapes is a quantized param.
      load: reads them. Its argument is a tree like `shapes`, which says what is to be
        quantized on the way, and what is not.
      mapping: the place of each tensor, if the caller or the format says it.
      are_named: whether names of params tell what they are, as Flax's do: that a matrix
        `kernel` is multiplied by an input from the left, and an `embedding` is a table.
      types_in_file: the types of tensors that are quantized in the file and stand in
        `shapes` in float.
      rules: the rules that they were quantized by, if the file has them.
      config: the entries of a `config.json` beside them.
      metadata: what the user added.
    """

    shapes: Any
    load: Callable[[Any], Any]
    mapping: TensorMapping | None = None
    are_named: bool = True
    types_in_file: tuple[str, ...] = ()
    rules: Sequence[QuantizationRule] = ()
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None

    @property
    def places(self) -> TensorMapping:
        """The place of each tensor, by the names of params if nothing else is said."""
        return self.mapping or default_places(self.shapes)

    @property
    def quantized(self) -> dict[Path, Any]:
        """The params that are quantized, by path."""
        leaves = stored.by_path(self.shapes)
        return {path: x for path, x in leaves.items() if stored.is_quantized(x)}

    @property
    def types(self) -> list[str]:
        """The types of those."""
        weights = (x for p, x in self.quantized.items() if Leaf.parse(p) is None)
        return sorted({qtype_name(x.how.qtype) for x in weights})

    def quantize(self, rules: Sequence[QuantizationRule]) -> Params:
        """The params with those quantized that rules match, as in a model.

        Raises:
          ValueError: if some are quantized already, or it is not known which are
            multiplied, or no rule matches one of these.
        """
        if self.quantized:
            raise ValueError(
                f"The params are quantized already ({', '.join(self.types)}), and "
                "would be rounded twice. Quantize the float params; or make float "
                "params of these first (to_float=True, --weights float)."
            )
        if not self.are_named:
            raise ValueError(
                "The names of the tensors do not say which of their matrices are "
                "multiplied, and which are tables. Give the mapping of the model's "
                "family: mapping=hugging_face.mapping(family), --family FAMILY."
            )
        shapes = products.abstract_params(self.shapes, self.places, rules)
        return dataclasses.replace(self, shapes=shapes, types_in_file=(), rules=rules)

    def to_float(self) -> Params:
        """The params in float. Ranges of activations are left out.

        Raises:
          ValueError: if inputs are divided by scales, without which the float model
            computes something else.
        """
        flat = stored.by_path(self.shapes)
        beside = {path: Leaf.parse(path, flat) for path in flat}
        scales = [p for p, x in beside.items() if x and x.part == "pre_quant_scale"]
        if scales:
            raise ValueError(
                f"{'/'.join(scales[0])} divides the input of a layer (AWQ, SmoothQuant)"
                ", and float params have no place for it. Convert the float params "
                "that they were made from."
            )
        floats = {
            path: stored.aval(leaf) if stored.is_quantized(leaf) else leaf
            for path, leaf in flat.items()
            if beside[path] is None
        }
        shapes = traverse_util.unflatten_dict(floats)
        return dataclasses.replace(self, shapes=shapes, types_in_file=(), rules=())


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters without their base.

    Attributes:
      arrays: nested dictionaries of arrays.
      layouts: the layout of each, by the path of its param.
      mapping: the place of each tensor of the base, if the caller says it.
      rules: the rules that they were made by, if the file has them.
      metadata: what the user added.
    """

    arrays: Any
    layouts: Mapping[Path, Any]
    mapping: TensorMapping | None = None
    rules: Sequence[QuantizationRule] = ()
    metadata: Mapping[str, Any] | None = None


Contents: TypeAlias = Params | Adapters


def in_memory(tree: Any, **said: Any) -> Params:
    """Params that are in memory.

    Args:
      tree: nested dictionaries of arrays and `WithAux`.
      **said: the other attributes.
    """
    shapes = jax.tree.map(stored.shape_of, tree)

    def load(wanted: Any) -> Any:
        if not _quantized(wanted):
            return _in_float(tree, wanted)
        return tree if _quantized(tree) else params.quantize_params(tree, wanted)

    return Params(shapes, load, **said)


def default_places(shapes: Any) -> dict[str, Place]:
    """The places of tensors by the names of params; a matrix `kernel` is transposed."""
    places = {}
    for path, leaf in stored.by_path(shapes).items():
        ndim = len(leaf.shape)
        moved = compressed_tensors.is_transposed(path, ndim)
        name = compressed_tensors.tensor_name(path, ndim)
        places[name] = Place("/".join(path), "out in -> in out" if moved else "")
    return places


def _quantized(tree: Any) -> bool:
    return any(map(stored.is_quantized, stored.by_path(tree).values()))


def _in_float(tree: Any, wanted: Any) -> Any:
    def value(leaf: Any) -> Any:
        return stored.dequantized(leaf) if stored.is_quantized(leaf) else leaf

    held, paths = stored.by_path(tree), stored.by_path(wanted)
    return traverse_util.unflatten_dict({path: value(held[path]) for path in paths})
