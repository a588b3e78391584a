"""A Pallas kernel for products of float rows and a quantized weight.

    with qwix_train.pallas_products():
        logits = jax.jit(model.apply)(variables, x)

Each program of the grid reads the codes of some columns, a byte or half a byte each,
and multiplies what they stand for: no float weight is written to memory. It is for GPU
and TPU. **It has been measured on neither**, so nothing chooses it but this context;
without it the product is left to XLA. So are, within it, products that are not those
of a float array and one matrix: with batch axes, with `out_sharding`, of float8
activations, and with packed weights.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from qwix_train.core import cpu_dots, numerics
from qwix_train.core.formats import SmallFloat, levels

_COLUMNS = 128
_ROWS = 16
"""Rows of activations are filled up to a multiple: units for matrices take no fewer."""

_TERMS = 256
"""Terms that are added at a time, or as near as tiles allow."""

# None, or whether the kernel is interpreted. It is part of the key of jit's caches.
_interpreted = jax.make_user_context(None)


@contextlib.contextmanager
def pallas_products(*, interpret: bool = False) -> Iterator[None]:
    """Computes products of a float array and one matrix of codes by a Pallas kernel.

    That is for weights without zero points, in models whose arrays are not sharded, or
    within `shard_map`. Others are left to XLA: products with batch axes, with
    `out_sharding`, of float8 activations, or with packed weights; and derivatives.
    What it is worth has not been measured on any GPU or TPU; measure it before you use
    it.

    Args:
        interpret: Evaluate the kernel by JAX, on any platform, slowly.

    Raises:
        ValueError: By a product that the kernel cannot compute.

    >>> import jax.numpy as jnp
    >>> import qwix_train
    >>> weight = qwix_train.quantize(jnp.eye(4), 'nf4', channelwise_axes=[1])
    >>> with qwix_train.pallas_products(interpret=True):
    ...     out = qwix_train.dot(jnp.array([[1., 2., 3., 4.]]), weight)
    >>> out.round().tolist()
    [[1.0, 2.0, 3.0, 4.0]]
    """
    with _interpreted(interpret):
        yield


def chosen() -> bool:
    """Whether products are those of the kernel."""
    return _interpreted.value is not None


def weight_dot(
    x: jax.Array,
    weight: cpu_dots.Operand,
    contracting: tuple[tuple[int, ...], tuple[int, ...]],
    result: Any,
) -> jax.Array:
    """Returns the product of a float array and a quantized weight.

    Args:
        x: The float array.
        weight: The weight, with a scale.
        contracting: The contracted axes of both.
        result: The dtype of the result; sums are float32.

    Returns:
        The product, the kept axes of ``x`` before those of the weight.

    Raises:
        ValueError: The weight has a zero point, or its axes do not merge to a matrix.
    """
    merged = None
    if weight.zero_point is None:
        merged = cpu_dots.merged(x, weight, contracting)
    if merged is None or 1 not in (merged[1].codes.shape[0], merged[1].codes.shape[2]):
        raise ValueError(
            f"The Pallas kernel does not multiply an array of shape {x.shape} by a "
            f"weight of shape {weight.codes.shape} along its axes {contracting[1]}: it "
            "takes matrices without zero points, in tiles that divide them. Leave the "
            "product out of `pallas_products`."
        )
    rows, matrix, shape = merged
    assert matrix.scale is not None
    is_first = matrix.codes.shape[0] == 1
    codes, scale = (
        part[0] if is_first else part[..., 0].T for part in (matrix.codes, matrix.scale)
    )
    out = _product(rows, codes, scale, weight.qtype)
    return out.astype(result).reshape(shape)


def _product(x: jax.Array, codes: jax.Array, scale: jax.Array, qtype: Any) -> jax.Array:
    """The product of (M, K) and (K, N), whose scales are (T or 1, N or 1)."""
    from jax.experimental import pallas as pl  # Takes a second to import.

    (m, k), n = x.shape, codes.shape[1]
    entry = numerics.format_of(qtype)
    if codes.dtype in (jnp.int4, jnp.uint4):
        # Two columns share a byte, and an odd one has a byte of its own.
        signed, planes = codes.dtype == jnp.int4, 2
        codes = jnp.pad(codes, ((0, 0), (0, n % 2)))
        scale = jnp.pad(jnp.broadcast_to(scale, (len(scale), n)), ((0, 0), (0, n % 2)))
        stored = codes.reshape(k, -1, 2)
    else:
        signed, planes, stored = (
            jnp.issubdtype(codes.dtype, jnp.signedinteger),
            1,
            codes,
        )
        scale = jnp.broadcast_to(scale, (len(scale), n))
    stored = jax.lax.bitcast_convert_type(stored, jnp.uint8)
    width = stored.shape[1]
    scale = scale.astype(jnp.float32).reshape(len(scale), width, planes)
    scale = jnp.moveaxis(scale, 2, 0)
    rows = m + -m % _ROWS
    x = jnp.pad(x, ((0, rows - m), (0, 0)))

    tiles = scale.shape[1]
    tile = k // tiles
    some = math.gcd(tiles, max(1, _TERMS // tile)) if tiles > 1 else 1
    terms = some * tile if tiles > 1 else math.gcd(k, _TERMS)
    columns = _COLUMNS if width % _COLUMNS == 0 else width

    def values(code: jax.Array) -> jax.Array:
        if isinstance(entry.elements, SmallFloat):
            return entry.elements.from_bits(code, entry.bits, jnp.float32)
        if entry.table is not None:
            return levels.selected(code, entry.table, jnp.float32)
        half = 2 ** (8 // planes - 1)
        return ((code ^ half) - half if signed else code).astype(jnp.float32)

    def kernel(x_ref, stored_ref, scale_ref, out_ref):
        def add(i, sums):
            part = pl.ds(i * terms, terms)
            factor = x_ref[:, part].astype(jnp.float32)
            read = stored_ref[part, :].astype(jnp.int32)
            own = pl.ds(i * some, some) if tiles > 1 else pl.ds(0, 1)
            found = []
            for plane in range(planes):
                code = read >> 4 * plane & (15 if planes == 2 else 255)
                value = values(code).reshape(some, terms // some, columns)
                value = (value * scale_ref[plane, own, :][:, None]).reshape(terms, -1)
                out = jnp.dot(factor, value, preferred_element_type=jnp.float32)
                found.append(sums[plane] + out)
            return tuple(found)

        zeros = tuple(jnp.zeros((_ROWS, columns)) for _ in range(planes))
        for plane, sums in enumerate(jax.lax.fori_loop(0, k // terms, add, zeros)):
            out_ref[plane] = sums

    def call(*arrays: jax.Array, compiled_by: Any = None) -> jax.Array:
        return pl.pallas_call(
            kernel,
            jax.ShapeDtypeStruct((planes, rows, width), jnp.float32),
            grid=(rows // _ROWS, width // columns),
            in_specs=[
                pl.BlockSpec((_ROWS, k), lambda i, j: (i, 0)),
                pl.BlockSpec((k, columns), lambda i, j: (0, j)),
                pl.BlockSpec((planes, tiles, columns), lambda i, j: (0, 0, j)),
            ],
            out_specs=pl.BlockSpec((planes, _ROWS, columns), lambda i, j: (0, i, j)),
            interpret=bool(_interpreted.value),
            compiler_params=compiled_by,
        )(*arrays)

    def triton(*arrays: jax.Array) -> jax.Array:
        from jax.experimental.pallas.triton import CompilerParams

        return call(*arrays, compiled_by=CompilerParams())

    out = jax.lax.platform_dependent(x, stored, scale, cuda=triton, default=call)
    return jnp.moveaxis(out, 0, 2).reshape(rows, -1)[:m, :n]
