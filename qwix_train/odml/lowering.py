"""Operations in the forms that the LiteRT converter has integer operators for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from qwix_train.core.grid import Grid
from qwix_train.odml.converter import annotate
from qwix_train.odml.graph import Node
from qwix_train.ops import DOT

Mark = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Marks:
    """What is done to the arrays of a product with a weight.

    Attributes:
      weight: marks a weight as quantized, with a scale for each index of an axis.
      input: marks an array with the elements of the activation, and zeros.
      output: marks an array with the elements of the result.
      finish: what follows the product in the same operator, and the mark of the result.
      dynamic: marks the activation, if it is quantized when the model runs.
    """

    weight: Callable[[np.ndarray, int], jax.Array]
    input: Mark
    output: Mark
    finish: Mark
    dynamic: Mark | None


def lowered_dot(
    node: Node, side: int, x: jax.Array, w: np.ndarray, marks: Marks
) -> jax.Array:
    """A product with a weight, as a product with a matrix.

    LiteRT has one axis of scales for a weight, and no other order of axes.

    Args:
      node: the product.
      side: the side of the weight.
      x: the activation.
      w: the weight, concrete.
      marks: what is done to the arrays; the weight's axis is 1.
    """
    x_axes = DOT.axes(node.params, 1 - side, x.ndim)
    w_axes = DOT.axes(node.params, side, w.ndim)
    rows, columns = [x.shape[a] for a in x_axes.kept], [w.shape[a] for a in w_axes.kept]
    depth = math.prod(x.shape[a] for a in x_axes.contracted)
    matrix = np.transpose(w, (*w_axes.contracted, *w_axes.kept))
    matrix = matrix.reshape(depth, math.prod(columns))
    order = (*x_axes.kept, *x_axes.contracted)
    if order != tuple(range(x.ndim)):
        x = lax.transpose(x, order)
    if marks.dynamic is not None:
        # The converter drops a reshape before the product, which then has the shape of
        # a matrix when it runs.
        x = marks.dynamic(x.reshape(-1, depth))
    elif len(x_axes.contracted) != 1:
        x = x.reshape(*rows, depth)
    if x.ndim == 1:
        x = x.reshape(1, depth)
    marked = marks.weight(matrix, 1)
    out = marks.finish(lax.dot_general(x, marked, (((x.ndim - 1,), (0,)), ((), ()))))
    if out.shape != (*rows, *columns):
        out = marks.output(out.reshape(*rows, *columns))
    if side == 0 and rows and columns:
        # The weight's axes stand in front.
        order = np.roll(range(out.ndim), len(columns))
        out = marks.output(lax.transpose(out, order.tolist()))
    return out


def lowered_conv(node: Node, x: jax.Array, w: np.ndarray, marks: Marks) -> jax.Array:
    """A convolution, as one in two dimensions with the channels last.

    A transposed one is a convolution of its input with zeros in between.

    Args:
      node: the convolution.
      x: its input.
      w: the weight, concrete.
      marks: what is done to the arrays; the weight's axis is 3.
    """
    params = node.params
    numbers = params["dimension_numbers"]
    spatial = len(numbers.lhs_spec) - 2
    to_last = (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    if to_last != tuple(range(x.ndim)):
        x = marks.input(lax.transpose(x, to_last))
    kernel = np.transpose(
        w, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])
    )
    strides, padding = list(params["window_strides"]), list(params["padding"])
    dilation = list(params["rhs_dilation"])
    spread = list(params["lhs_dilation"])
    if spatial == 1:
        # A column of height 1.
        x = marks.input(x[:, None])
        kernel = kernel[None]
        strides, dilation, spread = [1, *strides], [1, *dilation], [1, *spread]
        padding = [(0, 0), *padding]
    if any(s > 1 for s in spread):
        x = marks.input(
            _spread(x, jnp.zeros((), x.dtype), [0, *(s - 1 for s in spread), 0])
        )
    if any(low < 0 or high < 0 for low, high in padding):
        cuts = [(max(0, -low), max(0, -high)) for low, high in padding]
        slices = [slice(a, n - b) for (a, b), n in zip(cuts, x.shape[1:], strict=False)]
        x = marks.input(x[:, slices[0], slices[1]])
        padding = [(max(0, low), max(0, high)) for low, high in padding]
    if marks.dynamic is not None:
        sizes = [(n - 1) * d + 1 for n, d in zip(kernel.shape, dilation, strict=False)]
        same = lax.padtype_to_pads(x.shape[1:3], sizes, strides, "SAME")
        if padding != list(same):
            # The converter would put it between the annotation and the product.
            x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
            padding = [(0, 0), (0, 0)]
        x = marks.dynamic(x)
    out = lax.conv_general_dilated(
        x,
        marks.weight(kernel, 3),
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=params["feature_group_count"],
    )
    out = marks.finish(out)
    if spatial == 1:
        out = marks.output(out[:, 0])
    back = np.argsort((numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]))
    if back.tolist() != list(range(out.ndim)):
        out = marks.output(lax.transpose(out, back.tolist()))
    return out


def lowered_pad(
    x: jax.Array,
    padding: jax.Array,
    config: Sequence[tuple[int, int, int]],
    mark: Mark,
) -> jax.Array:
    """An array with padding around it, and between its elements.

    Args:
      x: the array.
      padding: the number to pad with.
      config: how many before, after, and between, for each axis.
      mark: marks an array with the elements of both as quantized as the result.
    """
    between = [n for _, _, n in config]
    if any(between):
        x = mark(_spread(x, padding, between))
    return lax.pad(x, padding, [(low, high, 0) for low, high, _ in config])


def _spread(x: jax.Array, padding: jax.Array, between: Sequence[int]) -> jax.Array:
    """An array with padding between its elements.

    In four axes, as LiteRT pads no more.

    Args:
      x: the array.
      padding: the number to pad with.
      between: how many to put between two elements, for each axis.
    """
    for axis, count in enumerate(between):
        if count == 0 or x.shape[axis] < 2:
            continue
        shape = list(x.shape)
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        x = x.reshape(before, shape[axis], 1, after)
        x = lax.pad(x, padding, [(0, 0, 0), (0, 0, 0), (0, count, 0), (0, 0, 0)])
        shape[axis] *= count + 1
        # What was put after the last one is too much.
        x = lax.slice_in_dim(x.reshape(shape), 0, shape[axis] - count, axis=axis)
    return x


def lowered_softmax(node: Node, x: jax.Array) -> jax.Array:
    """A softmax, or its logarithm, along the last axis."""
    function = jax.nn.softmax if node.name == "softmax" else _log_softmax
    axis = node.params["axis"]
    return jnp.moveaxis(function(jnp.moveaxis(x, axis, -1)), -1, axis)


def _log_softmax(x: jax.Array) -> jax.Array:
    """The logarithm of a softmax, as the converter knows it in integers.

    It becomes one operator, so that the grids in between do not matter.
    """
    count = x.shape[-1]

    def mark(x, low, high):
        scale = np.float32(max(high - low, 1e-3) / 255)
        return annotate(x, Grid(scale, np.int64(round(-128 - low / scale))))

    shifted = mark(x - x.max(-1, keepdims=True), -16, 0)
    total = mark(mark(jnp.exp(shifted), 0, 1).sum(-1, keepdims=True), 0, count)
    return shifted - mark(jnp.log(total), 0, math.log(count))


_POOL = (
    "window_dimensions",
    "window_strides",
    "padding",
    "base_dilation",
    "window_dilation",
)


def lowered_pool(
    node: Node,
    operands: Sequence[Any],
    mark: Mark,
) -> jax.Array:
    """A maximum or average over windows, in two dimensions.

    Args:
      node: the operation.
      operands: its input; of an average also how many elements each window has.
      mark: marks an array with the elements of the input, and zeros.
    """
    x = operands[0]
    params = {key: node.params[key] for key in _POOL}
    is_sequence = x.ndim == 3
    if is_sequence:
        # A column of height 1.
        x = mark(x[:, None])
        for key, (first, *others) in params.items():
            params[key] = (first, (0, 0) if key == "padding" else 1, *others)
    if len(operands) > 1:
        out = _lowered_average(params, x, operands[1], mark)
    else:
        low = np.array(-np.inf, x.dtype)
        out = lax.reduce_window(x, low, lax.max, *params.values())
    return mark(out[:, 0]) if is_sequence else out


def _lowered_average(
    params: Mapping[str, Any],
    x: jax.Array,
    divisor: Any,
    mark: Mark,
) -> jax.Array:
    """An average over windows.

    Where the padding counts, it is put around the input, which LiteRT's own does not
    count.
    """
    if np.size(divisor) == 1 and any(map(any, params["padding"])):
        x = mark(jnp.pad(x, params["padding"]))
        params = {**params, "padding": [(0, 0)] * x.ndim}

    def total(x):
        return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, *params.values())

    if np.size(divisor) > 1:
        # The converter knows an average without the padding by how it is counted.
        divisor = total(jnp.ones(x.shape, x.dtype))
    return total(x) / divisor


def lowered_lookup(node: Node, table: jax.Array, indices: jax.Array) -> jax.Array:
    """A lookup of rows; indices outside of the table are brought within.

    Rows of NaN for these, which JAX has by default, are nothing that codes stand for.
    """
    params = node.params
    return lax.gather(
        table,
        indices,
        params["dimension_numbers"],
        params["slice_sizes"],
        mode=lax.GatherScatterMode.CLIP,
    )
