"""Which observer to use: the errors of several, from one pass over the data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qwix_train.calib.comparison_report import Comparison, Method, Record
from qwix_train.calib.observe import Observed, RangeTagging
from qwix_train.calib.quantization_error import ErrorObserver, decibels, measure
from qwix_train.core.how import HowToQuantize
from qwix_train.files.progress import tracked
from qwix_train.frontends.compiled import Compiled
from qwix_train.observers.averaging import Averaging
from qwix_train.observers.named import parse_observer
from qwix_train.observers.statistics import (
    Observer,
    RangeObserver,
    Statistics,
    make_statistics,
)
from qwix_train.planning.plan import OpPlan, Plan
from qwix_train.planning.planner import make_plan
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.trace.function import TracedCall

OBSERVERS = (
    "absmax",
    "minmax",
    "percentile,99.9",
    "percentile,99.99",
    "mse",
    "entropy",
)
"""What is compared if nothing else is asked for."""


def compare(
    eval_step: Callable[..., Any],
    rules: Sequence[QuantizationRule],
    batches: Iterable[Any],
    observers: Sequence[str | Observer] = OBSERVERS,
    *,
    averaging: str | Averaging = "mean",
) -> Comparison:
    """Measures how much each observer's static ranges would hurt each activation.

    The float model runs once over the batches, and nothing in it is quantized. The
    report shows the error of quantizing each operand alone,

        SQNR = 10 * log10(sum(x**2) / sum((quantized(x) - x)**2))  dB

    over all elements of all batches, for each layer under `scan` separately. Besides
    the observers there is ``dynamic``: the range that the rule finds in each batch, or
    each token, without static ranges. Batches that are empty or not finite are skipped
    and counted. With a rule that sets `act_finite_only`, only the elements that are not
    finite are left out.

    Memory does not grow with the data: some 650 KiB for each operand and layer. The
    numbers follow from histograms, to within 0.1 dB up to 70 dB; see
    `quantization_error`. Arithmetic is that of float32, so the rounding of scales to
    bfloat16 is not part of the error.

    Args:
        eval_step: A step that calls a Linen or NNX model, jitted or not. It is
            compiled, once for each shape of batch.
        rules: The rules. Each activation for which one of them sets an `act_qtype` is
            measured, whether the rule asks for static ranges or not. The observers and
            averaging of the rules do not matter.
        batches: The arguments of each call of the step: a tuple, or a single argument
            that is not a tuple. ``((params, batch) for batch in loader)``, or just
            ``loader`` with ``functools.partial(eval_step, params)``.
        observers: The observers, by name or as objects. One that does not work with a
            type or a granularity is left out there, and the report says why.
        averaging: How the ranges of batches combine, for the observers that find one in
            each batch.

    Returns:
        The comparison. Print it.

    Raises:
        ValueError: There is no batch, or no activation to measure; no batch of an
            activation counts; or a name is unknown.

    >>> import jax
    >>> from flax import linen as nn
    >>> from qwix_train import QuantizationRule
    >>> from qwix_train.calib import compare
    >>> model = nn.Dense(2)
    >>> x = jax.random.t(jax.random.key(0), 4, (3, 64, 16))
    >>> params = model.init(jax.random.key(1), x[0])
    >>> rules = [QuantizationRule(weight_qtype='int8', act_qtype='int4')]
    >>> comparison = compare(
    ...     lambda params, x: model.apply(params, x),
    ...     rules,
    ...     ((params, batch) for batch in x),
    ...     observers=['absmax', 'mse'],
    ... )
    >>> comparison.best()
    {'dot_general0_lhs': 'mse'}
    """
    methods = _methods(observers, averaging)
    provider = _Measuring(rules, methods)
    observed = Observed(eval_step, provider)
    run = Compiled(observed)
    state: Any = {}
    for batch in tracked("comparing observers", batches):
        args = batch if isinstance(batch, tuple) else (batch,)
        state = state or observed.init(*args)
        state, _ = run(state, *args)
    if not state:
        raise ValueError("There is no batch to compare observers on.")
    records = [
        record
        for name, operand in provider.operands.items()
        for record in _records(name, operand, state[name])
    ]
    templates = {name: operand.rule for name, operand in provider.operands.items()}
    return Comparison(records, methods, templates, provider.given)


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An activation that is measured: how, and with which rule."""

    how: HowToQuantize
    rule: QuantizationRule
    methods: tuple[tuple[str, Statistics], ...]
    notes: dict[str, str]


