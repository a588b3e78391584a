"""The training loop: phases that resume wherever they were killed."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import ml_collections
import optax
import orbax.checkpoint as ocp

import qwix_train
from example_trainers.static_range import data
from example_trainers.static_range import model as model_lib

Rules = Sequence[qwix_train.QuantizationRule]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A training run with one optimizer and one set of rules."""

    name: str
    steps: int
    tx: optax.GradientTransformation
    rules: Rules
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]


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
        optax.adamw(schedule, b2=0.98),
        rules,
        jax.jit(train_step, donate_argnums=0),
        jax.jit(eval_step),
    )


def with_ranges(phase: Phase, state: Any, *inputs: Any) -> Any:
    """The state with room for the ranges that QAT collects, where it does."""
    if not phase.rules:
        return state
    return qwix_train.with_quant_stats(state, phase.rules, *inputs)


def evaluate(
    eval_step: Callable[..., model_lib.Metrics], state: Any, batches: Any
) -> dict[str, float]:
    """The eval loop: of the float model, of QAT, of exports, and of calibration."""
    collected = [eval_step(state, batch) for batch in batches]
    merged = functools.reduce(model_lib.Metrics.merge, jax.device_get(collected))
    return {name: float(value) for name, value in merged.compute().items()}


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
    """Trains to the end of the phase, from its latest checkpoint if there is one.

    A checkpoint holds the train state, the position of the input pipeline and the
    history, so that a resumed phase cannot be told from an unbroken one.

    Args:
        phase: The phase.
        state: Its train state at the start.
        config: The settings.
        text: What to train on.
        validation: Returns the batches to evaluate on.
        checkpoint_dir: Where checkpoints are.
        hooks: Called after every step as `hook(step, state=state)`.

    Returns:
        The state, and the history: one record for each evaluation.
    """
    batches = data.train_iterator(
        text,
        length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    history: list[dict[str, float]] = []
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(checkpoint_dir, options=options) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            restored = checkpoints.restore(
                start,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(
                        jax.tree.map(ocp.utils.to_shape_dtype_struct, _to_tree(state))
                    ),
                    batches=grain.checkpoint.CheckpointRestore(batches),
                    history=ocp.args.JsonRestore(),
                ),
            )
            state = state.replace(**restored.state)
            history = restored.history["evaluations"]
            done = "done before" if start >= phase.steps else "resuming"
            print(f"{phase.name} | step {start:4d}/{phase.steps} | {done}", flush=True)

        collected = []
        started, first = time.perf_counter(), start
        for step in range(start + 1, phase.steps + 1):
            state, step_metrics = phase.train_step(state, next(batches))
            collected.append(step_metrics)
            for hook in hooks:
                hook(step, state=state)
            if step % config.eval_every and step != phase.steps:
                continue
            trained = evaluate(lambda _, metrics: metrics, None, collected)
            validated = evaluate(phase.eval_step, state, validation())
            history.append(
                {
                    "step": step,
                    "train_loss": trained["loss"],
                    "validation_loss": validated["loss"],
                    "validation_accuracy": validated["accuracy"],
                }
            )
            checkpoints.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_to_tree(state)),
                    batches=grain.checkpoint.CheckpointSave(batches),
                    history=ocp.args.JsonSave({"evaluations": list(history)}),
                ),
            )
            rate = (step - first) / (time.perf_counter() - started)
            print(
                f"{phase.name} | step {step:4d}/{phase.steps} "
                f"| train loss {trained['loss']:.3f} "
                f"| validation loss {validated['loss']:.3f} "
                f"| {rate:4.1f} steps/s",
                flush=True,
            )
            collected.clear()
            started, first = time.perf_counter(), step
    return state, history


def _to_tree(state: Any) -> dict[str, Any]:
    """What a checkpoint holds of a state; in QAT, its ranges, too."""
    names = ("step", "params", "opt_state", "quant_stats")
    return {name: getattr(state, name) for name in names if hasattr(state, name)}
