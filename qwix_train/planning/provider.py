"""What a mode of quantization is, and how a traced call is rewritten by one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from qwix_train import ops
from qwix_train.planning.leaves import Path
from qwix_train.planning.plan import Plan
from qwix_train.planning.planner import make_plan
from qwix_train.planning.rule_use import RuleUse
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.planning.running_ranges import RunningRanges
from qwix_train.stages.run import CallStages, run
from qwix_train.trace import session
from qwix_train.trace.function import TracedCall
from qwix_train.values import stored

# The methods by which providers of `qwix` take the place of operations, of params, and
# of what goes in and comes out of a model.
_PATCHING_METHODS = (
    *(name for kind in ops.KINDS if kind.is_product for name in kind.names),
    "dot",
    "nn_param",
    "asarray",
    "promote_dtype",
    "get_intercept_map",
    "get_interceptors",
    "process_model_inputs",
    "process_model_output",
)


class QuantizationProvider:
    """A mode of quantization, with its rules.

    A mode overrides

    * `plan`, if its rules do not say everything about the ops of a traced call,
    * `stages`: what happens to the operands of ops, and to params,
    * `store_params`: what a model holds instead of float params, or next to them,
    * `transform`, if it does something else with a call.

    Methods for single ops, such as `dot_general` of a provider of `qwix`, are refused,
    since nothing calls them. `wrap_train_step` and `wrap_eval_step` take a mode that
    trains params in float instead of rules. `calib.Calibrator`, `calib.observe` and
    `attach` take a mode that has ranges of activations.

    Attributes:
      rules: the rules.
      allow_unmatched: whether a model that no rule matches is left in float.
      stores_params: whether models hold quantized params (see `store_params`).
      adds_params: whether models hold params next to those of the float model (see
        `store_params`).
      takes_static_ranges: whether ranges may be collected beforehand.
      collects_by_default: whether activations have static ranges unless a rule says
        `act_static_scale=False`.
      keeps_quant_stats: whether statistics of ranges are kept while training: by Linen
        models in a collection `quant_stats`, by NNX models in variables, by a wrapped
        step in its state. The mode for each call is `with_ranges(running)` then.
      collect: what keeps statistics other than ranges: gives the result of a call, and
        the statistics after it, from the traced call, its plan, the statistics before
        it, and whether they change. None for ranges.
      follows_schedules: whether there is nothing to it but its rules, so that others
        may take their place in a phase of a schedule.
      strict: whether it is an error that a rule asks for what cannot be done.
      random_stream: the stream of random keys that a call draws from, such as
        `"dropout"`; an NNX model is given one of its own. Empty if it draws none.
      rewrite_key: says, for JAX's caches, what the mode does to a call (see
        `session.Session`). Modes that do the same to every call may have equal keys.
        None if no other does the same for sure.
      changes: what is changed in the stages that the mode chooses (see `changed`).
      told: what a user was told already.
    """

    stores_params = False
    adds_params = False
    takes_static_ranges = False
    keeps_quant_stats = False
    collects_by_default = False
    collect: Callable[[TracedCall, Plan, Any, bool], tuple[Any, Any]] | None = None
    follows_schedules = False
    strict = False
    random_stream = ""
    rewrite_key: Hashable | None = None
    changes: tuple[Callable[[CallStages, Plan], CallStages], ...] = ()

    def __init__(
        self, rules: Sequence[QuantizationRule], *, allow_unmatched: bool = False
    ):
        """Checks the rules, and the class.

        Args:
          rules: the rules, in order of precedence: the first that matches an op
            decides.
          allow_unmatched: whether a model that no rule matches is left in float.
            An error otherwise.

        Raises:
          TypeError: if the class replaces operations as subclasses in `qwix` do.
        """
        # Not where the class is made: a package may have one that nobody uses.
        ignored = [name for name in _PATCHING_METHODS if hasattr(self, name)]
        if ignored:
            raise TypeError(
                f"{type(self).__name__}.{ignored[0]} would never be called: operations "
                "are not patched while a model runs, they are found in its trace. "
                "Override plan(traced), which says how each operation is quantized, or "
                "stages(traced, plan), which says what happens to its operands and "
                "how it is computed; transform(traced, plan) gives the result of the "
                "whole call."
            )
        self.rules: tuple[QuantizationRule, ...] = check_rules(rules)
        if not self.collects_by_default:
            for rule in self.rules:
                rule.check_collects()
        self.allow_unmatched = allow_unmatched
        self.told: Told = Told()

    def plan(self, traced: TracedCall) -> Plan:
        """What this mode does to every op of a traced call.

        Args:
          traced: the traced call.

        Raises:
          ValueError: if a rule asks for what does not fit an op.
        """
        return make_plan(traced, self.rules)

    def stages(self, traced: TracedCall, plan: Plan) -> CallStages:
        """What happens to each operand and param of a traced call.

        Args:
          traced: the traced call.
          plan: what `plan` says of it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} says in neither stages(traced, plan) nor "
            "transform(traced, plan) what becomes of a call."
        )

    def transform(self, traced: TracedCall, plan: Plan) -> Any:
        """The result of a traced call, quantized as planned.

        Args:
          traced: the traced call.
          plan: what `plan` says of it.
        """
        stages = self.stages(traced, plan)
        for change in self.changes:
            stages = change(stages, plan)
        return run(traced, stages)

    def annotate(self, traced: TracedCall, plan: Plan) -> Plan:
        """The plan with what only this mode can say of the call."""
        return plan

    def store_params(self, traced: TracedCall, plan: Plan) -> dict[Path, Any]:
        """What stands in the place of float params, and next to them, by path.

        Args:
          traced: a call of the model with float params, or their shapes.
          plan: what the rules do to it.

        Returns:
          The values; `leaves.LEFT_OUT` for a param that the model loses.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps params in float.")

    def tagging(self) -> Any:
        """What collects the ranges of activations: a `calib.observe.Tagging`.

        Raises:
          TypeError: if this mode collects none.
          ValueError: if the rules ask for none.
        """
        raise TypeError(
            f"{type(self).__name__} collects no ranges of activations. Collect them "
            "with rules, or with a provider such as QtProvider(rules)."
        )

    def with_ranges(
        self, ranges: Mapping[str, Any] | RunningRanges
    ) -> QuantizationProvider:
        """This mode with ranges of activations from elsewhere.

        Args:
          ranges: ranges that stay as they are, such as those of a `calib.Calibrator`;
            or those of one call, which it may update.

        Raises:
          TypeError: if this mode takes none.
        """
        raise TypeError(
            f"{type(self).__name__} takes no quant_stats. Leave them out, or give "
            "rules, or a provider such as QtProvider(rules)."
        )

    def within(self, rewrite: session.Rewrite) -> session.Rewrite:
        """What another mode does to a call of a model of this one.

        Args:
          rewrite: what the other mode does to a call of a model that is not quantized.

        Raises:
          ValueError: if the rules of this one would be dropped.
        """
        if self.stores_params:  # which the other mode finds, and names
            return rewrite
        raise ValueError(
            "The model that the step calls is quantized already, by quantize_model "
            f"with a {type(self).__name__}, whose rules would be dropped. Call the "
            "float model in the step that is wrapped, or do not wrap it."
        )


class Told:
    """What a user was told already, so that it is said once."""

    def __init__(self):
        self._said: set[Any] = set()

    def first_time(self, what: Hashable) -> bool:
        """Whether this is the first time that a user is told of something.

        Args:
          what: identifies it.
        """
        first = what not in self._said
        self._said.add(what)
        return first

    def warn(self, message: str) -> None:
        """Warns of something, once."""
        if self.first_time(message):
            warnings.warn(message, stacklevel=4)


def changed(
    mode: QuantizationProvider, change: Callable[[CallStages, Plan], CallStages]
) -> QuantizationProvider:
    """A mode, with a change to the stages that it chooses.

    Args:
      mode: the mode.
      change: gives the stages in the place of others, and of a plan.
    """
    mode = copy.copy(mode)
    mode.changes = (*mode.changes, change)
    return mode


def rewrite(
    mode: QuantizationProvider, traced: TracedCall, plan: Plan | None = None
) -> Any:
    """The result of a traced call; `session.UNCHANGED` if no rule matches.

    Args:
      mode: the mode.
      traced: the traced call.
      plan: what the mode plans for it; made here if None.

    Raises:
      ValueError: if no rule matches, unless `allow_unmatched`; if params are
        quantized already, and the mode keeps them in float.
    """
    quantized = [
        "/".join(param.path)
        for param in traced.params
        if param is not None and stored.is_quantized(param.value)
    ]
    if quantized and not mode.stores_params and traced.own_stages is None:
        raise ValueError(
            f"{type(mode).__name__} takes float params, and {len(quantized)} are "
            f"quantized, among them {quantized[0]!r}. Run them with a PtqProvider, or "
            "give the float params that they were made from."
        )
    plan = mode.plan(traced) if plan is None else plan
    check(mode, plan)
    # A model with quantized params cannot run as it is, whatever the rules say.
    if not plan.has_effect and not (quantized and mode.stores_params):
        _check_may_be_unmatched(mode, plan)
        return session.UNCHANGED
    return mode.transform(traced, plan)


def checked_plan(mode: QuantizationProvider, traced: TracedCall) -> Plan:
    """What a mode does to a call, checked.

    Args:
      mode: the mode.
      traced: the call.

    Raises:
      ValueError: as `check`; if no rule matches, unless the mode allows that.
    """
    plan = mode.plan(traced)
    check(mode, plan)
    _check_may_be_unmatched(mode, plan)
    return plan


def check(mode: QuantizationProvider, plan: Plan) -> None:
    """Warns, once, of what the rules ask for and cannot be done.

    And of rules that match no op of a model, where others match some.

    Args:
      mode: the mode.
      plan: what it does to a call, which may be only a part of the model's.

    Raises:
      ValueError: if a rule asks for what the mode does not do; if it is strict, and
        there is something to warn of.
    """
    for op in plan.quantized_ops:
        if op.static and not mode.takes_static_ranges:
            raise ValueError(
                f"{op.op.where}: act_static_scale=True needs ranges that were "
                "collected. Collect them with calib.Calibrator, and give them to "
                f"{type(mode).__name__} as quant_stats."
            )
    for message in plan.complaints():
        if mode.strict:
            raise ValueError(message)
        mode.told.warn(message)
    if plan.whole and not mode.allow_unmatched and plan.has_effect:
        warn_of_unmatched(mode, plan)


def warn_of_unmatched(mode: QuantizationProvider, use: RuleUse) -> None:
    """Warns, once, of each rule that matches no op.

    Args:
      mode: the mode that the rules are of.
      use: what the rules decided for, in all that they are for.
    """
    for said in use.unmatched_rules().values():
        mode.told.warn(f"{said[0].upper()}{said[1:]}.")


def _check_may_be_unmatched(mode: QuantizationProvider, plan: Plan) -> None:
    if not plan.has_effect and not mode.allow_unmatched:
        raise ValueError(plan.no_match_message())
