"""Phases of training: in float, and QAT that collects ranges."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import optax

import qwix_train
from example_trainers import byte_text, loop
from example_trainers.loop import evaluate as evaluate
from example_trainers.static_range import model as model_lib

Rules = Sequence[qwix_train.QuantizationRule]


@dataclasses.dataclass(frozen=True)
class Phase(loop.Phase):
    """A training run with one optimizer and one set of rules."""

    tx: optax.GradientTransformation
    rules: Rules


def make_phase(
    name: str, *, steps: int, learning_rate: float, rules: Rules = ()
) -> Phase:
    """A phase of float training, or of QAT where there are rules."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps=steps // 10, decay_steps=steps
    )
    train_step, eval_step = model_lib.train_step, model_lib.eval_step
    if rules:
        train_step = qwix_train.wrap_train_step(train_step, rules)
        eval_step = qwix_train.wrap_eval_step(eval_step, rules)
    return Phase(
        name,
        steps,
        jax.jit(train_step, donate_argnums=0),
        jax.jit(eval_step),
        _to_tree,
        lambda state, tree: state.replace(**tree),
        optax.adamw(schedule, b2=0.98),
        rules,
    )


def with_ranges(phase: Phase, state: Any, *inputs: Any) -> Any:
    """The state with room for the ranges that QAT collects, where it does."""
    if not phase.rules:
        return state
    return qwix_train.attach(state, phase.rules, *inputs)


def run_phase(
    phase: Phase,
    state: Any,
    *,
    config: ml_collections.ConfigDict,
    text: Any,
    validation: Callable[[], Any],
    checkpoint_dir: pathlib.Path,
    hooks: Sequence[Callable[..., Any]] = (),
) -> tuple[Any, list[dict[str, float]]]:
    """Trains on a text, see `loop.run_phase`."""
    batches = byte_text.train_iterator(
        text,
        length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    return loop.run_phase(
        phase,
        state,
        batches=batches,
        validation=validation,
        eval_every=config.eval_every,
        checkpoint_dir=checkpoint_dir,
        hooks=hooks,
    )


def _to_tree(state: Any) -> dict[str, Any]:
    """What a checkpoint holds of a state; in QAT, its ranges, too."""
    names = ("step", "params", "opt_state", "quant_stats")
    return {name: getattr(state, name) for name in names if hasattr(state, name)}
