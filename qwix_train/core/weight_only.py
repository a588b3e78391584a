"""The product of a float array and a quantized weight.

Where each index of the kept axes has one scale, the codes are multiplied and the
product is scaled,

    sum_k(x[k] * w[k, n]) = sum_k(x[k] * code[k, n]) * scale[n]

which differs from a product with the dequantized weight in rounding alone; with tiles
or zero points the weight is dequantized. On GPU and TPU either is left to XLA, which
converts as it multiplies, or to a Pallas kernel where the user says so: see
`pallas_dot`. On a CPU XLA does not convert as it multiplies: `cpu_dots` has the forms
that are taken there. The platform that the program is compiled for, and the shapes,
choose the form.

Differentiation keeps the codes alone. The weight is converted again on the way back.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from qwix_train.core import cpu_dots, numerics, pallas_dot, product_forms
from qwix_train.core import operands as ops
from qwix_train.core.arrival import when_there
from qwix_train.core.qarray import QArray, dequantize


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What is static about a product."""

    qtype: Any
    contracting: tuple[tuple[int, ...], tuple[int, ...]]
    precision: Any
    result: np.dtype
    dtype: Any


def weight_only_dot(
    x: jax.Array,
    weight: QArray,
    contracting: tuple[tuple[int, ...], tuple[int, ...]],
    *,
    precision: Any = None,
    result: np.dtype,
) -> jax.Array:
    """Sums products over axes of a float array and a quantized weight.

    Args:
        x: The float array.
        weight: The weight.
        contracting: The axes of each to sum over, not negative.
        precision: As in `jax.lax.dot_general`.
        result: The dtype of the result.

    Returns:
        The kept axes of ``x``, then those of the weight.

    >>> from qwix_train.core.qarray import quantize
    >>> weight = quantize(jnp.array([[1., 2.], [3., 4.]]), 'int8')
    >>> weight_only_dot(
    ...     jnp.array([1., 0.]), weight, ((0,), (0,)), result=jnp.dtype(jnp.float32)
    ... ).round(1).tolist()
    [1.0, 2.0]
    """
    spec = _Spec(weight.qtype, contracting, precision, jnp.dtype(result), weight.dtype)
    return _product(spec, x, weight.qvalue, weight.float_scale, weight.zero_point)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(spec: _Spec, *parts: Any) -> jax.Array:
    @custom_vmap
    def product(*parts):
        return product_forms.traced(_lowered)(spec, *parts)

    @product.def_vmap
    def _(axis_size, in_batched, *parts):
        # A batch of rows is a matrix, and the form to take is that for a matrix.
        if not any(jax.tree.leaves(in_batched[1:])):
            contracting = (tuple(a + 1 for a in spec.contracting[0]),)
            folded = dataclasses.replace(
                spec, contracting=(*contracting, spec.contracting[1])
            )
            return _product(folded, *parts), True
        axes = jax.tree.map(lambda batched: 0 if batched else None, in_batched)
        lowered = functools.partial(_lowered, spec)
        return jax.vmap(lowered, axes, axis_size=axis_size)(*parts), True

    return product(*parts)


def _product_jvp(spec: _Spec, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The product is linear in each: the array, the codes, and the scale."""
    out = _product(spec, *primals)
    tangent = jnp.zeros_like(out)
    for i in range(3):
        is_zero = isinstance(tangents[i], SymbolicZero)
        if is_zero or not jnp.issubdtype(primals[i].dtype, jnp.floating):
            continue
        parts = list(primals)
        parts[i] = tangents[i]
        tangent += _lowered(spec, *parts, linear=True)
    return out, tangent


_product.defjvp(_product_jvp, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnames=("spec", "linear"))
def _lowered(spec: _Spec, *parts: Any, linear: bool = False) -> jax.Array:
    """Returns the product in the form for the platform.

    Args:
        spec: What is static.
        *parts: The array; codes, scale, and zero point of the weight.
        linear: Take forms that can be transposed, and keep nothing but the parts.
    """
    general = functools.partial(_general, spec)
    if pallas_dot.chosen() and not linear and 0 not in parts[0].shape:
        product_forms.tell("Pallas kernel")
        x, codes, scale, zero_point = parts
        weight = cpu_dots.Operand(codes, scale, zero_point, spec.qtype)
        return pallas_dot.weight_dot(x, weight, spec.contracting, spec.result)
    if any(map(ops.is_explicitly_sharded, jax.tree.leaves(parts))):
        return general(*parts)

    def in_form(x, codes, scale, zero_point):
        weight = cpu_dots.Operand(codes, scale, zero_point, spec.qtype)
        static = spec.contracting, spec.result, spec.precision
        out = cpu_dots.weight_dot(x, weight, *static, transposable=linear)
        return general(x, codes, scale, zero_point) if out is None else out

    def on_cpu(*parts):
        return in_form(*parts) if linear else when_there(parts[0], in_form, *parts)

    def choose(*parts):
        return jax.lax.platform_dependent(*parts, cpu=on_cpu, default=general)

    return (jax.checkpoint(choose) if linear else choose)(*parts)


def _general(
    spec: _Spec,
    x: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
) -> jax.Array:
    """The form for XLA to fuse."""
    contracted = spec.contracting[1]
    kept = [axis for axis in range(codes.ndim) if axis not in contracted]
    scaled_after = (
        zero_point is None
        and numerics.format_of(spec.qtype).has_values
        and all(scale.shape[axis] == 1 for axis in contracted)
        and all(scale.shape[axis] in (1, codes.shape[axis]) for axis in kept)
    )
    dot = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(spec.contracting, ((), ())),
        precision=spec.precision,
    )
    product_forms.tell("codes, then scaled" if scaled_after else "dequantized")
    if not scaled_after:
        weight = QArray(codes, scale, zero_point, spec.qtype, float_dtype=spec.dtype)
        weight = dequantize(weight)
        return dot(x, weight, preferred_element_type=spec.result)
    # Every code is exact in every float dtype of 16 bits or more.
    wide = numerics.promote_types(spec.result, scale.dtype, jnp.float32)
    out = dot(x, codes.astype(x.dtype), preferred_element_type=wide)
    kept_before = (1,) * (out.ndim - len(kept))
    scale = scale.reshape((*kept_before, *(scale.shape[axis] for axis in kept)))
    return (out * scale.astype(wide)).astype(spec.result)
