"""A planned graph as the LiteRT converter takes it: every tensor annotated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train.core.grid import Grid
from qwix_train.odml import integer_grid, lowering, ops
from qwix_train.odml.converter import annotate, uneven
from qwix_train.odml.evaluate import fold, per_channel, scaled_weight, sigmoid_in
from qwix_train.odml.fusion import weight_axes
from qwix_train.odml.graph import Node, Value
from qwix_train.odml.ops import MASKED, Kind
from qwix_train.odml.plan import NodePlan, OdmlPlan, TensorPlan
from qwix_train.odml.provider import calibrations_in, tensor_grid
from qwix_train.ops import CONV


def run_annotated(
    plan: OdmlPlan,
    values: Sequence[Any],
    quant_stats: Mapping[str, Any],
) -> list[Any]:
    """The results of a planned graph, with annotations for the converter.

    Args:
      plan: the plan.
      values: an array for each input of the traced call; concrete for what is static.
      quant_stats: the statistics that ranges are taken from.

    Raises:
      ValueError: if a range is missing, or the model drops elements at random.
    """
    return _Annotated(plan, grids_of(plan, quant_stats)).run(values)


def grids_of(plan: OdmlPlan, quant_stats: Mapping[str, Any]) -> dict[str, Grid]:
    """The grids of the tensors that have a range of their own, by name."""
    found = {}
    with jax.ensure_compile_time_eval():
        calibrations = calibrations_in(plan, quant_stats)
        for tensor in plan.tensors:
            grid = tensor_grid(tensor, calibrations.get(tensor.name))
            found[tensor.name] = _concrete(grid)
    return found


def _concrete(grid: Grid) -> Grid:
    scale, zero_point = np.asarray(grid.scale), np.asarray(grid.zero_point)
    return dataclasses.replace(
        grid, scale=scale.astype(np.float32), zero_point=zero_point.astype(np.int64)
    )


class _Annotated:
    def __init__(self, plan: OdmlPlan, grids: Mapping[str, Grid]):
        self.plan = plan
        self.grids = grids
        self.tables: dict[int, Grid] = {}
        # How many products with one there are of a value.
        self.ones: dict[int, int] = {}

    def run(self, values: Sequence[Any]) -> list[Any]:
        inputs = [
            x if value.static else self.marked(value, x)
            for value, x in zip(self.plan.graph.inputs, values, strict=True)
        ]
        return self.plan.graph.run(inputs, self.evaluate)

    def grid(self, value: Value) -> Grid | None:
        """The grid of a value, its own or shared; None if it is in float."""
        found = self.plan.range_of(value)
        if isinstance(found, TensorPlan):
            return self.grids[found.name]
        return None if found is None else self.tables.get(id(found))

    def marked(self, value: Value, x: Any) -> Any:
        """A value with its annotation."""
        grid = self.grid(value)
        return x if grid is None or not value.is_float else annotate(x, grid)

    def evaluate(self, node: Node, read) -> Sequence[Any]:
        if all(value.static for value in (*node.inputs, *node.outputs)):
            # Computed now, as the converter is to see a constant.
            with jax.ensure_compile_time_eval():
                return node.run(*map(read, node.inputs))
        plan = self.plan.of(node)
        if not node.outputs:
            return []
        if plan is None:
            return node.run(*map(read, node.inputs))
        first = self.plan.first_of(plan)
        if first.name in ops.PRODUCTS and first.weight is not None:
            end = self.plan.end_of(first)
            if node.out is not end:
                return [None]
            return [self.product(first, read)]
        if plan.in_integers or plan.moves:
            results = self.lowered(plan, read)
        else:
            results = node.run(*map(read, node.inputs))
        return [
            self.marked(value, x)
            for value, x in zip(node.outputs, results, strict=True)
        ]

    def product(self, plan: NodePlan, read) -> Any:
        """A product with a weight, and all that is fused into it."""
        node, side, fusion = plan.node, plan.weight, plan.fusion
        assert side is not None and plan.weight_how is not None
        how, value = plan.weight_how, node.inputs[1 - side]
        end = self.plan.end_of(plan)
        bias, least = None, np.zeros(())
        with jax.ensure_compile_time_eval():
            factor, addend = (None, None) if fusion is None else fold(fusion, read)
            w = jnp.asarray(read(node.inputs[side]))
            if how.channelwise_axes and how.calibration_method == "absmax":
                # The codes of training; a factor for each channel changes the scales.
                w = integer_grid.on_grid(w, integer_grid.of_weight(w, how))
            w = np.asarray(scaled_weight(node, side, w, factor))
            if addend is not None:
                bias = uneven(per_channel(node, addend).reshape(-1))
        source = None if plan.dynamic else self.grid(value)
        if bias is not None and source is not None:
            least = _least_weight_scale(bias, source)

        def mark_weight(w, axis):
            if how.channelwise_axes:
                lengths = [1] * axis + [w.shape[axis]] + [1] * (w.ndim - 1 - axis)
                smallest = np.broadcast_to(least, w.shape[axis]).reshape(lengths)
            else:
                smallest = least.max()
            axes = (axis,) if how.channelwise_axes else ()
            own = dataclasses.replace(how, channelwise_axes=axes)
            with jax.ensure_compile_time_eval():
                grid = integer_grid.of_weight(jnp.asarray(w), own, smallest)
            return annotate(jnp.asarray(uneven(w)), _concrete(grid))

        def finish(x):
            x = x if bias is None else x + bias
            if fusion is not None and fusion.activation is not None:
                x = _activation(fusion.activation, x)
            return self.marked(end, x)

        marks = lowering.Marks(
            weight=mark_weight,
            input=functools.partial(self.marked, value),
            output=functools.partial(self.marked, end),
            finish=finish,
            # Nothing may come between this annotation and the product.
            dynamic=functools.partial(annotate, grid=None, qtype=plan.act_qtype)
            if plan.dynamic
            else None,
        )
        x = read(value)
        if node.name in CONV.names:
            return lowering.lowered_conv(node, x, w, marks)
        if weight_axes(node, side):
            return lowering.lowered_dot(node, side, x, w, marks)
        operands = [x if marks.dynamic is None else marks.dynamic(x)] * 2
        operands[side] = mark_weight(w, 0)
        (out,) = node.run(*operands)
        return finish(out)

    def lowered(self, plan: NodePlan, read) -> Sequence[Any]:
        """The outputs of an operation that runs in integers, or moves codes."""
        node = plan.node
        kind, operands = plan.kind, list(map(read, node.inputs))
        if plan.name == "dropout":
            raise ValueError(
                f"{plan.where}: the model drops elements at random. Convert the call "
                "that evaluates it: deterministic=True, train=False, or model.eval()."
            )
        if kind is Kind.LOOKUP:
            return [self.lookup(plan, operands)]
        if plan.name in ("avg_pool", "max_pool"):
            mark = functools.partial(self.marked, node.inputs[0])
            return [lowering.lowered_pool(node, operands, mark)]
        if plan.name == "silu":
            (x, *_) = operands
            gate = tensor_grid(sigmoid_in(plan))
            return [x * annotate(jax.nn.sigmoid(x), gate)]
        if kind is Kind.ACTIVATION:
            x = self.apart(node.inputs[0], operands[0], self.grid(node.out))
            return [_activation(node, x)]
        if plan.name in ("softmax", "log_softmax"):
            return [lowering.lowered_softmax(node, operands[0])]
        if kind is Kind.CLIP:
            return [self.clipped(node, operands[0])]
        if kind is Kind.TIED:
            return [self.tied(plan, operands)]
        if plan.name == "pad":
            return [self.padded(node, operands)]
        if plan.name == "copy":
            x = self.apart(node.inputs[0], operands[0], self.grid(node.out))
            return node.run(x)
        for side in plan.constants:
            x, grid = np.asarray(operands[side]), _constant_grid(plan, operands[side])
            if plan.act_qtype == "int16" and plan.name == "add":
                # The converter takes no sum of 16 bits with operands of two shapes, but
                # a difference.
                return [operands[1 - side] - annotate(jnp.asarray(-x), grid)]
            operands[side] = annotate(jnp.asarray(x), grid)
        return node.run(*operands)

    def lookup(self, plan: NodePlan, operands) -> Any:
        table, indices = operands[:2]
        grid = _constant_grid(plan, table)
        self.tables[id(plan.node.inputs[0])] = grid
        table = annotate(jnp.asarray(table), grid)
        return lowering.lowered_lookup(plan.node, table, indices)

    def clipped(self, node: Node, x) -> Any:
        grid = self.grid(node.out)
        low, high = node.params["bounds"]
        if grid is None:
            return jnp.clip(x, low, high)
        for bound, combine in ((low, jnp.maximum), (high, jnp.minimum)):
            if np.isfinite(bound):
                x = annotate(combine(x, self.constant(bound, grid)), grid)
        return x

    def constant(self, x, grid: Grid) -> Any:
        """A constant on the grid of another tensor."""
        return annotate(jnp.asarray(_saturated(x, grid)), grid)

    def tied(self, plan: NodePlan, operands) -> Any:
        node = plan.node
        grid = self.grid(node.out)
        if grid is None:
            return node.run(*operands)[0]
        first = 1 if plan.name == "where" else 0
        for side in range(first, len(operands)):
            x = operands[side]
            if node.inputs[side].static:
                operands[side] = self.constant(x, grid)
            else:
                x = self.apart(node.inputs[side], x, grid)
                operands[side] = annotate(x, grid)
        return node.run(*operands)[0]

    def apart(self, value: Value, x, grid: Grid | None) -> Any:
        """A tensor to be put on another grid; times one, if others read it, too.

        At the sight of two grids in a row, the converter gives the tensor the second
        one for all that read it, or has some of them read floats.
        """
        own = self.grid(value)
        shared = value.is_output or len(set(map(id, value.consumers))) > 1
        if own is None or grid is None or not shared or _equal(own, grid):
            return x
        # A one for each reader: the converter makes one product of equal ones.
        count = self.ones.get(id(value), 0)
        self.ones[id(value)] = count + 1
        zero_point = 0 if grid.qtype == "int16" else grid.codes[0]
        one = grid.codes[1] - zero_point - count
        one_grid = Grid(np.float32(1 / one), np.int64(zero_point), grid.qtype)
        return x * annotate(jnp.ones((), x.dtype), one_grid)

    def padded(self, node: Node, operands) -> Any:
        x, padding = operands
        grid = self.grid(node.out)
        if grid is None:
            return node.run(x, padding)[0]
        padding = jnp.asarray(_saturated(padding, grid), x.dtype)
        mark = functools.partial(self.marked, node.out)
        return lowering.lowered_pad(x, padding, node.params["padding_config"], mark)


def _least_weight_scale(bias: np.ndarray, source: Grid) -> np.ndarray:
    """The least scales of a weight with which a bias fits into its 32 bits.

    The scale of a bias is that of the input times that of the weight; half of its range
    is left for the products that are added to it. Where the bias asks for a larger
    scale than the weight does, the products are so small next to it that the rounding
    of the weight changes the sum by less than 1e-7 of the bias for each of them: far
    less than a step of an 8-bit output. Training leaves it out.
    """
    return np.abs(bias) / (np.float64(source.scale) * 2**30)


def _constant_grid(plan: NodePlan, x: Any) -> Grid:
    with jax.ensure_compile_time_eval():
        return _concrete(integer_grid.of_constant(jnp.asarray(x), plan.act_qtype))


def _equal(a: Grid, b: Grid) -> bool:
    return bool(np.all(a.scale == b.scale) and np.all(a.zero_point == b.zero_point))


def _saturated(x: Any, grid: Grid) -> np.ndarray:
    """The values of a grid next to those of a constant."""
    x = np.asarray(x, np.float32)
    x = np.where(x <= MASKED, np.float32(-3e38), x)
    codes = integer_grid.codes_of(x, grid)
    return ((codes - np.asarray(grid.zero_point)) * np.asarray(grid.scale)).astype(
        np.float32
    )


def _activation(node: Node, x: Any) -> Any:
    """An activation function, as the converter knows it."""
    functions = {
        "relu": jax.nn.relu,
        "relu6": jax.nn.relu6,
        "relu_n1_to_1": lambda x: jnp.clip(x, -1.0, 1.0),
    }
    return functions[node.name](x)
