"""The config of an adapter of Hugging Face's PEFT: `adapter_config.json`."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping
from typing import Any

from qwix_train.lora.layout import AdapterLayout

# Options that change what the tensors mean, or add other tensors.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
# Entries that say what the tensors mean.
_MEANING = (
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "use_rslora",
)
# Initializations that change the base, which a file of adapters does not have.
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def make(modules: Mapping[str, AdapterLayout]) -> dict[str, Any]:
    """The config for adapters.

    Args:
      modules: the layout of each adapter, by the name of its module.

    Raises:
      ValueError: if only some have magnitudes (DoRA).
    """
    dora = {name for name, layout in modules.items() if layout.dora}
    if dora and len(dora) < len(modules):
        other = next(name for name in modules if name not in dora)
        raise ValueError(
            f"The adapter of {min(dora)!r} has a magnitude (DoRA), and that of "
            f"{other!r} has none; PEFT has one setting for all. Save them apart."
        )
    stabilized = any(x.rank > 1 for x in modules.values()) and all(
        math.isclose(x.scaling, x.alpha / math.sqrt(x.rank)) for x in modules.values()
    )
    ranks = {name: layout.rank for name, layout in modules.items()}
    alphas = {
        name: _number(x.alpha if stabilized else x.scaling * x.rank)
        for name, x in modules.items()
    }
    rank, rank_pattern = _by_pattern(ranks)
    alpha, alpha_pattern = _by_pattern(alphas)
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": sorted(modules),
        "task_type": None,
        "use_dora": bool(dora),
        "use_rslora": stabilized,
    }


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say what the tensors beside a config mean.

    Example:
      >>> found = meaning({"lora_alpha": 8, "task_type": "CAUSAL_LM"})
      >>> found["lora_alpha"], "task_type" in found
      (8, False)
    """
    return {name: config.get(name) for name in (*_MEANING, *_UNSUPPORTED)}


def check(config: Mapping[str, Any]) -> None:
    """Checks that a config has the form of one, and says nothing that is not supported.

    Raises:
      ValueError: if not; the message names the entry.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')!r}, not 'LORA'")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{name}={config[name]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias={config['bias']!r} is not supported, only 'none'")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise ValueError(
            f"init_lora_weights={start!r} changes the base, and the adapters fit that "
            "alone. Convert them for the base as it was: model.save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) in PEFT"
        )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"alpha_pattern={patterns!r} is not an object")
    for where, alpha in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not (number and 0 < alpha < math.inf):
            raise ValueError(f"the alpha of {where!r} is {alpha!r}, no positive number")
    for pattern in patterns:
        try:
            re.compile(_pattern(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"alpha_pattern has {pattern!r}, which is not a regular expression: "
                f"{error}"
            ) from None


def alpha_of(config: Mapping[str, Any], module: str) -> float:
    """The alpha that a config has for a module."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(_pattern(pattern), module):
            return float(alpha)
    return float(config["lora_alpha"])


def scaling_of(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    """What ``B @ A`` is multiplied by."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(pattern: str) -> str:
    # The same match as in PEFT's own reader.
    return rf"(.*\.)?({pattern})$"


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _by_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the others by a pattern for their module."""
    ((usual, _),) = collections.Counter(values.values()).most_common(1)
    patterns = {
        # The start, as a module of that name may be in another module, too.
        f"^{re.escape(name)}": value
        for name, value in values.items()
        if value != usual
    }
    return usual, patterns
