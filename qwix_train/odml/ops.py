"""The table of operations: what LiteRT makes of each in integers.

`OPS` says of every operation that a graph may hold how its output is quantized. The
table in the documentation is `table()`.
"""

from __future__ import annotations

import dataclasses
import enum


class Kind(enum.Enum):
    """How the output of an operation is quantized."""

    QUANTIZED = "range of its own"
    """It has a range of its own, which is measured."""

    FIXED = "fixed range"
    """It has the one range that LiteRT allows."""

    SAME = "range of its input"
    """It holds elements of its input, and shares the range with it."""

    ROUNDED = "range of its input, rounded"
    """It shares the range with its input, but holds values between its elements."""

    TIED = "one range with its inputs"
    """Its inputs and itself share one range: that of the output."""

    ACTIVATION = "fused into the op before it, else range of its own"
    """An activation function, which a product or sum can do as a part of it."""

    CLIP = "range of its input, within bounds"
    """Its output lies within the range of its input, and its bounds, too."""

    LOOKUP = "range of the table"
    """It holds rows of a table; that is quantized as a whole."""

    FLOAT_INPUT = "integers, from float"
    """Its result has no range; the converter has it read floats."""

    UNSUPPORTED = "an error, or floats"
    """LiteRT, or its converter, has no integer form of it."""

    INTEGER = "integers"
    """It computes with integers or Booleans, and stays as it is."""


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """What LiteRT makes of an operation.

    Attributes:
      kind: how its output is quantized.
      litert: the operators of LiteRT that it becomes.
      scale: the scale of its output, if that is fixed, for int8.
      zero_point: the zero point of its output, if that is fixed.
      rounding: how it rounds to codes; see `integer_grid.on_grid`.
      fuses: whether an activation function after it can be a part of it.
      int16: whether it runs with activations of 16 bits.
      note: what else to know.
    """

    kind: Kind
    litert: str
    scale: float | None = None
    zero_point: int = 0
    rounding: str = "even"
    fuses: bool = False
    int16: bool = True
    note: str = ""


_Q, _S = Kind.QUANTIZED, Kind.SAME

