"""Runs a traced call with the stages that a mode chooses for it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from qwix_train.stages.product import Product, in_float
from qwix_train.stages.stage import At, ParamStage, Stage, applied, on_param
from qwix_train.trace import carried
from qwix_train.trace.analyze import Key, Op
from qwix_train.trace.evaluate import Once
from qwix_train.trace.function import Param, TracedCall
from qwix_train.trace.provenance import Activation
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
      gradient: what the product is given beside the operands, as `gradient`, where it
        quantizes the gradient of its result by a range of other steps: a pytree whose
        arrays are as those of stages.
    """

    op: Op
    operands: tuple[tuple[Stage, ...], ...]
    product: Product = in_float
    beside: tuple[Stage, ...] = ()
    gradient: Any = None


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
    flat = {
        key: jax.tree.flatten((found.operands, found.beside, found.gradient))
        for key, found in stages.ops.items()
    }

    def handler(op: Op, operands: Sequence[Any], run, arrays):
        found = stages.ops[op.key]
        own, beside, gradient = jax.tree.unflatten(flat[op.key][1], arrays)
        product: Callable[..., Any] = found.product
        if gradient is not None:
            product = functools.partial(product, gradient=gradient)

        def base(*operands):
            staged = [
                _applied(traced.once, mine, x, At(op, side, operands)) if mine else x
                for side, (mine, x) in enumerate(zip(own, operands, strict=True))
            ]
            return product(op, staged, run)

        if any(isinstance(x, AdaptedWeight) for x in operands):
            return adapted_weight.computed(
                op, operands, base, lambda x: applied(beside, x)
            )
        return base(*operands)

    def substitute(param: Param) -> Any:
        value = param.value
        if stored.is_quantized(value):
            rotation = value.how.rotation
            value = stored_weight(param, listener)
            if rotation is not None and value is not None:
                value = RotatedWeight(value, rotation)
        mine = stages.params.get(param.path, ())
        if value is None:  # a range, whose axes a scan over layers may move
            return param.value.array
        value = on_param(mine, value)
        return None if value is param.value else value

    given = {key: arrays for key, (arrays, _) in flat.items()}
    return traced.run(
        [found.op for found in stages.ops.values()], handler, substitute, given
    )


def _applied(once: Once, stages: Sequence[Stage], x: Any, at: At) -> Any:
    """What stages make of an operand: of an array that ops read alike, once."""
    array = at.op.operands[at.side].provenance
    if not isinstance(array, Activation):
        array = x
    arrays, structure = jax.tree.flatten(tuple(stages))
    known: list[tuple[Any, Any]] = once(id(array), (array, arrays), list)
    for other, result in known:
        if other == structure:
            return result
    value = x if stages[0].takes_carried else carried.read(x, at.op.primitive)
    result = applied(stages, value, at)
    known.append((structure, result))
    return result
