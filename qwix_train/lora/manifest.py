"""What a checkpoint of adapters says about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax import numpy as jnp

from qwix_train.lora.layout import AdapterLayout
from qwix_train.lora.rules import LoraRule
from qwix_train.planning.plan import Path
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq.manifest import readable, rule_from_json, rule_to_json

VERSION = 1

# These matter at the start of training, and not for what adapters mean.
_NOT_KEPT = ("lora_a_initializer", "lora_b_initializer")
# Derived from a layout, for readers of the file that do not have this package.
_DERIVED = ("a_shape", "b_shape")


@dataclasses.dataclass(frozen=True)
class AdapterManifest:
    """What a checkpoint of adapters says about them.

    Attributes:
      layouts: the layout of each adapter, by the path of its param.
      rules: the rules that they were made by, with the default initializers.
      versions: the version of each package that wrote it.
      metadata: what the caller of `save` added.

    Example:
      >>> from qwix_train import LoraRule
      >>> from qwix_train.lora import AdapterManifest
      >>> manifest = AdapterManifest({}, (LoraRule(rank=2, alpha=4.0),), {})
      >>> AdapterManifest.from_json(manifest.to_json(), {}) == manifest
      True
    """

    layouts: Mapping[Path, AdapterLayout]
    rules: tuple[QuantizationRule, ...]
    versions: Mapping[str, str]
    metadata: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """All but the versions, as values that JSON can hold."""
        return {
            "version": VERSION,
            "layouts": [
                {
                    **dataclasses.asdict(x),
                    **{name: getattr(x, name) for name in _DERIVED},
                }
                for x in self.layouts.values()
            ],
            "rules": [_rule_to_json(rule) for rule in self.rules],
            "metadata": self.metadata,
        }

    @classmethod
    def from_json(cls, record: Any, versions: Mapping[str, str]) -> AdapterManifest:
        """Reads the result of `to_json`.

        Args:
          record: the result of `to_json`.
          versions: the versions of packages.

        Raises:
          ValueError: if the record has another version of the format, or is not one of
            adapters.
        """
        if not isinstance(record, Mapping):
            raise ValueError("it is not one of adapters")
        if record.get("version") != VERSION:
            raise ValueError(
                f"it has format version {record.get('version')!r}, and this release "
                f"reads version {VERSION}: use the release that wrote it"
            )
        with readable(versions):
            layouts = [_layout_from_json(entry) for entry in record["layouts"]]
            return cls(
                layouts={layout.path: layout for layout in layouts},
                rules=tuple(map(_rule_from_json, record["rules"])),
                versions=versions,
                metadata=record["metadata"],
            )


def _layout_from_json(record: Mapping[str, Any]) -> AdapterLayout:
    # JSON has no tuples.
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record.items()
        if name not in _DERIVED
    }
    layout = AdapterLayout(**fields)
    for name in _DERIVED:
        if tuple(record[name]) != getattr(layout, name):
            raise ValueError(
                f"the adapter of {'/'.join(layout.path)!r} has {name} {record[name]}, "
                f"and this release has {getattr(layout, name)}: use the release that "
                "wrote it"
            )
    return layout


def _rule_to_json(rule: QuantizationRule) -> dict[str, Any]:
    kind = LoraRule if isinstance(rule, LoraRule) else QuantizationRule
    record = rule_to_json(rule, kind)
    for name in _NOT_KEPT:
        record.pop(name, None)
    if record.get("param_dtype") is not None:
        record["param_dtype"] = jnp.dtype(record["param_dtype"]).name
    return {"kind": kind.__name__, **record}


def _rule_from_json(record: Mapping[str, Any]) -> QuantizationRule:
    record = dict(record)
    kinds = {kind.__name__: kind for kind in (LoraRule, QuantizationRule)}
    return rule_from_json(record, kinds[record.pop("kind")])