class _Measuring(RangeTagging):
    """Tags the activations that a rule quantizes, to collect what gives their errors.

    Attributes:
      given: the rules as they were given; `rules` have static ranges.
      operands: what is measured, by the name of its range.
    """

    def __init__(
        self, rules: Sequence[QuantizationRule], methods: Mapping[str, Method]
    ):
        self.given = check_rules(rules)
        if all(rule.act_qtype is None for rule in self.given):
            raise ValueError(
                "No rule sets an act_qtype, so there is no activation to measure."
            )
        super().__init__([_static(rule) for rule in self.given])
        self.operands: dict[str, _Operand] = {}
        self._methods = methods

    def transform(self, traced: TracedCall, plan: Plan) -> Any:
        """The result of a traced call, with its activations tagged."""
        result = super().transform(traced, plan)
        dynamic = make_plan(traced, [_dynamic(rule) for rule in self.given])
        for op, in_batch in zip(plan.ops, dynamic.ops, strict=True):
            for side, how in enumerate(op.activations):
                if how is not None:
                    self._measure(op, side, how, in_batch.activations[side])
        return result

    def _measure(
        self, op: OpPlan, side: int, how: HowToQuantize, dynamic: HowToQuantize | None
    ) -> None:
        """Collects what gives the errors of a tagged activation."""
        assert op.rule_index is not None and dynamic is not None
        name = "/".join(op.range_path(side))
        found, rule = self.ranges[name], self.given[op.rule_index]
        methods: dict[str, Statistics] = {}
        notes: dict[str, str] = {}
        for label, (observer, averaging) in self._methods.items():
            axes = rule.act_batch_axes if isinstance(observer, RangeObserver) else None
            try:
                statistics = make_statistics(
                    observer,
                    averaging,
                    how=how,
                    batch_axes=axes,
                    finite_only=rule.act_finite_only,
                )
                jax.eval_shape(lambda s=statistics: s.init(found.shape, found.dtype))
            except ValueError as error:
                notes[label] = str(error)
                continue
            methods[label] = statistics
        collected = ErrorObserver(tuple(methods.items()), dynamic)
        self.ranges[name] = dataclasses.replace(
            found,
            statistics=make_statistics(
                collected, how=how, finite_only=rule.act_finite_only
            ),
        )
        only_this = dataclasses.replace(
            rule, module_path=re.escape(op.op.module_path), op_names=(op.op.id,)
        )
        self.operands[name] = _Operand(how, only_this, collected.methods, notes)


def _methods(
    observers: Sequence[str | Observer], averaging: str | Averaging
) -> dict[str, Method]:
    """The methods that are compared, by name; an unknown name is an error."""
    if isinstance(observers, str):
        raise ValueError(f"The observers are a sequence: write [{observers!r}].")
    if not observers:
        raise ValueError("There is no observer to compare.")
    methods: dict[str, Method] = {}
    for given in observers:
        observer = parse_observer(given) if isinstance(given, str) else given
        streams = not isinstance(observer, RangeObserver)
        methods[str(given)] = Method(observer, "mean" if streams else averaging)
    return methods


def _static(rule: QuantizationRule) -> QuantizationRule:
    if rule.act_qtype is None:
        return rule
    return dataclasses.replace(
        rule, act_static_scale=True, act_observer=None, act_averaging="mean"
    )


def _dynamic(rule: QuantizationRule) -> QuantizationRule:
    return dataclasses.replace(
        rule,
        act_static_scale=False,
        act_observer=None,
        act_averaging="mean",
        act_batch_axes=None,
        act_channelwise_axes=(),
    )


def _records(name: str, operand: _Operand, state: Mapping[str, Any]) -> list[Record]:
    """What was measured of an activation, in each of its layers."""
    records = []
    for layer in np.ndindex(np.shape(state["count"])):
        where = name + "".join(f"[{index}]" for index in layer)
        part = {key: value[layer] for key, value in state.items()}
        if not part["count"]:
            raise ValueError(
                f"No batch of {where!r} counts: its op was not reached, or every batch "
                "was empty or not finite."
            )
        elements, energy, measured = jax.device_get(
            measure(part, operand.methods, operand.how)
        )
        for method in (*operand.methods, ("dynamic", None)):
            found = measured[method[0]]
            records.append(
                {
                    "op": where,
                    "range": name,
                    "method": method[0],
                    "sqnr_db": decibels(float(energy), float(found.error)),
                    "saturated": float(found.outside / elements),
                    **{end: _plain(value) for end, value in found.range.items()},
                    "qtype": str(operand.how.qtype),
                    "elements": int(elements),
                    "batches": int(part["count"]),
                    "skipped": int(part["skipped"]),
                    "note": "",
                }
            )
        records += [
            {"op": where, "range": name, "method": label, "note": note}
            for label, note in operand.notes.items()
        ]
    return records


def _plain(value: np.ndarray) -> Any:
    """A number, or a nested list if there are several ranges."""
    return value.item() if value.size == 1 else value.tolist()