# By the name that rules give the operation.
OPS: dict[str, OpSpec] = {
    "dot_general": OpSpec(
        _Q,
        "FULLY_CONNECTED, BATCH_MATMUL",
        fuses=True,
        note="weights per channel; bias and batch normalization are folded in",
    ),
    "einsum": OpSpec(_Q, "FULLY_CONNECTED, BATCH_MATMUL", fuses=True, note="the same"),
    "conv_general_dilated": OpSpec(
        _Q,
        "CONV_2D, DEPTHWISE_CONV_2D",
        fuses=True,
        note="the same; 1-D as 2-D, a transposed one as a convolution of its input "
        "with zeros in between",
    ),
    "add": OpSpec(_Q, "ADD", fuses=True),
    "subtract": OpSpec(_Q, "SUB", fuses=True),
    "multiply": OpSpec(
        _Q, "MUL", fuses=True, note="also powers, and division by a constant"
    ),
    "truediv": OpSpec(
        _Q, "DIV", note="the divisor must stay away from zero", int16=False
    ),
    "mean": OpSpec(_Q, "MEAN"),
    "sum": OpSpec(_Q, "SUM"),
    "exp": OpSpec(_Q, "EXP", int16=False),
    "log": OpSpec(_Q, "LOG", int16=False),
    "rsqrt": OpSpec(_Q, "RSQRT", int16=False),
    "sqrt": OpSpec(_Q, "SQRT", rounding="floor", note="rounded down", int16=False),
    "abs": OpSpec(_Q, "ABS"),
    "gelu": OpSpec(_Q, "GELU", note="approximate=True only", int16=False),
    "hard_swish": OpSpec(_Q, "HARD_SWISH", int16=False),
    "leaky_relu": OpSpec(_Q, "LEAKY_RELU"),
    "silu": OpSpec(_Q, "LOGISTIC, MUL", note="the sigmoid in it is quantized, too"),
    "softmax": OpSpec(Kind.FIXED, "SOFTMAX", scale=1 / 256, zero_point=-128),
    "log_softmax": OpSpec(
        Kind.FIXED, "LOG_SOFTMAX", scale=16 / 256, zero_point=127, int16=False
    ),
    "sigmoid": OpSpec(Kind.FIXED, "LOGISTIC", scale=1 / 256, zero_point=-128),
    "tanh": OpSpec(Kind.FIXED, "TANH", scale=1 / 128),
    "relu": OpSpec(Kind.ACTIVATION, "RELU"),
    "relu6": OpSpec(Kind.ACTIVATION, "RELU6", int16=False),
    "relu_n1_to_1": OpSpec(Kind.ACTIVATION, "RELU_N1_TO_1", int16=False),
    "clip": OpSpec(Kind.CLIP, "MINIMUM, MAXIMUM"),
    "concatenate": OpSpec(
        Kind.TIED,
        "CONCATENATION",
        note="an input that others read, too, keeps its own range beside",
        int16=False,
    ),
    "maximum": OpSpec(Kind.TIED, "MAXIMUM"),
    "minimum": OpSpec(Kind.TIED, "MINIMUM"),
    "where": OpSpec(
        Kind.TIED,
        "SELECT_V2",
        note="-1e4 or less, as of attention masks, becomes the low end of the range",
    ),
    "max": OpSpec(_S, "REDUCE_MAX"),
    "min": OpSpec(_S, "REDUCE_MIN"),
    "max_pool": OpSpec(_S, "MAX_POOL_2D"),
    "avg_pool": OpSpec(Kind.ROUNDED, "AVERAGE_POOL_2D", rounding="away"),
    "take": OpSpec(
        Kind.LOOKUP, "GATHER", note="also of embeddings: int8, one scale", int16=False
    ),
    "pad": OpSpec(_S, "PAD", note="zeros, or the low end of the range for -inf"),
    "reshape": OpSpec(_S, "RESHAPE"),
    "transpose": OpSpec(_S, "TRANSPOSE"),
    "squeeze": OpSpec(_S, "RESHAPE"),
    "expand_dims": OpSpec(_S, "RESHAPE"),
    "broadcast_in_dim": OpSpec(_S, "RESHAPE, BROADCAST_TO"),
    "slice": OpSpec(_S, "SLICE, STRIDED_SLICE"),
    "dynamic_slice": OpSpec(_S, "DYNAMIC_SLICE"),
    "split": OpSpec(_S, "SLICE"),
    "rev": OpSpec(_S, "REVERSE_V2"),
    "copy": OpSpec(_S, "none"),
    "dropout": OpSpec(_S, "none", note="only in training"),
    "argmax": OpSpec(Kind.FLOAT_INPUT, "ARG_MAX", int16=False),
    "argmin": OpSpec(Kind.FLOAT_INPUT, "ARG_MIN", int16=False),
    **{
        name: OpSpec(Kind.UNSUPPORTED, operator, int16=False, note=note)
        for name, operator, note in (
            ("ceil", "CEIL", ""),
            ("cos", "COS", ""),
            ("cumsum", "CUMSUM", "it reads floats"),
            ("erf", "many", "use gelu(x, approximate=True)"),
            ("erfc", "many", "use gelu(x, approximate=True)"),
            ("eq", "EQUAL", ""),
            ("floor", "FLOOR", ""),
            ("ge", "GREATER_EQUAL", ""),
            ("gt", "GREATER", ""),
            ("le", "LESS_EQUAL", ""),
            ("log1p", "LOG", ""),
            ("lt", "LESS", ""),
            ("ne", "NOT_EQUAL", ""),
            ("pow", "POW", "whole powers are products"),
            ("rem", "FLOOR_MOD", ""),
            ("round", "ROUND", ""),
            ("sign", "SIGN", ""),
            ("sin", "SIN", ""),
            ("sort", "STABLEHLO_SORT", "the interpreter does not load it"),
            ("top_k", "TOPK_V2", ""),
        )
    },
}

# The names of primitives, where rules have another for them.
_NAMES = {
    "sub": "subtract",
    "mul": "multiply",
    "div": "truediv",
    "max": "maximum",
    "min": "minimum",
    "logistic": "sigmoid",
    "reduce_sum": "sum",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_window_max": "max_pool",
    "select_n": "where",
    "gather": "take",
    "tile": "broadcast_in_dim",
    "stack": "concatenate",
    "unstack": "split",
    **dict.fromkeys(
        """convert_element_type copy_p stop_gradient name optimization_barrier
        sharding_constraint mesh_cast reshard pvary pcast reduce_precision
        device_put""".split(),
        "copy",
    ),
}

# Operations that change where elements are, not what they are. No rule selects them.
LAYOUT = frozenset(
    """reshape transpose squeeze expand_dims broadcast_in_dim slice dynamic_slice split
    rev copy dropout pad""".split()
)

MASKED = -9984.0
"""A constant of this or less stands for minus infinity; it is -1e4 in bfloat16."""

PRODUCTS = frozenset(["dot_general", "einsum", "conv_general_dilated"])
"""The operations that have weights."""

AFFINE = frozenset(["add", "subtract", "multiply"])
"""The operations with a constant that a product before them can do, too."""


def op_name(primitive: str) -> str:
    """The name that rules give an operation, from that of its primitive."""
    return _NAMES.get(primitive, primitive)


def table() -> str:
    """The table of operations, as Markdown.

    >>> from qwix_train.odml import table
    >>> print(table().splitlines()[0])
    | op | in LiteRT | its output has | int16 | note |
    """
    header = ["op", "in LiteRT", "its output has", "int16", "note"]
    rows = [header, ["---"] * len(header)]
    for name, spec in OPS.items():
        int16 = "yes" if spec.int16 else ""
        rows.append([f"`{name}`", spec.litert, spec.kind.value, int16, spec.note])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
