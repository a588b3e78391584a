"""Runs a traced call with the stages that a mode chooses for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from qwix_train.stages.product import Product, in_float
from qwix_train.stages.stage import At, ParamStage, Stage, applied, on_param
from qwix_train.trace import carried
from qwix_train.trace.analyze import Key, Op
from qwix_train.trace.carried import Carried
from qwix_train.trace.function import Param, TracedCall
from qwix_train.values import adapted_weight, stored
from qwix_train.values.adapted_weight import AdaptedWeight
from qwix_train.values.rotated import RotatedWeight
from qwix_train.values.stored_weight import Listener, stored_weight


@dataclasses.dataclass(frozen=True)
class OpStages:
    """What happens to one operation.

    Attributes:
      op: the operation.
      operands: the stages of each of its operands. One without any may be more than an
        array, such as a weight with its codes, and is left for the product as it is.
      product: how the result is computed.
      beside: the stages of what meets the adapter of a weight.
    """

    op: Op
    operands: tuple[tuple[Stage, ...], ...]
    product: Product = in_float
    beside: tuple[Stage, ...] = ()


@dataclasses.dataclass(frozen=True)
class CallStages:
    """What happens to a traced call.

    Attributes:
      params: the stages of params, by path.
      ops: what happens to operations, by where they are.
    """

    params: Mapping[tuple[str, ...], Sequence[Stage | ParamStage]]
    ops: Mapping[Key, OpStages]


def run(
    traced: TracedCall, stages: CallStages, listener: Listener | None = None
) -> Any:
    """The result of a traced call, with stages.

    Each param goes through its stages once, however often it is read; an array that
    several operations read under equal stages goes through these once.

    Args:
      traced: the call. Params may be quantized.
      stages: what happens to it.
      listener: told where params are dequantized.
    """
    if traced.own_stages is not None:
        stages = traced.own_stages(stages)
        traced = dataclasses.replace(traced, own_stages=None)
    shared = _Shared()
    flat = {
        key: jax.tree.flatten((found.operands, found.beside))
        for key, found in stages.ops.items()
    }

    def handler(op: Op, operands: Sequence[Any], run, arrays):
        found = stages.ops[op.key]
        own, beside = jax.tree.unflatten(flat[op.key][1], arrays)

        def base(*operands):
            staged = [
                shared.applied(mine, x, At(op, side, operands)) if mine else x
                for side, (mine, x) in enumerate(zip(own, operands, strict=True))
            ]
            return found.product(op, staged, run)

        if any(isinstance(x, AdaptedWeight) for x in operands):
            return adapted_weight.computed(
                op, operands, base, lambda x: applied(beside, x)
            )
        return base(*operands)

    def substitute(param: Param) -> Carried | None:
        value = param.value
        if stored.is_quantized(value):
            rotation = value.how.rotation
            value = stored_weight(param, listener)
            if rotation is not None and value is not None:
                value = RotatedWeight(value, rotation)
        mine = stages.params.get(param.path, ())
        if value is not None:  # a range is stored, too
            value = on_param(mine, value)
        return None if value is param.value else value

    given = {key: arrays for key, (arrays, _) in flat.items()}
    return traced.run(
        [found.op for found in stages.ops.values()], handler, substitute, given
    )


class _Shared:
    """What arrays became in equal stages, for the operations that read them next."""

    def __init__(self):
        self._made: dict[int, list[tuple[Any, ...]]] = {}

    def applied(self, stages: Sequence[Stage], x: Any, at: At) -> Any:
        """What stages make of an operand."""
        # A result belongs to the trace that it was made in: what a loop reads from
        # outside goes through its stages within it, too.
        trace = jex.get_opaque_trace_state()
        arrays, structure = jax.tree.flatten(tuple(stages))
        known = self._made.setdefault(id(x), [])
        for _, before, held, structure_, result in known:
            same = len(held) == len(arrays) and all(map(_is, held, arrays))
            if same and structure_ == structure and before == trace:
                return result
        takes_carried = stages[0].takes_carried
        value = x if takes_carried else carried.read(x, at.op.primitive)
        result = applied(stages, value, at)
        known.append((x, trace, arrays, structure, result))
        return result


def _is(a: Any, b: Any) -> bool:
    return a is b
