"""What the table compares: rules, and methods that look at data."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import qwix_train

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


def _static(**options: Any) -> Rules:
    return int8_rules(act_static_scale=True, **options)


PTQ = [
    Variant("int8", "float", "to nearest", weight_rules("int8")),
    Variant("int8", "int8 dynamic", "to nearest", int8_rules()),
    Variant("mxfp8", "float", "to nearest", weight_rules("mxfp8")),
    Variant("int4, tile 64", "float", "to nearest", weight_rules("int4", tile_size=64)),
    Variant("int4, tile 32", "float", "to nearest", weight_rules("int4", tile_size=32)),
    Variant("nf4, tile 64", "float", "to nearest", weight_rules("nf4", tile_size=64)),
    Variant("mxfp4", "float", "to nearest", weight_rules("mxfp4")),
    Variant("nvfp4", "float", "to nearest", weight_rules("nvfp4")),
]
