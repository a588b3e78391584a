"""Convolutions in the one layout that XLA compiles well on a CPU, wherever they are.

At the top of a program XLA transposes the operands of every convolution to this layout.
In the body of a branch it does not (in JAX 0.10 to 0.12), and runs those of gradients
by a plain loop, 60 to 100 times as slow, which also adds in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from qwix_train.trace import bodies, evaluate, jax_versions

_SETTINGS = """window_strides padding lhs_dilation rhs_dilation feature_group_count
    batch_group_count precision preferred_element_type""".split()


def run_as_at_top(body: jax_versions.Body, inputs: Sequence[Any]) -> list[Any]:
    """Runs a traced function within a branch as XLA compiles it outside of any.

    Args:
      body: the traced function.
      inputs: a value for each of its inputs.

    Returns:
      The results. The convolutions of its loops and branches run as they are, which is
      how they run outside, too.
    """
    ops: Any = {
        key: eqn
        for key, eqn, _ in bodies.equations(body, _is_inlined)
        if eqn.primitive is lax.conv_general_dilated_p
        and not _is_canonical(eqn.params["dimension_numbers"])
    }

    def handler(eqn, operands, run, given):
        del given
        params, (x, kernel) = eqn.params, operands
        return lax.platform_dependent(
            x,
            kernel,
            cpu=lambda x, kernel: _canonical(x, kernel, params),
            default=run,
        )

    return evaluate.evaluate(body, inputs, ops, handler)


def _is_inlined(eqn: Any, inside: bodies.Inside) -> bool:
    del eqn
    return inside.kind in (bodies.Kind.CALL, bodies.Kind.REMAT)


def _canonical(x: jax.Array, kernel: jax.Array, params: Any) -> jax.Array:
    """A convolution on operands that are transposed to batch, space, features."""
    numbers = params["dimension_numbers"]
    lhs, rhs, out = (_channels_last(spec) for spec in numbers)
    kernel_axes = (*rhs[1:-1], rhs[-1], rhs[0])  # space, input and output features
    result = lax.conv_general_dilated(
        lax.transpose(x, lhs),
        lax.transpose(kernel, kernel_axes),
        dimension_numbers=_canonical_numbers(len(lhs)),
        **{name: params[name] for name in _SETTINGS},
    )
    return lax.transpose(result, np.argsort(out))


def _channels_last(spec: Sequence[int]) -> tuple[int, ...]:
    """Axes in the order batch (of a kernel: output features), space, features."""
    first, features, *space = spec
    return (first, *space, features)


def _canonical_numbers(ndim: int) -> lax.ConvDimensionNumbers:
    space = tuple(range(1, ndim - 1))
    images = (0, ndim - 1, *space)
    kernel = (ndim - 1, ndim - 2, *(axis - 1 for axis in space))
    return lax.ConvDimensionNumbers(images, kernel, images)


def _is_canonical(numbers: lax.ConvDimensionNumbers) -> bool:
    return numbers == _canonical_numbers(len(numbers.lhs_spec))
