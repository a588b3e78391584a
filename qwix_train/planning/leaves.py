"""The names of leaves: the arrays that stand beside the params of a model.

A leaf belongs to a param, or to the range of an operand of an op. It stands in the
dictionary of its owner, under the owner's name and the name of the part:

    params["Dense_0"]["kernel_scale"]
    params["Dense_0"]["dot_general0_lhs_scale"]

====================  =====  ========  ================================================
part                  param  operand   what it is
====================  =====  ========  ================================================
``scale``             yes    yes       a static or learned scale, or that of a grid
``zero_point``        yes    yes       what stands for 0 where the range is asymmetric
``offset``                   yes       the value of the lowest code, trained by LSQ+
``alpha``                    yes       the clipping level that PACT trains
``pre_quant_scale``          yes       the scale of the input channels of a product
``lora_a``            yes              the first factor of an adapter
``lora_b``            yes              the second factor of an adapter
``lora_magnitude``    yes              the magnitude of an adapter with DoRA
====================  =====  ========  ================================================

Where `qwix` has a leaf, its name is the same. Every other module makes and reads names
of leaves by this one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

Path: TypeAlias = tuple[str, ...]
"""The names from the root of a tree of params to one of its entries."""

AdapterPart = Literal["a", "b", "magnitude"]
ParamPart = Literal["scale", "zero_point", "lora_a", "lora_b", "lora_magnitude"]
OperandPart = Literal["scale", "zero_point", "offset", "alpha", "pre_quant_scale"]
Part: TypeAlias = ParamPart | OperandPart

SIDES = ("lhs", "rhs")
"""The names of the operands of a product."""

GRADIENT = "grad"
"""The name of the gradient of its result."""

LEFT_OUT: Any = object()
"""Stands in the place of a param that a model no longer has."""

_OF_PARAMS: tuple[ParamPart, ...] = get_args(ParamPart)
_OF_OPERANDS: tuple[OperandPart, ...] = get_args(OperandPart)
_PARTS: tuple[Part, ...] = tuple(dict.fromkeys((*_OF_PARAMS, *_OF_OPERANDS)))
ADAPTER_PARTS: dict[AdapterPart, Part] = {
    "a": "lora_a",
    "b": "lora_b",
    "magnitude": "lora_magnitude",
}
_OPERAND = re.compile(r"(.+?)(?:_(lhs|rhs|grad|input\d+|output\d*))?", re.DOTALL)


class OperandName(NamedTuple):
    """The name of an operand, or of a result, of an op; its range stands at `path`.

    Attributes:
      module_path: the path of the module that runs the op, such as `encoder/Dense_0`.
      op_id: the op within its module, such as `dot_general0`.
      side: `lhs` or `rhs`, or `grad` for the gradient of its result. LiteRT's
        operations have `input0`, `output` or nothing, too, and the results of a model
        `output0`.
    """

    module_path: str
    op_id: str
    side: str = ""

    @classmethod
    def parse(cls, path: Path) -> OperandName:
        """The name that the path of a range has, or that of an op.

        Example:
          >>> OperandName.parse(("encoder", "Dense_0", "dot_general0_lhs"))
          OperandName(module_path='encoder/Dense_0', op_id='dot_general0', side='lhs')
        """
        *module, name = path
        match = _OPERAND.fullmatch(name)
        assert match is not None, path
        return cls("/".join(module), match[1], match[2] or "")

    @property
    def path(self) -> Path:
        """The path of its range among the params, and in `quant_stats`."""
        module = self.module_path.split("/") if self.module_path else ()
        return (*module, f"{self.op_id}_{self.side}" if self.side else self.op_id)


class Leaf(NamedTuple):
    """A leaf: what it belongs to, and what it is.

    Attributes:
      owner: the path of its param, or of its range.
      part: what it is.
    """

    owner: Path
    part: Part

    @classmethod
    def parse(cls, path: Path, params: Collection[Path] = ()) -> Leaf | None:
        """The leaf that a path is of; None if it is not the path of a leaf.

        A model may have a param of its own with the name of a leaf, such as a
        `norm_scale` without a `norm`. So the leaf of a param is one only where that
        param is.

        Args:
          path: the path.
          params: the paths of all params. Without them, only leaves of operands are
            found.

        Example:
          >>> Leaf.parse(("Dense_0", "dot_general0_lhs_scale"))
          Leaf(owner=('Dense_0', 'dot_general0_lhs'), part='scale')
          >>> Leaf.parse(("kernel_scale",), [("kernel",), ("kernel_scale",)])
          Leaf(owner=('kernel',), part='scale')
          >>> Leaf.parse(("norm_scale",), [("norm_scale",)])
        """
        for leaf in _readings(path):
            if leaf.part in _OF_PARAMS and leaf.owner in params:
                return leaf
            if leaf.part in _OF_OPERANDS and _is_range(leaf.owner):
                return leaf
        return None

    @property
    def path(self) -> Path:
        """Its path among the params.

        Raises:
          ValueError: if its owner is a whole tree of params that is one array.

        Example:
          >>> Leaf(("Dense_0", "kernel"), "scale").path
          ('Dense_0', 'kernel_scale')
        """
        if not self.owner:
            raise ValueError(
                f"The params are one array, so its {self.part} has no place beside "
                "it: put the array in a dictionary."
            )
        return (*self.owner[:-1], f"{self.owner[-1]}_{self.part}")

    @property
    def is_adapter(self) -> bool:
        """Whether it is a part of an adapter."""
        return self.part in ADAPTER_PARTS.values()

    def among(self, named: Mapping[Path, Any]) -> Any:
        """Its value among params that are given by path; None if it is not there."""
        return named.get(self.path) if self.owner else None

    def check_shape(self, value: Any, shape: Sequence[int]) -> None:
        """Checks that a value among the params has the shape that this leaf has.

        Raises:
          ValueError: if it has another.
        """
        if tuple(value.shape) != tuple(shape):
            raise ValueError(
                f"Param {'/'.join(self.path)!r} has shape {tuple(value.shape)}, and "
                f"the {self.part} of {'/'.join(self.owner)!r} takes shape "
                f"{tuple(shape)}: it was made with other rules, or for another model. "
                "Make it with these."
            )

    def missing(self, what: str, asked_by: str, remedy: str) -> ValueError:
        """The error that says that it is not among the params, and that it has to be.

        Args:
          what: what it is, such as `static range`.
          asked_by: what asks for it, such as `a rule with act_static_scale=True`.
          remedy: sentences that say what to do.
        """
        return ValueError(
            f"There is no {what} for {'/'.join(self.owner)!r}, which {asked_by} asks "
            f"for: {'/'.join(self.path)!r} is not among the params. {remedy}"
        )


def scale_path(owner: Path) -> Path:
    """The path of the scale of a param or a range."""
    return Leaf(owner, "scale").path


def zero_point_path(owner: Path) -> Path:
    """The path of the zero point of a param or a range."""
    return Leaf(owner, "zero_point").path


def pre_quant_scale_path(owner: Path) -> Path:
    """The path of the scale of the input channels of a product, from the range's."""
    return Leaf(owner, "pre_quant_scale").path


