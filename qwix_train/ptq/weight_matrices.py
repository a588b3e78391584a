"""A stored param as the matrices that a product multiplies its input by.

Methods that look at the input of a product work on matrices of shape (rows, channels).
A channel is an element of the input that the product contracts, and a row an element of
the output. A stored param holds one such matrix, or one for each layer that is scanned
over and each group (a batch axis of the product). Its axes may be in any order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.core import tiling
from qwix_train.core.how import HowToQuantize, parse_calibration_method
from qwix_train.ops.vectors import Vectors
from qwix_train.trace.analyze import Op
from qwix_train.trace.factors import Atom
from qwix_train.trace.provenance import View


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """How to see a stored param as matrices, and back.

    Attributes:
      stored: the shape of the param.
      factors: the shape of the param when its axes are split as reshapes of the model
        split them.
      order: the axes of `factors` in the order layers, groups, rows, channels.
      layers: the sizes of the axes that are scanned over.
      groups: the sizes of the axes along which the product is batched.
      rows: the number of outputs of one matrix.
      channels: the number of inputs of one matrix.
    """

    stored: tuple[int, ...]
    factors: tuple[int, ...]
    order: tuple[int, ...]
    layers: tuple[int, ...]
    groups: tuple[int, ...]
    rows: int
    channels: int

    @property
    def count(self) -> int:
        """The number of matrices."""
        return math.prod(self.layers) * math.prod(self.groups)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the stacked matrices: (count, rows, channels)."""
        return self.count, self.rows, self.channels

    def to_matrices(self, array: jax.Array) -> jax.Array:
        """The matrices, shape (count, rows, channels), of an array stored as the param.

        Args:
          array: shape `stored`.
        """
        return array.reshape(self.factors).transpose(self.order).reshape(self.shape)

    def from_matrices(self, matrices: jax.Array) -> jax.Array:
        """The array, shape `stored`, that holds matrices of shape `shape`."""
        shape = [self.factors[axis] for axis in self.order]
        back = np.argsort(self.order)
        return matrices.reshape(shape).transpose(back).reshape(self.stored)

    def spread(self, tiled: jax.Array) -> jax.Array:
        """The entry of each element, shape `shape`, of a scale of the stored param."""
        whole = jnp.zeros(self.stored, tiled.dtype)
        spread = tiling.elementwise(
            lambda x, entry: jnp.broadcast_to(entry, x.shape), whole, tiled
        )
        return self.to_matrices(spread)

    def gathered(self, matrices: jax.Array, shape: Sequence[int]) -> jax.Array:
        """What `spread` was given, for entries that are the same within each tile."""
        stored = self.from_matrices(matrices)
        steps = tiling.tile_sizes(self.stored, shape)
        return stored[tuple(slice(None, None, step) for step in steps)]


def matrix_view(view: View, op: Op, side: int) -> MatrixView:
    """How to see the param that an op reads as matrices.

    Args:
      view: what the op reads of the param.
      op: a product, or a convolution whose kernel is the param.
      side: 0 if the param is its left operand, 1 for the right one.

    Raises:
      ValueError: if the op does not read all of the param, or reads it in an unknown
        order. The message says why.
    """
    axes = _axes(op, side)
    contracting, batch = axes.contracted, axes.batch
    channels = channel_order(view, op, side)
    shape = op.operands[side].shape
    # For each factor its place: layers 0, groups 1, rows 2, channels 3.
    places: dict[Atom, tuple[int, int, int]] = {}
    for dim, atoms in enumerate(view.dims):
        atoms = [atom for atom in atoms if atom.size > 1]
        if any(not (atom.whole and atom.stride) for atom in atoms):
            raise ValueError("the op reads a part of it, or its elements in new order")
        size = math.prod(atom.size for atom in atoms)
        if dim in contracting and size != shape[dim]:
            raise ValueError("it is only a part of what the op contracts")
        role, position = 2, dim
        if dim in contracting:
            role, position = 3, channels.index(contracting.index(dim))
        elif dim in batch:
            role, position = 1, batch.index(dim)
            if size not in (1, shape[dim]):
                raise ValueError("it is only a part of what the op is batched over")
        for number, atom in enumerate(atoms):
            places[atom] = (role, position, number)
    for axis, place in _layer_axes(view, op).items():
        places[Atom(axis, view.shape[axis], 1)] = (0, place, 0)
    factors: list[Atom] = []
    for axis, length in enumerate(view.shape):
        atoms = sorted((a for a in places if a.axis == axis), key=lambda a: -a.stride)
        rest = length
        for atom in atoms:
            rest //= atom.size
            if atom.stride != rest:
                rest = 0
                break
        if rest != 1:
            raise ValueError("the op reads a part of it")
        factors += atoms
    order = sorted(range(len(factors)), key=lambda i: places[factors[i]])

    def sizes(role: int) -> tuple[int, ...]:
        return tuple(factors[i].size for i in order if places[factors[i]][0] == role)

    return MatrixView(
        stored=view.shape,
        factors=tuple(atom.size for atom in factors),
        order=tuple(order),
        layers=sizes(0),
        groups=sizes(1),
        rows=math.prod(sizes(2)),
        channels=math.prod(sizes(3)),
    )


