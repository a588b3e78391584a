"""The ``quantization_config`` of a checkpoint: which layer has which scheme."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

from qwix_train.core import numerics
from qwix_train.core.errors import located

LINEAR = "Linear"
_DENSE = (None, "dense")
_PATTERN = "re:"
_BLOCKS = ("mxfp8", "mxfp4")
"""The types with blocks to which readers quantize activations at run time."""


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
    """Returns the entry for activations that are quantized at run time.

    They are quantized per token, or in the blocks of their type.

    Raises:
        ValueError: The format has no such type for activations.

    >>> dynamic_activations('int8')['strategy']
    'token'
    """
    entry = numerics.format_of(qtype)
    if entry.name in _BLOCKS:
        return {
            "num_bits": entry.bits,
            "type": "float",
            "symmetric": True,
            "dynamic": True,
            "strategy": "group",
            "group_size": entry.block,
            "scale_dtype": "torch.uint8",
        }
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
            "int4 and float8_e4m3fn; and at run time "
            f"{', '.join(_BLOCKS[:-1])} and {_BLOCKS[-1]}"
        )
    kind = "int" if numerics.is_integer_qtype(name) else "float"
    bits = numerics.qtype_bits(name)
    return {"num_bits": bits, "type": kind, "symmetric": symmetric}


def activation_qtype(args: Mapping[str, Any] | None, default: Any) -> str:
    """Returns the type of activations that an entry of a config describes."""
    if not args:
        return numerics.qtype_name(default)
    if args.get("type") == "float":
        return "float8_e4m3fn"
    return f"int{args.get('num_bits', 8)}"


def check_config(config: Any) -> None:
    """Checks the form of a config, and that all it asks for can be read.

    Raises:
        ValueError: An entry is wrong, or asks for something that cannot be read. The
            message says which.

    >>> check_config({'config_groups': {'a': {'targets': ['re:*']}}})
    Traceback (most recent call last):
    ...
    ValueError: config_groups, a, targets: 're:*' is not a regular expression: ...
    """
    _check(config, "", dict)
    method = config.get("quant_method", "compressed-tensors")
    if method not in ("compressed-tensors", "fp8"):
        raise ValueError(
            f"The checkpoint has quant_method {method!r}. Those that can be read are "
            "'compressed-tensors' and 'fp8'."
        )
    for name in ("sparsity_config", "transform_config"):
        _check(config.get(name), name, dict | None)
    if (config.get("sparsity_config") or {}).get("format") not in _DENSE:
        raise ValueError(
            "Checkpoints with compressed sparsity cannot be read: take the dense one."
        )
    if (config.get("transform_config") or {}).get("config_groups"):
        raise ValueError("Checkpoints with transforms of weights cannot be read.")
    _check_sizes(config.get("weight_block_size"), "weight_block_size")
    groups = config.get("config_groups", {})
    _check(groups, "config_groups", dict)
    for key, group in groups.items():
        where = f"config_groups, {key}"
        if not isinstance(group, dict):
            raise ValueError(
                f"{where}: the config names schemes instead of spelling them out"
            )
        _check(group.get("targets"), f"{where}, targets", list)
        for target in group["targets"]:
            _check(target, f"{where}, targets", str)
            _check_pattern(target, f"{where}, targets")
        for part in ("weights", "input_activations"):
            _check(group.get(part), f"{where}, {part}", dict | None)
            if group.get(part):
                _check_args(group[part], f"{where}, {part}")


def _check_pattern(target: str, where: str) -> None:
    """Checks that a target, if it is a pattern, is a regular expression."""
    try:
        if target.startswith(_PATTERN):
            re.compile(target.removeprefix(_PATTERN))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{where}: {target!r} is not a regular expression: {error}"
        ) from None


def _check_args(args: dict[str, Any], where: str) -> None:
    """Checks how weights or activations are said to be quantized."""
    bits = args.get("num_bits", 8)
    _check(bits, f"{where}, num_bits", int)
    if not 1 <= bits <= 8:
        raise ValueError(f"{where}, num_bits: {bits} is not from 1 to 8")
    _check(args.get("symmetric", True), f"{where}, symmetric", bool)
    size = args.get("group_size")
    _check(size, f"{where}, group_size", int | None)
    if args.get("strategy") == "group" and (size is None or size < 1):
        raise ValueError(f"{where}, group_size: {size} is not a size of groups")
    _check_sizes(args.get("block_structure"), f"{where}, block_structure")


def _check_sizes(sizes: Any, where: str) -> None:
    """Checks the sizes of a block, such as ``[128, 128]`` or ``"128x128"``."""
    if sizes is not None:
        with located(where):
            block_sizes(sizes)


def block_sizes(sizes: Any) -> list[int]:
    """Returns the rows and columns of a block.

    >>> block_sizes("128x64")
    [128, 64]
    """
    parts = sizes.split("x") if isinstance(sizes, str) else sizes
    if isinstance(parts, list) and len(parts) == 2:
        if all(re.fullmatch("[0-9]{1,9}", str(part)) for part in parts):
            found = [int(part) for part in parts]
            if min(found) > 0:
                return found
    raise ValueError(f"{sizes!r} is not a number of rows and one of columns")


def _check(value: Any, where: str, kind: Any) -> None:
    # A bool is an int in Python, but not a number here.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        place = f"{where}: " if where else ""
        name = getattr(kind, "__name__", kind)
        raise ValueError(f"{place}{reprlib.repr(value)} is not of the type {name}")


def find_scheme(config: Mapping[str, Any] | None, layer: str) -> Mapping[str, Any]:
    """Returns the group of a layer that is quantized; empty if there is no config.

    A group lists its layers by name, by a regular expression, or by class. A file does
    not say the class of a layer. So if no group names the layer, it is the group of
    linear layers, or else the only group.

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
    groups = list(config.get("config_groups", {}).values())
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
    if target.startswith(_PATTERN):
        return re.match(target.removeprefix(_PATTERN), layer) is not None
    return target == layer