def range_of(path: Path) -> Path:
    """The path of the range that the leaf at a path is of.

    Example:
      >>> range_of(("Dense_0", "dot_general0_lhs_scale"))
      ('Dense_0', 'dot_general0_lhs')
    """
    leaf = Leaf.parse(path)
    assert leaf is not None, path
    return leaf.owner


def adapter_path(param: Path, part: AdapterPart) -> Path:
    """The path of a part of the adapter of a param."""
    return Leaf(param, ADAPTER_PARTS[part]).path


def adapter_part(path: Path) -> AdapterPart | None:
    """The part of an adapter that a path names; None if it does not name one.

    That is for trees of adapters alone, without the params that they belong to. Where
    these are at hand, `Leaf.parse` is exact.

    Example:
      >>> adapter_part(("Dense_0", "kernel_lora_b"))
      'b'
    """
    named = {leaf.part for leaf in _readings(path)}
    return next((part for part, name in ADAPTER_PARTS.items() if name in named), None)


def _readings(path: Path) -> list[Leaf]:
    """Every leaf that a path may be of, by its last name alone."""
    *module, name = path or ("",)
    return [
        Leaf((*module, owner), part)
        for part in _PARTS
        if (owner := name.removesuffix(f"_{part}")) not in ("", name)
    ]


def _is_range(path: Path) -> bool:
    name = OperandName.parse(path)
    return name.side in SIDES and name.op_id[-1].isdigit()
