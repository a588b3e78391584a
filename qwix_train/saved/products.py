"""Which params of a checkpoint are multiplied, as far as its tensors say.

A tensor ``[out, in]`` that becomes a param with its axes in another order, such as a
`kernel` ``[in, out]``, is the weight of a linear layer: PyTorch has these so. A tensor
of three named axes that keep their order is a stack of matrices ``[in, out]``, such as
the experts of gpt-oss. Other params are not multiplied, or their products are not
known: where no place names the axes, three may be those of an attention's kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.planning import table as plan_table
from qwix_train.planning.leaves import Leaf
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq import whole_model
from qwix_train.ptq.hugging_face import places
from qwix_train.ptq.hugging_face.axes import Axes
from qwix_train.ptq.hugging_face.places import Assembly, TensorMapping
from qwix_train.trace.scopes import module_scope
from qwix_train.values import stored


def abstract_params(
    shapes: Any, mapping: TensorMapping, rules: Sequence[QuantizationRule]
) -> Any:
    """The shapes of the params, quantized as in a model that multiplies by them.

    Args:
      shapes: nested dictionaries of shapes.
      mapping: the places of their tensors.
      rules: the rules.

    Raises:
      ValueError: if no rule matches a product, or a rule does not fit one, as where its
        tiles do not divide an axis.

    Example:
      >>> from qwix_train import QuantizationRule
      >>> from qwix_train.ptq.hugging_face import Place
      >>> shapes = {"fc": {"kernel": jax.ShapeDtypeStruct((64, 8), "float32")}}
      >>> mapping = {"fc.weight": Place("fc/kernel", "out in -> in out")}
      >>> rules = [QuantizationRule(weight_qtype="int4", tile_size=32)]
      >>> abstract_params(shapes, mapping, rules)["fc"]["kernel"].array.scale.shape
      (2, 8)
    """
    flat = stored.by_path(shapes)
    wanted = {p: tuple(x.shape) for p, x in flat.items() if Leaf.parse(p, flat) is None}
    found = places.assemblies(mapping, wanted, None, "the checkpoint")
    products = [assembly for assembly in found if _inputs(assembly)]
    _check_matched(rules, products)

    def program(tree: Any) -> list[jax.Array]:
        held = stored.by_path(tree)
        return [_product(held[assembly.path], assembly) for assembly in products]

    return whole_model.abstract_params(program, shapes, rules)


def _check_matched(
    rules: Sequence[QuantizationRule], products: Sequence[Assembly]
) -> None:
    """Complains if no rule matches a product."""
    modules = sorted({"/".join(assembly.path[:-1]) for assembly in products})
    if not modules:
        raise ValueError(
            "No param of the checkpoint is known to be multiplied: neither a matrix "
            "`kernel`, nor one that a mapping names the axes of. Quantize in your own "
            "code, with the model: qwix_train.ptq.quantize."
        )
    name = lax.dot_general_p.name
    named = ((rule, module) for rule in rules for module in modules)
    if not any(rule.matches(module, name, f"{name}0") for rule, module in named):
        raise ValueError(
            "No rule matches a param that is multiplied. These are in the modules "
            f"{plan_table.some(modules)}. A rule's module_path (--modules) is a "
            "regular expression that must match the whole path."
        )


def _inputs(assembly: Assembly) -> list[int]:
    """The axes of a param that its product sums over; none if it has no product."""
    axes = assembly.axes
    if axes == Axes.unchanged(len(axes.tensor)):
        return []  # The place does not say what they are.
    order = [name for group in axes.param for name in group if name not in axes.stacked]
    keeps_order = order == [name for group in axes.tensor for name in group]
    if len(axes.tensor) != (3 if keeps_order else 2):
        return []
    summed = axes.tensor[1]
    return [axis for axis, group in enumerate(axes.param) if {*group} <= {*summed}]


def _product(param: jax.Array, assembly: Assembly) -> jax.Array:
    """One input times a param, in the module of the param."""
    summed = _inputs(assembly)
    batch = [axis for axis in assembly.axes.slots if axis not in summed]
    if len(assembly.axes.tensor) == 3:
        first = assembly.axes.tensor[0]
        batch += [a for a, group in enumerate(assembly.axes.param) if group == first]
    lead, sizes = ([param.shape[a] for a in axes] for axes in (batch, summed))
    x = jnp.zeros((*lead, 1, *sizes), param.dtype)
    own = range(len(lead) + 1, x.ndim)
    with module_scope("/".join(assembly.path[:-1])):
        dims = ((tuple(own), tuple(summed)), (tuple(range(len(lead))), tuple(batch)))
        return lax.dot_general(x, param, dims)
