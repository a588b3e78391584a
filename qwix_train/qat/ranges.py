"""The ranges of activations that a state, a model or params hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from qwix_train.calib.ranges import collected_ranges
from qwix_train.core import numerics
from qwix_train.core.operands import is_concrete
from qwix_train.core.shortened import shortened
from qwix_train.frontends.nested import inserted
from qwix_train.frontends.targets import check_target, params_of
from qwix_train.planning import learned_scale, static_range
from qwix_train.planning.leaves import Path
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.planning.quant_stats import states_in
from qwix_train.planning.rules import QuantizationRule, check_rules, rule_of_range
from qwix_train.qat.state import held_states
from qwix_train.values import stored


def ranges(
    target: Any,
    rules: Sequence[QuantizationRule] | QuantizationProvider,
    quant_stats: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The ranges of activations that training has found, as `quant_stats`.

    `quantize_params`, `ptq.quantize`, `QtProvider` and `odml.convert` take them. They
    are statistics of static ranges, from any observer, and trained scales of
    activations. `quantize_params` finds trained scales among the params by itself;
    `odml.convert` does not.

    Args:
      target: a train state; an NNX model, or an `nnx.ModelAndOptimizer`; the variables
        of a Linen model; or params.
      rules: the rules, or the provider, that the leaves were attached for.
      quant_stats: other ranges, such as those of a `calib.Calibrator`. If the target
        has a range of the same name, that counts.

    Returns:
      A nested dictionary: at the path of each activation a `count`, and
      `sum_of_absmax`, or `sum_of_min` and `sum_of_max`.

    Raises:
      TypeError: if `target` holds no params, or holds shapes or traced arrays; or if
        `quant_stats` is not a nested dictionary.
      ValueError: if there is no range; or if a range has seen no batch, is not finite,
        or is not what the rule of its op asks for.

    Warns:
      UserWarning: if ranges are far below what was seen, or batches differ much.

    Example:
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, ranges
      >>> rules = [QuantizationRule(weight_qtype="int8", act_qtype="int8",
      ...     act_calibration_method="pact")]
      >>> params = {"dot_general0_lhs_alpha": jnp.full((1, 1), 6.0)}
      >>> found = ranges(params, rules)["dot_general0_lhs"]
      >>> found["sum_of_min"].item(), round(found["sum_of_max"].item(), 3)
      (0.0, 6.0)
    """
    by_default = False
    if isinstance(rules, QuantizationProvider):
        rules, by_default = rules.rules, rules.collects_by_default
    rules = check_rules(rules)
    check_target(target)
    static_range.check_quant_stats(quant_stats)
    states = held_states(target)
    named = stored.by_path(stored.unbox(params_of(target)))
    trained = list(filter(None, map(learned_scale.trained_leaf, named)))
    if not states and not trained:
        raise ValueError(
            f"There is no range of an activation in {shortened(target)}: neither "
            "statistics of static ranges nor trained scales. Make room for them with "
            "attach(state, rules, *inputs), and train."
        )
    values = [*jax.tree.leaves(states), *(named[leaf.path] for leaf in trained)]
    if not all(map(is_concrete, values)):
        raise TypeError(
            f"ranges reads values, and {shortened(target)} holds shapes, or is traced: "
            "call it outside of jit, with arrays."
        )
    found = dict(quant_stats or {})
    # If tensors have ranges that no rule names, ranges that need no observer are ready.
    ready = {p: x for p, x in states.items() if by_default and static_range.ends_in(x)}
    others = {path: state for path, state in states.items() if path not in ready}
    collected = states_in(collected_ranges(others, rules))
    for path, of_range in {**ready, **collected}.items():
        found = inserted(found, path, of_range)
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
