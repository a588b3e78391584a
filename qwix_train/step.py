"""A user's train or eval step in, the same step quantized out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train import batch_stats, scheduled_step
from qwix_train.frontends.compiled import Compiled
from qwix_train.frontends.nnx import tracing_step
from qwix_train.frontends.wrapping import check_step, mark_wrapped, wrap
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.planning.running_ranges import RangeUpdates, RunningRanges
from qwix_train.planning.schedule import Schedule
from qwix_train.qat import QtProvider
from qwix_train.qat import state as state_lib
from qwix_train.qat.phases import phases_of
from qwix_train.trace import harvest

Step = TypeVar("Step", bound=Callable[..., Any])


def wrap_train_step(
    step: Step,
    rules: Sequence[QuantizationRule] | QuantizationProvider,
    *,
    schedule: Schedule | None = None,
    schedule_step: Callable[..., Any] | None = None,
    quant_stats: Mapping[str, Any] | None = None,
    update_quant_stats: bool | Callable[..., Any] = True,
    allow_unmatched: bool = False,
) -> Step:
    """Makes a train step quantization-aware.

    The step is called as it is; the model calls in it are rewritten, inside of its
    own `value_and_grad`. It may be one that

    * takes a `flax.training.train_state.TrainState`, and calls its `apply_fn`,
    * closes over a Linen module, and calls `model.apply`, or
    * takes NNX modules, as in `step(model, optimizer, batch)`, closes over them, or
      names them as globals of its module,

    with any other arguments. All of these calls are quantized, those of a teacher, too,
    unless it is called as `in_float(model)`. What comes back has the same signature;
    jit it as you would the step:
    `jax.jit(wrap_train_step(step, rules), donate_argnums=0)`. Called eagerly it traces
    the model at every call, which takes milliseconds.

    **Static ranges.** Rules with `act_static_scale=True` quantize activations with
    ranges that are kept in the state (see `attach`). Each step measures its activations
    and updates the ranges, in the order in which the model runs: under gradient
    accumulation and `scan` once per micro-batch, under `remat` once. The range that the
    forward uses includes its own batch.

    **Schedules.** Quantization may begin at a later step, come in gradually, or change
    its types. Each phase is bit for bit the step of that phase alone: the float step,
    or the step wrapped with the rules of the phase. (Convolutions in bfloat16 on a CPU
    are an exception: XLA rounds them in another way in a branch.) All phases are in one
    program. It takes as long to compile as all of them, and runs one. Static ranges are
    not measured in a phase that is in float.

    Wrap the step that updates the params once, not a loop over such steps: one call is
    in one phase. If `vmap` goes over states with a step count each, every phase is
    computed. To avoid that, give `schedule_step` a count that is the same for all.

    Args:
      step: the train step.
      rules: the rules, in order of precedence: the first that matches an op decides.
        Or a provider that keeps params in float; rules stand for `QtProvider(rules)`.
      schedule: the `Schedule` of the rules that have none of their own, and of the
        statistics in the state. Providers other than `QtProvider` take only a start
        step.
      schedule_step: the number of steps so far, as a function of the step's arguments
        that returns an int scalar. If None, it is the `step` of the train state or
        `nnx.Optimizer` among the arguments.
      quant_stats: ranges of activations that stay as they are, in the place of those
        in the state. See `QtProvider`.
      update_quant_stats: whether the step updates the ranges in the state: False to
        leave them as they are, or a function of the step's arguments that returns a
        bool scalar.
      allow_unmatched: whether a step in which no rule matches any op is left in
        float. An error otherwise, unless a provider says `allow_unmatched`.

    Returns:
      The step, quantization-aware. The state that it takes and returns is that of
      the float step: params stay in float, checkpoints are the same. With ranges in the
      state, its statistics are updated.

    Raises:
      TypeError: if a provider stores params quantized, such as a `PtqProvider` or a
        `LoraProvider`; if a rule is a `LoraRule`; if the provider takes no
        `quant_stats`, and there are some; if it cannot follow the schedule; if
        `schedule` is not a `Schedule`, or `schedule_step` not a function; by the step
        when called, if that does not return an int scalar.
      ValueError: if a schedule does not fit a rule; by the step when called, if no
        model call was reached, or no rule matches any op; if a rule asks for static
        ranges, and there are neither `quant_stats` nor statistics in the state; if a
        step count is needed, and there is none.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, Schedule, wrap_train_step
      >>> model = nn.Dense(1)
      >>> params = model.init(jax.random.key(0), jnp.ones((2, 8)))
      >>> def train_step(params, x, y):
      ...     loss = lambda params: jnp.mean((model.apply(params, x) - y) ** 2)
      ...     grads = jax.grad(loss)(params)
      ...     return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
      >>> rules = [QuantizationRule(weight_qtype="int4")]
      >>> step = jax.jit(wrap_train_step(train_step, rules))
      >>> params = step(params, jnp.ones((2, 8)), jnp.zeros((2, 1)))

      In float for 100 steps, then more and more quantized for another 50:

      >>> def counted_step(params, x, y, count):
      ...     return train_step(params, x, y)
      >>> step = jax.jit(
      ...     wrap_train_step(
      ...         counted_step,
      ...         rules,
      ...         schedule=Schedule(start_step=100, ramp_steps=50),
      ...         schedule_step=lambda params, x, y, count: count,
      ...     )
      ... )
      >>> for count in (0, 120, 150):  # compiles once
      ...     params = step(params, jnp.ones((2, 8)), jnp.zeros((2, 1)), count)
    """
    provider = _provider_of(rules, quant_stats, allow_unmatched)
    check_step(step)
    if schedule_step is not None and not callable(schedule_step):
        raise TypeError(
            f"schedule_step={schedule_step!r} is no function: give one of the step's "
            "arguments, such as lambda state, batch: state.step."
        )
    phases = phases_of(provider.rules, schedule)
    time = schedule or Schedule()

    def count_of(args, kwargs):
        if schedule_step is not None:
            return _checked_count(schedule_step(*args, **kwargs))
        return state_lib.step_count((args, kwargs))

    def updates_of(args, kwargs):
        update = update_quant_stats
        if callable(update):
            update = update(*args, **kwargs)
        if time.quant_stats_freeze_step is not None:
            steps = count_of(args, kwargs)
            update = jnp.logical_and(update, steps < time.quant_stats_freeze_step)
        return RangeUpdates(update, time.quant_stats_warmup)

    def quantized(provider):
        if provider.keeps_quant_stats:
            return _with_ranges(step, provider, updates_of)
        return wrap(step, provider)

    if len(phases) == 1:
        run = quantized(provider)
    else:
        run = scheduled_step.follow(step, provider, phases, quantized, count_of)
    if time.batch_stats_freeze_step is not None:

        def frozen(args, kwargs):
            return count_of(args, kwargs) >= time.batch_stats_freeze_step

        run = batch_stats.freezing(run, frozen)
    if len(phases) == 1 and time.batch_stats_freeze_step is None:
        return cast(Step, _like(step, run) if provider.keeps_quant_stats else run)
    return cast(Step, _like(step, run))


def wrap_eval_step(
    step: Step,
    rules: Sequence[QuantizationRule] | QuantizationProvider,
    *,
    schedule: Schedule | None = None,
    quant_stats: Mapping[str, Any] | None = None,
    allow_unmatched: bool = False,
) -> Step:
    """Makes an eval step compute what the quantized model will.

    The forward is that of `wrap_train_step`. With params from float training, this
    measures post-training quantization. Static ranges in the state are used, and do not
    change. The start of a schedule does not count: you always evaluate the model that
    training ends with.

    Args:
      step: the eval step.
      rules: the rules, or a provider, as for the train step.
      schedule: that of the train step. Only its `quant_stats_warmup` counts.
      quant_stats: the ranges of activations, for rules with `act_static_scale=True`,
        in the place of those in the state.
      allow_unmatched: whether a step in which no rule matches any op is left in
        float. An error otherwise, unless a provider says `allow_unmatched`.

    Raises:
      TypeError: as `wrap_train_step`.
      ValueError: by the step when called, as that of `wrap_train_step`.
    """
    provider = _provider_of(rules, quant_stats, allow_unmatched)
    phases_of(provider.rules, schedule)  # complains of one that does not fit the rules
    if not provider.keeps_quant_stats:
        return cast(Step, wrap(step, provider))
    updates = RangeUpdates(False, (schedule or Schedule()).quant_stats_warmup)
    run = _with_ranges(step, provider, lambda args, kwargs: updates)
    return cast(Step, _like(step, run))


def _provider_of(
    rules: Sequence[QuantizationRule] | QuantizationProvider,
    quant_stats: Mapping[str, Any] | None,
    allow_unmatched: bool,
) -> QuantizationProvider:
    """The mode that a step is wrapped with.

    Raises:
      TypeError: if it keeps params in another form than the step does.
    """
    if not isinstance(rules, QuantizationProvider):
        rules = check_rules(rules)
        if any(rule.adds_adapters for rule in rules):
            raise TypeError(
                "A wrapped step adds no adapters, and a LoraRule asks for some. Put "
                "them into the state, attach(state, rules, *inputs, rng=key), and call "
                "the step as it is, or wrap it with QuantizationRules alone."
            )
        return QtProvider(
            rules, quant_stats=quant_stats, allow_unmatched=allow_unmatched
        )
    provider = rules
    if provider.stores_params:
        name = type(provider).__name__
        raise TypeError(
            f"{name} changes the params of a model, and a wrapped step trains those "
            "that its state has, in float. Give rules, or a provider such as "
            f"QtProvider(rules). {name} is for quantize_model(model, provider)."
        )
    if quant_stats is not None:
        provider = provider.with_ranges(quant_stats)
    if allow_unmatched and not provider.allow_unmatched:
        provider = copy.copy(provider)
        provider.allow_unmatched = True
    return provider


def _checked_count(count: Any) -> Any:
    """What `schedule_step` gave.

    Raises:
      TypeError: if it is no int scalar.
    """
    array = isinstance(count, jax.Array | np.ndarray | np.generic)
    if array and count.shape == () and jnp.issubdtype(count.dtype, jnp.integer):
        return count
    if isinstance(count, int) and not isinstance(count, bool):
        return count
    got = f"{count.dtype} of shape {count.shape}" if array else repr(count)
    raise TypeError(f"schedule_step must return an int scalar, and returned {got}.")


def _with_ranges(
    step: Callable[..., Any],
    provider: QuantizationProvider,
    updates_of: Callable[[Any, Any], RangeUpdates],
) -> Callable[..., Any]:
    """A step that takes static ranges from its state, and puts them back there."""
    check_step(step)

    def states_of(args, kwargs):
        states = state_lib.states_of((args, kwargs))
        if not states:
            raise ValueError(
                "The rules ask for ranges that training keeps (act_static_scale=True, "
                "or bwd_averaging), and the step has none: its state has no "
                "quant_stats. Make room for them with attach(state, rules, *inputs). "
                "Those of activations may be collected beforehand with "
                "calib.Calibrator, and passed as quant_stats=calibrator.quant_stats."
            )
        return states

    def call_with(ranges, args, kwargs):
        # The ranges are values of this very call, so a trace that is cached under its
        # session must not serve another: each call has a session of its own.
        return wrap(step, provider.with_ranges(ranges))(*args, **kwargs)

    def call(*args, **kwargs):
        states = states_of(args, kwargs)
        updates = updates_of(args, kwargs)
        if not updates.may_update:
            return call_with(RunningRanges(states, updates, of_step=True), args, kwargs)
        running: list[RunningRanges] = []

        def inner(*args, **kwargs):
            states, updates = states_of(args, kwargs), updates_of(args, kwargs)
            ranges = RunningRanges(states, updates, of_step=True)
            running[:] = [ranges.after()]
            return call_with(ranges, args, kwargs)

        named = {"/".join(path): state for path, state in states.items()}
        with tracing_step(inner, args, kwargs) as (traced, finish):
            found = {name: named[name] for name in harvest.names_in(traced.body)}
            add = functools.partial(running[0].add, updates=updates)
            outs, after = harvest.harvest(traced.body, traced.inputs, found, add)
            out = finish(traced.rebuild(outs))
        updated = {tuple(name.split("/")): state for name, state in after.items()}
        return state_lib.put_states((args, kwargs), out, {**states, **updated})

    return call


def _like(step: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """What traces a step as a whole, with the name and signature of the step."""
    # A step that was jitted runs compiled, together with what is around it.
    run = Compiled(call, step) if hasattr(step, "lower") else call

    @functools.wraps(step, updated=())
    def quantized_step(*args, **kwargs):
        return run(*args, **kwargs)

    mark_wrapped(quantized_step)
    return quantized_step
