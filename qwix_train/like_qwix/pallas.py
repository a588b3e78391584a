"""Pallas kernels that take quantized arrays, as `qwix.pallas` has them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl

from qwix_train.core.dot_general import dot as dot
from qwix_train.core.dot_general import dot_general as dot_general
from qwix_train.core.einsum import einsum as einsum
from qwix_train.core.qarray import QArray as QArray
from qwix_train.core.qarray import dequantize as dequantize
from qwix_train.core.qarray import quantize as quantize
from qwix_train.planning.current_rule import current_rule

get_current_rule = current_rule
"""`qwix_train.current_rule`, under the name that it has in `qwix`."""


def pallas_call(
    kernel: Callable[..., None],
    out_shape: Any,
    *,
    grid_spec: pl.GridSpec | None = None,
    grid: Any = (),
    in_specs: Any = pl.no_block_spec,
    out_specs: Any = pl.no_block_spec,
    scratch_shapes: Any = (),
    **kwargs: Any,
) -> Callable[..., Any]:
    """`pallas_call` of a kernel whose inputs may be `QArray`s.

    The kernel finds a `QArray` of references where the call was given a `QArray`. Its
    block is that of the array; the blocks of its scales follow.

    Args:
      kernel: the kernel.
      out_shape: see `jax.experimental.pallas.pallas_call`, as for the others.
      grid_spec: see there.
      grid: see there.
      in_specs: see there; one for a `QArray` says the block of the array.
      out_specs: see there.
      scratch_shapes: see there.
      **kwargs: see there.

    Raises:
      ValueError: by the function, if a block cuts the tiles of a `QArray`, or one has
        a zero point.
    """
    if grid_spec is None:
        grid_spec = pl.GridSpec(grid, in_specs, out_specs, scratch_shapes)

    def call(*args: Any) -> Any:
        prefetched = getattr(grid_spec, "num_scalar_prefetch", 0)
        specs = grid_spec.in_specs
        if specs is not pl.no_block_spec:
            specs = jax.tree.map(
                _with_scales, specs, args[prefetched:], is_leaf=_is_spec
            )
        own = copy.copy(grid_spec)
        own.in_specs = specs
        return pl.pallas_call(kernel, out_shape, grid_spec=own, **kwargs)(*args)

    return call


def _is_spec(value: Any) -> bool:
    return isinstance(value, pl.BlockSpec)


def _with_scales(spec: pl.BlockSpec, arg: Any) -> Any:
    """The block of an input, and of the scales of one that is quantized."""
    if not isinstance(arg, QArray):
        return spec
    if arg.zero_point is not None:
        raise ValueError("A QArray with a zero point cannot be cut into blocks.")
    if spec.block_shape is None or spec.index_map is None:
        return dataclasses.replace(arg, qvalue=spec, scale=spec)
    block: list[Any] = []
    cuts: Sequence[Any] = spec.block_shape
    for size, cut, scales in zip(arg.shape, cuts, arg.scale.shape, strict=True):
        if cut is None or scales == 1:
            block.append(None if cut is None else 1)
            continue
        if size % cut or scales % (size // cut):
            raise ValueError(
                f"A block of {cut} of an axis of {size} cuts the tiles of its {scales} "
                "scales."
            )
        block.append(scales // (size // cut))
    index_map, shape = spec.index_map, arg.scale.shape

    def index_of_scale(*indices: Any) -> tuple[Any, ...]:
        found = zip(index_map(*indices), shape, strict=True)
        return tuple(index if scales > 1 else 0 for index, scales in found)

    scale = dataclasses.replace(
        spec, block_shape=tuple(block), index_map=index_of_scale
    )
    return dataclasses.replace(arg, qvalue=spec, scale=scale)
