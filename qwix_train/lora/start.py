"""Adapters and bases at the start of training, from trained params."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax

from qwix_train.core.how import HowToQuantize
from qwix_train.lora import initialization
from qwix_train.lora.layout import AdapterLayout, find_layouts
from qwix_train.lora.placement import placed
from qwix_train.lora.rules import LoraRule
from qwix_train.planning.leaves import ADAPTER_PARTS
from qwix_train.planning.plan import Path, Plan
from qwix_train.trace.function import TracedCall
from qwix_train.values import stored


def started(traced: TracedCall, plan: Plan) -> Starter:
    """The starter of the adapters and bases of a call.

    Args:
      traced: the call. The random key comes from its stream `params`, if it has one.
      plan: what the rules do to it.
    """
    key = traced.make_rng("params")
    return Starter(plan, jax.random.key(0) if key is None else key, traced.boxes)


class Starter:
    """Makes the base and the adapter of each param.

    Attributes:
      layouts: the layouts of the adapters, by the path of their param.
      adapters: the parts of the adapters that were started, by path.
    """

    def __init__(self, plan: Plan, key: jax.Array, boxes: Mapping[Path, Any]):
        """Takes a plan.

        Args:
          plan: what the rules do to the model.
          key: a random key.
          boxes: the boxes in which Flax holds params, by path.
        """
        self._boxes = boxes
        self._plan = plan
        self._key = key
        self._found = find_layouts(plan)
        self.layouts: dict[Path, AdapterLayout] = {
            path: layout for path, (layout, _) in self._found.items()
        }
        self.adapters: dict[Path, Any] = {}

    def base(self, path: Path, param: Any) -> Any:
        """The base that a param becomes; its adapter goes into `adapters`.

        Args:
          path: the path of the param.
          param: a float array, the shape of one, or a param that is quantized.

        Returns:
          The base; the param itself if nothing changes it.

        Raises:
          ValueError: if the rule starts from a float weight, or asks for another type,
            and the param is quantized.
        """
        decision = self._plan.params.get(path)
        how = None if decision is None else decision.how
        _check_type(path, param, how)
        if path not in self._found:
            return _quantized(param, how)
        layout, rule = self._found[path]
        is_quantized = stored.is_quantized(param)
        if is_quantized and rule.init is not None:
            raise ValueError(
                f"Param {'/'.join(path)!r} is quantized already, and "
                f"init={rule.init!r} starts from the float weight. Give the float "
                "params, or a rule without init."
            )
        if is_quantized and rule.qat:
            raise ValueError(
                f"Param {'/'.join(path)!r} is quantized already, and qat=True keeps "
                "its base in float. Give the float params, or a rule without qat."
            )
        weight = stored.dequantized(param) if is_quantized else param
        begun = self._begin(weight, layout, rule, how)
        box = self._boxes.get(path)
        for part in ADAPTER_PARTS:
            if (value := getattr(begun, part)) is not None:
                self.adapters[layout.name(part)] = placed(
                    value, layout, part, weight, box
                )
        if is_quantized:
            return stored.packed(param, layout.layers) if rule.double_quant else param
        base = param if rule.init is None else begun.base
        if rule.double_quant and how is not None:
            return stored.quantize_param_packed(base, how, layout.layers)
        return base if rule.qat else _quantized(base, how)

    def _begin(
        self,
        weight: Any,
        layout: AdapterLayout,
        rule: LoraRule,
        how: HowToQuantize | None,
    ) -> initialization.Start:
        begin = functools.partial(
            initialization.initial,
            layout=layout,
            rule=rule,
            how=how,
            key=initialization.key_of(self._key, layout.path),
        )
        if isinstance(weight, jax.ShapeDtypeStruct):
            return jax.eval_shape(begin, weight)
        return begin(weight)


def _check_type(path: Path, param: Any, how: HowToQuantize | None) -> None:
    """Complains of a param with codes of another type than its rule asks for."""
    if how is None or not stored.is_quantized(param) or param.array.qtype == how.qtype:
        return
    raise ValueError(
        f"Param {'/'.join(path)!r} is quantized already, to codes of "
        f"{param.array.qtype}, and a rule asks for {how.qtype}. Give the float params, "
        "or a rule with the type that they have."
    )


def _quantized(param: Any, how: HowToQuantize | None) -> Any:
    if how is None or stored.is_quantized(param):
        return param
    return stored.quantize_param(param, how)
