"""What a mode of quantization is: its rules, and what becomes of a traced call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from flax import nnx

from qwix_train import ops
from qwix_train.planning.plan import Path, Plan, RuleUse, make_plan
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.stages.run import CallStages, run
from qwix_train.trace import function, session
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

    Subclasses say in `stages` what happens to the operands and params of a traced call,
    and in `plan`, where rules do not say it all, what is to become of its ops. One that
    does something else to a call overrides `transform`. Methods for single ops, such
    as `dot_general` of a provider of `qwix`, are refused, since nothing calls them. A
    mode that trains params in float may be given to `wrap_train_step` and
    `wrap_eval_step` in the place of rules; one whose ranges are collected, to
    `calib.Calibrator`, `calib.observe` and `attach`, too (see `tagging`,
    `with_ranges` and `running`).

    Attributes:
      stores_params: whether models hold quantized params (see `store_params`).
      adds_params: whether models hold params next to those of the float model (see
        `store_params`).
      takes_static_ranges: whether ranges may be collected beforehand.
      collects_by_default: whether activations have static ranges unless a rule says
        `act_static_scale=False`.
      keeps_quant_stats: whether statistics of ranges are kept while training: by Linen
        models in a collection `quant_stats` (see `run_with_quant_stats`), by NNX models
        in variables (see `put_quant_stats`), by a wrapped step in its state (see
        `running`).
      changes: what is changed in the stages that the mode chooses (see `changed`).
    """

    stores_params = False
    adds_params = False
    takes_static_ranges = False
    keeps_quant_stats = False
    collects_by_default = False
    changes: tuple[Callable[[CallStages, Plan], CallStages], ...] = ()

    def __init_subclass__(cls, **kwargs: Any):
        """Refuses methods that nothing would call.

        Raises:
          TypeError: if a subclass replaces operations as subclasses in `qwix` do.
        """
        super().__init_subclass__(**kwargs)
        ignored = [name for name in _PATCHING_METHODS if hasattr(cls, name)]
        if ignored:
            raise TypeError(
                f"{cls.__name__}.{ignored[0]} would never be called: operations are "
                "not patched while a model runs, they are found in its trace. Override "
                "plan(traced), which says how each operation is quantized, or "
                "stages(traced, plan), which says what happens to its operands and "
                "how it is computed; transform(traced, plan) gives the result of the "
                "whole call."
            )

    def __init__(
        self, rules: Sequence[QuantizationRule], *, allow_unmatched: bool = False
    ):
        """Checks the rules.

        Args:
          rules: the rules, in order of precedence: the first that matches an op
            decides.
          allow_unmatched: whether a model that no rule matches is left in float.
            An error otherwise.
        """
        self.rules = check_rules(rules)
        if not self.collects_by_default:
            for rule in self.rules:
                rule.check_collects()
        self.allow_unmatched = allow_unmatched
        self._warned: set[Any] = set()

    def stages(self, traced: function.TracedCall, plan: Plan) -> CallStages:
        """What happens to each operand and param of a traced call.

        Args:
          traced: the traced call.
          plan: what `plan` says of it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} says in neither stages(traced, plan) nor "
            "transform(traced, plan) what becomes of a call."
        )

    def transform(self, traced: function.TracedCall, plan: Plan) -> Any:
        """The result of a traced call, quantized as planned.

        Args:
          traced: the traced call.
          plan: what `plan` says of it.
        """
        stages = self.stages(traced, plan)
        for change in self.changes:
            stages = change(stages, plan)
        return run(traced, stages)

    def changed(
        self, change: Callable[[CallStages, Plan], CallStages]
    ) -> QuantizationProvider:
        """This mode, with a change to the stages that it chooses.

        Args:
          change: gives the stages in the place of others, and of a plan.
        """
        mode = copy.copy(self)
        mode.changes = (*self.changes, change)
        return mode

    def plan(self, traced: function.TracedCall) -> Plan:
        """What this mode does to every op of a traced call.

        Args:
          traced: the traced call.

        Raises:
          ValueError: if a rule asks for what does not fit an op.
        """
        return make_plan(traced, self.rules)

    def rewrite(self, traced: function.TracedCall, plan: Plan | None = None) -> Any:
        """The result of a traced call; `session.UNCHANGED` if no rule matches.

        Args:
          traced: the traced call.
          plan: what `plan` says of it; made here if None.

        Raises:
          ValueError: if no rule matches, unless `allow_unmatched`; if params are
            quantized already, and this mode keeps them in float.
        """
        if not self.stores_params and traced.own_stages is None:
            _check_float(traced, type(self).__name__)
        plan = self.plan(traced) if plan is None else plan
        self.check(plan)
        if not self.matches(plan):
            if not self.allow_unmatched:
                raise ValueError(self.no_match_message(plan))
            return session.UNCHANGED
        return self.transform(traced, plan)

    def store_params(self, traced: function.TracedCall, plan: Plan) -> dict[Path, Any]:
        """What stands in the place of float params, and next to them, by path.

        Args:
          traced: a call of the model with float params, or their shapes.
          plan: what the rules do to it.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps params in float.")

    def used_up(self, traced: function.TracedCall, plan: Plan) -> set[Path]:
        """The paths of params that a model no longer has after `store_params`.

        Args:
          traced: the call that `store_params` was given.
          plan: what the rules do to it.
        """
        del traced, plan
        return set()

    def matches(self, plan: Plan) -> bool:
        """Whether the rules do anything to a model."""
        return bool(plan.quantized_ops or plan.has_answers)

    def no_match_message(self, plan: Plan) -> str:
        """Says that the rules do nothing to a model."""
        return plan.no_match_message()

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

    def prepare_nnx(self, model: nnx.Module, rngs: nnx.Rngs | None) -> None:
        """Adds to an NNX model, in place, what this mode keeps in it next to params.

        Args:
          model: the model.
          rngs: where random keys come from; None if none were given.
        """

    def of_nnx(self, model: nnx.Module) -> QuantizationProvider:
        """The provider for one call of an NNX model."""
        del model
        return self

    def variable(self, path: Path, value: Any) -> Any:
        """The NNX variable for a param that the float model does not have."""
        del path
        if stored.is_quantized(value):
            return stored.box(value, nnx.Param(None))
        return nnx.Param(value)

    def initialize(
        self, traced: function.TracedCall, plan: Plan
    ) -> tuple[dict[Path, Any], Any]:
        """What `store_params` gives, and the result of a call with these params."""
        params = self.store_params(traced, plan)
        return params, self.transform(traced.with_params(params), plan)

    def initial_quant_stats(self, plan: Plan) -> dict[str, Any]:
        """The statistics that a model holds at first, as a nested dictionary."""
        raise NotImplementedError(f"{type(self).__name__} keeps no statistics.")

    def run_with_quant_stats(
        self,
        traced: function.TracedCall,
        plan: Plan,
        quant_stats: Any,
        update: bool,
    ) -> tuple[Any, Any]:
        """The result of a traced call, and the statistics after it.

        Args:
          traced: the call.
          plan: what the rules do to it.
          quant_stats: the statistics that the model holds.
          update: whether they may change.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no statistics.")

    def quant_stats_of(self, model: nnx.Module) -> tuple[dict[str, Any], bool]:
        """The statistics that an NNX model holds, and whether its calls change them."""
        raise NotImplementedError(f"{type(self).__name__} keeps no statistics.")

    def put_quant_stats(self, model: nnx.Module, quant_stats: Any) -> None:
        """Gives an NNX model statistics, in place.

        Args:
          model: the model.
          quant_stats: the statistics, as a nested dictionary.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no statistics.")

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

    def with_ranges(self, quant_stats: Mapping[str, Any]) -> QuantizationProvider:
        """This mode with ranges of activations that stay as they are.

        Args:
          quant_stats: the ranges, such as those of a `calib.Calibrator`.

        Raises:
          TypeError: if this mode takes none.
        """
        raise TypeError(
            f"{type(self).__name__} takes no quant_stats. Leave them out, or give "
            "rules, or a provider such as QtProvider(rules)."
        )

    def with_rules(self, rules: Sequence[QuantizationRule]) -> QuantizationProvider:
        """This mode with other rules, for a phase of a schedule.

        Args:
          rules: the rules.

        Raises:
          TypeError: if there is more to this mode than its rules.
        """
        raise TypeError(
            f"{type(self).__name__} follows no schedule but a start_step that is the "
            "same for weights and activations of all rules. Give that, or rules, or a "
            "QtProvider(rules)."
        )

    def running(self, ranges: Any) -> QuantizationProvider:
        """This mode for one call of a step, with ranges that the step keeps.

        Args:
          ranges: the `qat.running_ranges.RunningRanges` of the call.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no statistics.")

    def annotate(self, traced: function.TracedCall, plan: Plan) -> Plan:
        """The plan with what only this mode can say of the call."""
        return plan

    @property
    def rewrite_key(self) -> Hashable | None:
        """Says, for JAX's caches, what `rewrite` does to a call; see `session.Session`.

        Modes that do the same to every call may have equal keys. None if no other does
        the same for sure.
        """
        return None

    def first_time(self, what: Any) -> bool:
        """Whether this is the first time that a user is told of something.

        Args:
          what: identifies it: any hashable object.
        """
        first = what not in self._warned
        self._warned.add(what)
        return first

    def check(self, plan: Plan) -> None:
        """Warns, once, of ops that a rule matches and that cannot be quantized.

        And of rules that match no op of a model, where others match some.

        Raises:
          ValueError: if a rule asks for what this mode does not do.
        """
        for op in plan.quantized_ops:
            if op.static and not self.takes_static_ranges:
                raise ValueError(
                    f"{op.op.module_path}/{op.op.id}: act_static_scale=True needs "
                    "ranges that were collected. Collect them with calib.Calibrator, "
                    f"and give them to {type(self).__name__} as quant_stats."
                )
        for op in plan.unsupported:
            where = "/".join(filter(None, (op.op.module_path, op.op.id)))
            self._warn(
                f"{where} matches rule {op.rule_index} but stays in float: it is "
                f"{op.reason}."
            )
        self.check_rules_match(plan)

    def check_rules_match(self, plan: Plan) -> None:
        """Warns, once, of rules that match no op of a model, where others match some.

        Args:
          plan: what the rules do to a call, which may be only a part of the model's.
        """
        if plan.whole and not self.allow_unmatched and self.matches(plan):
            self.warn_of_unmatched(plan)

    def warn_of_unmatched(self, use: RuleUse) -> None:
        """Warns, once, of each rule that matches no op.

        Args:
          use: what the rules decided for, in all that they are for.
        """
        for said in use.unmatched_rules().values():
            self._warn(f"A rule matches nothing: {said}.")

    def _warn(self, message: str) -> None:
        if self.first_time(message):
            warnings.warn(message, stacklevel=4)


def _check_float(traced: function.TracedCall, provider: str) -> None:
    names = [
        "/".join(param.path)
        for param in traced.params
        if param is not None and stored.is_quantized(param.value)
    ]
    if names:
        raise ValueError(
            f"{provider} takes float params, and {len(names)} are quantized, among "
            f"them {names[0]!r}. Run them with a PtqProvider, or give the float params "
            "that they were made from."
        )
