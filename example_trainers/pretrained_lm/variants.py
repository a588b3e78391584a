"""What the table compares: rules, and methods that look at data."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import qwix_train
from qwix_train import ptq

Rules = Sequence[qwix_train.QuantizationRule]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to quantize the float model.

    Attributes:
        weights: What the table says of the weights.
        activations: What it says of the activations.
        method: How it was done.
        rules: The rules.
        make_method: Makes what looks at the inputs of weights, such as GPTQ, from the
            rules; None to round to nearest.
    """

    weights: str
    activations: str
    method: str
    rules: Rules
    make_method: Callable[[Rules], Any] | None = None

    @property
    def name(self) -> str:
        return f"{self.weights}, {self.activations}, {self.method}"


def weight_rules(qtype: str, **options: Any) -> Rules:
    """Weights of the layers in a type, and the table of tokens in int8.

    A lookup and the logits both read the table, which is a fifth of all params.
    """
    return [
        qwix_train.QuantizationRule(
            module_path="layers/.*", weight_qtype=qtype, **options
        ),
        qwix_train.QuantizationRule(module_path="embedding", weight_qtype="int8"),
    ]


def int8_rules(**options: Any) -> Rules:
    """All products in int8, those of attention, too."""
    return [
        qwix_train.QuantizationRule(weight_qtype="int8", act_qtype="int8", **options)
    ]


def static_rules(**options: Any) -> Rules:
    """The same with ranges of activations that are collected."""
    return int8_rules(act_static_scale=True, **options)


def recommended_static_rules() -> Rules:
    """Static ranges where they cost little; what `docs/static_ranges.md` recommends.

    The massive activations of a few tokens are inputs of `down`, and no range is for
    these and for all others. The same goes for the product of attention's
    probabilities and the values. In both each row keeps a range of its own. A rotation
    spreads large channels over all.
    """
    return [
        *int8_rules(module_path="layers/down", rotation="hadamard"),
        *int8_rules(module_path="layers", op_names=("einsum1",)),
        *static_rules(act_averaging="minmax", rotation="hadamard"),
    ]


_NEAREST = "to nearest"

PTQ = [
    Variant("int8", "float", _NEAREST, weight_rules("int8")),
    Variant("int8", "int8 dynamic", _NEAREST, int8_rules()),
    Variant("mxfp8", "float", _NEAREST, weight_rules("mxfp8")),
    Variant("mxfp6", "float", _NEAREST, weight_rules("mxfp6")),
    Variant("nvfp4", "float", _NEAREST, weight_rules("nvfp4")),
    Variant("mxfp4", "float", _NEAREST, weight_rules("mxfp4")),
    Variant("nf4, tile 64", "float", _NEAREST, weight_rules("nf4", tile_size=64)),
    Variant("nf4, tile 32", "float", _NEAREST, weight_rules("nf4", tile_size=32)),
    Variant("int4, tile 64", "float", _NEAREST, weight_rules("int4", tile_size=64)),
    Variant("int4, tile 32", "float", _NEAREST, weight_rules("int4", tile_size=32)),
]

STATIC = [
    Variant("int8", "int8 static", "absmax, mean", static_rules()),
    Variant("int8", "int8 static", "minmax", static_rules(act_averaging="minmax")),
    Variant(
        "int8",
        "int8 static",
        "minmax, rotated",
        static_rules(act_averaging="minmax", rotation="hadamard"),
    ),
    Variant("int8", "int8, most static", "minmax, rotated", recommended_static_rules()),
    Variant("int8", "int8 dynamic", "rotated", int8_rules(rotation="hadamard")),
    Variant(
        "int8",
        "int8 static",
        "minmax, SmoothQuant",
        static_rules(act_averaging="minmax"),
        ptq.SmoothQuant,
    ),
]


def _int4_rules(**options: Any) -> Rules:
    """int4 with a zero point for each tile."""
    minmax: dict[str, Any] = {"weight_calibration_method": "minmax", "tile_size": 32}
    return weight_rules("int4", **minmax, **options)


METHODS = [
    Variant("int4, tile 32", "float", "minmax", _int4_rules()),
    Variant(
        "int4, tile 32", "float", "minmax, rotated", _int4_rules(rotation="hadamard")
    ),
    Variant("int4, tile 32", "float", "minmax, AWQ", _int4_rules(), ptq.Awq),
    Variant("int4, tile 32", "float", "minmax, GPTQ", _int4_rules(), ptq.Gptq),
    Variant(
        "int4, tile 32",
        "float",
        "minmax, AWQ and GPTQ",
        _int4_rules(),
        lambda rules: ptq.Awq(rules, rounding=ptq.Gptq(rules)),
    ),
    Variant("nvfp4", "float", "GPTQ", weight_rules("nvfp4"), ptq.Gptq),
    Variant("mxfp4", "float", "GPTQ", weight_rules("mxfp4"), ptq.Gptq),
]
