"""The ways of fine-tuning that are compared: their rules and learning rates."""

import dataclasses
from typing import Any

import ml_collections

import qwix_train
from qwix_train import lora


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        name: Its name in files.
        label: Its name in the table.
        learning_rate: The highest learning rate.
        rules: Which weights get adapters, and how the base is kept; none where all
            weights are trained.
        export_qtype: The type of the weights of the exported model.
    """

    name: str
    label: str
    learning_rate: float
    rules: tuple[qwix_train.QuantizationRule, ...]
    export_qtype: str


def make_method(config: ml_collections.ConfigDict, name: str) -> Method:
    """The method of a name, one of `full`, `lora`, `qlora_nf4`, `qlora_int4`."""

    def adapters(**base: Any) -> tuple[qwix_train.QuantizationRule, ...]:
        return (lora.LoraRule(rank=config.rank, alpha=config.alpha, **base),)

    if name == "full":
        return Method(name, "full fine-tuning", config.full_learning_rate, (), "int8")
    rate = config.lora_learning_rate
    if name == "lora":
        return Method(name, "LoRA", rate, adapters(), "int8")
    base: dict[str, Any] = {"tile_size": config.tile_size, "double_quant": True}
    if name == "qlora_nf4":
        rules = adapters(weight_qtype="nf4", **base)
        return Method(name, "QLoRA, nf4", rate, rules, "nf4")
    if name == "qlora_int4":
        rules = adapters(weight_qtype="int4", **base)
        return Method(name, "QLoRA, int4", rate, rules, "int4")
    raise ValueError(
        f"There is no method {name!r}. Choose from full, lora, qlora_nf4, qlora_int4."
    )


def export_rules(
    config: ml_collections.ConfigDict, method: Method
) -> list[qwix_train.QuantizationRule]:
    """How the exported model is quantized; in int8 with one scale for each channel."""
    tile_size = None if method.export_qtype == "int8" else config.tile_size
    return [
        qwix_train.QuantizationRule(
            weight_qtype=method.export_qtype, tile_size=tile_size
        )
    ]