def row_tile(view: MatrixView, how: HowToQuantize) -> int | None:
    """The number of consecutive channels of a row that share a scale.

    Args:
      view: how a param is read as matrices.
      how: how it is quantized.

    Returns:
      The number, which divides the number of all channels. None if the elements that
      share a scale are anything else: spread over rows, fewer at the end, or not
      consecutive.
    """
    if parse_calibration_method(how.calibration_method)[0] == "fixed":
        return None  # one scale for all
    shape = how.scale_shape(view.stored)
    count = math.prod(shape)
    tile = math.prod(view.stored) // max(count, 1)
    if tile == 0 or view.channels % tile:
        return None
    with jax.ensure_compile_time_eval():
        numbers = jnp.arange(count).reshape(shape)
        entries = np.asarray(view.spread(numbers)).reshape(-1, tile)
    first = entries[:, 0]
    alike = (entries == first[:, None]).all() and len(np.unique(first)) == len(first)
    return tile if alike else None


def channel_order(view: View, op: Op, side: int) -> tuple[int, ...]:
    """The contracted axes of an op, in the order in which the param stores them.

    Args:
      view: what the op reads of the param.
      op: the op.
      side: which operand the param is.

    Returns:
      Indices into the contracted axes, as the kind of op lists them for an operand.
    """
    contracting = _axes(op, side).contracted

    def first(index: int) -> list[tuple[int, int]]:
        atoms = view.dims[contracting[index]]
        return [(atom.axis, -atom.stride) for atom in atoms if atom.size > 1]

    return tuple(sorted(range(len(contracting)), key=first))


def input_vectors(view: View, op: Op, side: int) -> Vectors:
    """How the input that a param is multiplied by is seen as vectors.

    Args:
      view: what the op reads of the param.
      op: the op.
      side: which operand the param is.

    Raises:
      ValueError: if it cannot be seen as vectors. The message says why.
    """
    # Along an axis that was added to the weight, every entry has the same matrix.
    own_batch = [
        any(atom.size > 1 for atom in view.dims[axis]) for axis in _axes(op, side).batch
    ]
    order = channel_order(view, op, side)
    return ops.kind_of(op).vectors(op, side, order, own_batch)


def _axes(op: Op, side: int) -> ops.OperandAxes:
    ndim = len(op.operands[side].shape)
    return ops.kind_of(op).axes(op.params, side, ndim)


def _layer_axes(view: View, op: Op) -> dict[int, int]:
    """The stored axes that are scanned over, each with its place among the scans."""
    seen = {atom.axis for atoms in view.dims for atom in atoms}
    absent = [
        axis for axis, size in enumerate(view.shape) if axis not in seen and size > 1
    ]
    layers = [length for length in op.layers if length > 1]
    if not absent:
        return {}  # every layer reads the same param
    if [view.shape[axis] for axis in absent] != layers:
        raise ValueError("the op reads a part of it")
    return {axis: place for place, axis in enumerate(absent)}
