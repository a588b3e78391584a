"""How an operation is computed from operands that went through their stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from qwix_train import ops
from qwix_train.stages.fake_quantize import WithCodes
from qwix_train.trace import carried
from qwix_train.trace.analyze import Op
from qwix_train.values.stored_weight import StoredWeight, product


class Product(Protocol):
    """Computes an operation."""

    def __call__(self, op: Op, operands: Sequence[Any], run: Callable[..., Any]) -> Any:
        """The result of an operation.

        Args:
          op: the operation.
          operands: its operands, each an array or what is carried for one.
          run: the operation itself, on arrays.
        """
        ...


def in_float(op: Op, operands: Sequence[Any], run: Callable[..., Any]) -> Any:
    """The operation itself, of the arrays that the operands stand for."""
    del op
    return run(*operands)


def as_carried(op: Op, operands: Sequence[Any], run: Callable[..., Any]) -> Any:
    """What would become of the operation if it had no stages."""
    results = carried.results_of(
        op.primitive, op.params, operands, lambda *x: [run(*x)]
    )
    return results[0]


def of_codes(op: Op, operands: Sequence[Any], run: Callable[..., Any]) -> Any:
    """A product of codes, where the operands have some.

    Its derivative is that of the same product in QAT: codes have none of their own.
    """
    factors = operands[: ops.kind_of(op).sides]
    if all(isinstance(x, StoredWeight | WithCodes) for x in factors):
        return _of_codes(op, operands)
    if any(isinstance(x, StoredWeight) for x in operands):
        return product(op.primitive, op.params, operands)
    # The weight was dequantized on the way here, and so the product is in float.
    return run(*operands)


def _of_codes(op: Op, operands: Sequence[Any]) -> jax.Array:
    arrays, restore = carried.unpacked(operands)

    @jax.custom_jvp
    def of_codes(arrays):
        codes = [x.codes if isinstance(x, WithCodes) else x for x in restore(arrays)]
        return product(op.primitive, op.params, codes)

    @jax.checkpoint  # keeps the codes for the backward pass, and no floats
    def of_floats(arrays):
        values = map(carried.value_of, restore(arrays))
        return product(op.primitive, op.params, list(values))

    @of_codes.defjvp
    def _(primals, tangents):
        _, tangent = jax.jvp(of_floats, primals, tangents)
        return of_codes(*primals), tangent

    return of_codes(arrays)
