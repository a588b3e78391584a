"""The ``quantization_config`` of a checkpoint: which layer has which scheme."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qwix_train.core import numerics

LINEAR = "Linear"
_DENSE = (None, "dense")


def make_config(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the config of layers, one group for each scheme among them.

    Args:
        layers: For each layer, by name, its ``format``, ``weights`` and
            ``input_activations``.

    >>> scheme = {'format': 'int-quantized', 'weights': {'num_bits': 8}}
    >>> make_config({'a': scheme, 'b': scheme})['config_groups']['group_0']['targets']
    ['a', 'b']
    """
    groups: list[dict[str, Any]] = []
    for name, scheme in layers.items():
        for group in groups:
            if all(group[key] == value for key, value in scheme.items()):
                group["targets"].append(name)
                break
        else:
            groups.append({"targets": [name], **scheme})
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def dynamic_activations(qtype: Any) -> dict[str, Any]:
    """Returns the entry for activations that are quantized per token at run time.

    Raises:
        ValueError: The format has no such type for activations.

    >>> dynamic_activations('int8')['strategy']
    'token'
    """
    return {**_activations(qtype, True), "strategy": "token", "dynamic": True}


def static_activations(qtype: Any, symmetric: bool) -> dict[str, Any]:
    """Returns the entry for activations with one scale that is in the checkpoint.

    Raises:
        ValueError: The format has no such type for activations.

    >>> static_activations('float8_e4m3fn', True)['type']
    'float'
    """
    return {**_activations(qtype, symmetric), "strategy": "tensor", "dynamic": False}


def _activations(qtype: Any, symmetric: bool) -> dict[str, Any]:
    name = numerics.qtype_name(qtype)
    if name not in ("int8", "int4", "float8_e4m3fn"):
        raise ValueError(
            f"compressed-tensors has no activations of type {name}; it takes int8, "
            "int4 and float8_e4m3fn"
        )
    kind = "int" if numerics.is_integer_qtype(name) else "float"
    bits = numerics.qtype_bits(name)
    return {"num_bits": bits, "type": kind, "symmetric": symmetric}


def activation_qtype(args: Mapping[str, Any] | None, default: Any) -> str:
    """Returns the type of activations that an entry of a config describes."""
    if not args:
        return numerics.qtype_name(default)
    return "float8_e4m3fn" if args.get("type") == "float" else f"int{args['num_bits']}"


def check_config(config: Mapping[str, Any]) -> None:
    """Checks that a config asks for nothing but what is read here.

    Raises:
        ValueError: The message says what it asks for.
    """
    method = config.get("quant_method", "compressed-tensors")
    if method not in ("compressed-tensors", "fp8"):
        raise ValueError(
            f"The checkpoint has quant_method {method!r}. Those that can be read are "
            "'compressed-tensors' and 'fp8'."
        )
    if (config.get("sparsity_config") or {}).get("format") not in _DENSE:
        raise ValueError("Checkpoints with compressed sparsity cannot be read.")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise ValueError("Checkpoints with transforms of weights cannot be read.")


def find_scheme(config: Mapping[str, Any] | None, layer: str) -> Mapping[str, Any]:
    """Returns the group of a layer that is quantized; empty if there is no config.

    A group names its layers, by name or by a regular expression, or their classes.
    A file does not say classes: if no group names the layer, the group of linear
    layers is taken, or else the only group there is.

    Raises:
        ValueError: No group is for this layer, or more than one may be.

    >>> groups = {'a': {'targets': ['re:.*mlp']}, 'b': {'targets': ['Linear']}}
    >>> find_scheme({'config_groups': groups}, 'layers.0.mlp')['targets']
    ['re:.*mlp']
    """
    if config is None:
        return {}
    if config.get("quant_method") == "fp8":
        block = config.get("weight_block_size")
        layout = {"strategy": "block", "block_structure": block} if block else {}
        return {"weights": {"num_bits": 8, "type": "float", **layout}}
    groups = [group for group in config.get("config_groups", {}).values()]
    if any(not isinstance(group, Mapping) for group in groups):
        raise ValueError(
            "The quantization_config names schemes instead of spelling them out."
        )
    named = [g for g in groups if any(_names(t, layer) for t in g["targets"])]
    linear = [g for g in groups if LINEAR in g["targets"]]
    found = named[:1] or linear or groups
    if len(found) != 1:
        raise ValueError(
            f"{layer} has scales, but {len(found)} of the {len(groups)} config_groups "
            "of config.json may be for it. Give one of them its name as a target."
        )
    return found[0]


def _names(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), layer) is not None
    return target == layer
