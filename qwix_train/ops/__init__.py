"""The kinds of operations that can be quantized, one file each.

A new kind is a file with an `OpKind`, and a line in `KINDS`. `register` adds one from
outside of the package.
"""

from __future__ import annotations

from qwix_train.ops.conv import Conv
from qwix_train.ops.dot import Dot
from qwix_train.ops.gather import Gather
from qwix_train.ops.kind import OperandAxes as OperandAxes
from qwix_train.ops.kind import OpKind as OpKind
from qwix_train.ops.ragged_dot import RaggedDot
from qwix_train.trace import analyze
from qwix_train.trace.analyze import Op

DOT, CONV, GATHER, RAGGED_DOT = KINDS = (Dot(), Conv(), Gather(), RaggedDot())


def register(kind: OpKind) -> None:
    """Lets every mode quantize another kind of operation.

    Args:
      kind: the kind.

    Raises:
      ValueError: if its primitive, or one of its names, has a kind already.
    """
    taken = [name for name in kind.names if name in names()]
    if by_primitive(kind.primitive) or taken:
        raise ValueError(
            f"{type(kind).__name__}: there is a kind of operation for the primitive "
            f"{kind.primitive!r}, or with one of the names {kind.names}, already."
        )
    analyze.kinds[kind.primitive] = kind


def kind_of(op: Op) -> OpKind:
    """The kind of an operation of a traced call."""
    return analyze.kinds[op.primitive]


def by_primitive(name: str) -> OpKind | None:
    """The kind of an equation, by the name of its primitive, or None."""
    return analyze.kinds.get(name)


def product_of(primitive: str) -> OpKind:
    """The kind of the products of a primitive, for which `is_product` holds."""
    return analyze.kinds[primitive]


def is_product(primitive: str) -> bool:
    """Whether the equations of a primitive are products that can be quantized."""
    kind = analyze.kinds.get(primitive)
    return kind is not None and kind.is_product


def by_name(name: str) -> OpKind | None:
    """The kind that rules know by a name, or None."""
    return next((k for k in analyze.kinds.values() if name in k.names), None)


def names() -> tuple[str, ...]:
    """The names by which rules know the operations that can be quantized."""
    return tuple(name for kind in analyze.kinds.values() for name in kind.names)


for _kind in KINDS:
    register(_kind)
