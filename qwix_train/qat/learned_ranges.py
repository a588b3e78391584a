"""Learned scales of activations as ranges, for what takes ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from qwix_train.core import numerics
from qwix_train.frontends.nested import inserted
from qwix_train.planning import learned_scale
from qwix_train.planning.leaves import Path
from qwix_train.planning.rules import QuantizationRule, check_rules, rule_of_range
from qwix_train.values import stored


def learned_quant_stats(
    params: Any,
    rules: Sequence[QuantizationRule],
    quant_stats: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ranges of activations that were learned, in the form of collected ones.

    `quantize_params` finds learned scales among the params, and needs no ranges. This
    is for what knows collected ranges alone: `OdmlQatProvider` and `odml.convert`, with
    rules that have another method than the learned one. There it stands for the inputs
    of products; LiteRT's other tensors need collected ranges beside. Learned scales of
    weights have no place there: `odml` has the scale of a weight from its largest
    magnitude.

    Args:
      params: a tree of params with learned scales, or an NNX model.
      rules: the rules that they were trained with.
      quant_stats: other ranges, such as those of a `calib.Calibrator`. Learned ones
        take the place of those of the same name.

    Returns:
      `quant_stats` as `quantize_params` takes them: at the path of each activation a
      dictionary with `count`, `sum_of_min` and `sum_of_max`.

    Raises:
      ValueError: if a learned range is not one that the rule of its op trains; if it
        is not finite; or if there is none.

    Example:
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule
      >>> from qwix_train.qat import learned_quant_stats
      >>> rules = [QuantizationRule(weight_qtype="int8", act_qtype="int8",
      ...     act_calibration_method="pact")]
      >>> params = {"dot_general0_lhs_alpha": jnp.full((1, 1), 6.0)}
      >>> ranges = learned_quant_stats(params, rules)["dot_general0_lhs"]
      >>> ranges["sum_of_min"].item(), round(ranges["sum_of_max"].item(), 3)
      (0.0, 6.0)
    """
    if isinstance(params, nnx.Module):
        params = nnx.to_pure_dict(nnx.state(params, nnx.Param))
    if hasattr(params, "keys") and "params" in params.keys():
        params = params["params"]
    named = stored.by_path(stored.unbox(params))
    found = dict(quant_stats or {})
    trained = list(filter(None, map(learned_scale.trained_leaf, named)))
    if not trained:
        raise ValueError(
            "There is no learned range of an activation among the params. Train them "
            "with qat.attach_learned_scales and act_calibration_method='lsq', 'lsq+' "
            "or 'pact'."
        )
    rules = check_rules(rules)
    for path in dict.fromkeys(leaf.owner for leaf in trained):
        leaves = learned_scale.leaves_at(path, named)
        for leaf, value in learned_scale.each(path, leaves).items():
            learned_scale.check_finite(leaf, value)
        ends = _ends(leaves, _qtype(path, leaves, rules))
        found = inserted(found, path, {"count": jnp.ones((), jnp.int32), **ends})
    return found


def _ends(leaves: learned_scale.Leaves, qtype: Any) -> dict[str, jax.Array]:
    scale, zero_point = learned_scale.stored_range(leaves, qtype, jnp.float32)
    zero = 0 if zero_point is None else zero_point.astype(jnp.float32)
    low, high = numerics.code_range(qtype)
    return {"sum_of_min": (low - zero) * scale, "sum_of_max": (high - zero) * scale}


def _qtype(
    path: Path, leaves: learned_scale.Leaves, rules: Sequence[QuantizationRule]
) -> Any:
    rule = rule_of_range(rules, path)
    if rule is None or not leaves.method or rule.learned_act_method != leaves.method:
        names = ["/".join(leaf.path) for leaf in learned_scale.each(path, leaves)]
        raise ValueError(
            f"The params have {' and '.join(names)}, which is not what the "
            "act_calibration_method of a rule for that op trains. Pass the rules that "
            "the params were trained with."
        )
    return rule.act_qtype
