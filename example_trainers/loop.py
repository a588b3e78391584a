"""The loop of all examples: phases that resume where they were killed."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import optax
import orbax.checkpoint as ocp

from example_trainers import metrics


@dataclasses.dataclass(frozen=True)
class Phase:
    """A training run with one optimizer.

    Attributes:
        name: Its name, for what is printed.
        steps: The number of its steps.
        train_step: Takes a state and a batch; returns the state and metrics.
        eval_step: Takes a state and a batch; returns metrics.
        to_tree: What a checkpoint holds of a state.
        from_tree: Puts what a checkpoint holds into a state.
    """

    name: str
    steps: int
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    to_tree: Callable[[Any], Any]
    from_tree: Callable[[Any, Any], Any]


def make_optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a short warmup and a cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps=steps // 10, decay_steps=steps
    )
    return optax.adam(schedule, b2=0.98)


def train_dataset(
    source: Any, transform: grain.transforms.RandomMap, *, seed: int
) -> grain.MapDataset[Any]:
    """The shuffled examples, over and over, each by its index."""
    dataset = grain.MapDataset.source(source).seed(seed)
    return dataset.shuffle().repeat().random_map(transform)


def train_iterator(
    source: Any, transform: grain.transforms.RandomMap, *, batch_size: int, seed: int
) -> grain.DatasetIterator[Any]:
    """An endless iterator over shuffled batches, whose position can be saved."""
    dataset = train_dataset(source, transform, seed=seed)
    dataset = dataset.batch(batch_size, drop_remainder=True)
    # One thread keeps a few batches ready: more would take cores from the training.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(dataset.to_iter_dataset(options))


def evaluate(
    eval_step: Callable[..., Any], state: Any, batches: Any
) -> dict[str, float]:
    """The metrics of a state over batches."""
    return metrics.merge([eval_step(state, batch) for batch in batches])


def run_phase(
    phase: Phase,
    state: Any,
    *,
    batches: grain.DatasetIterator[Any],
    validation: Callable[[], Any],
    split: str = "validation",
    eval_every: int,
    checkpoint_dir: pathlib.Path,
    hooks: Sequence[Callable[..., Any]] = (),
) -> tuple[Any, list[dict[str, float]]]:
    """Trains to the end of the phase, from its latest checkpoint if there is one.

    A checkpoint holds the train state, the position of the input pipeline and the
    history, so that a resumed phase cannot be told from an unbroken one.

    Args:
        phase: The phase.
        state: Its train state at the start.
        batches: What to train on.
        validation: Returns the batches to evaluate on.
        split: What those batches are called in the history.
        eval_every: The steps between two evaluations, each with a checkpoint.
        checkpoint_dir: Where checkpoints are.
        hooks: Called after every step as `hook(step, state=state)`.

    Returns:
        The state, and the history: one record for each evaluation, with the step and
        metrics such as `train_loss` and `validation_accuracy`.
    """
    history: list[dict[str, float]] = []
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(checkpoint_dir, options=options) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            tree = phase.to_tree(state)
            restored = checkpoints.restore(
                start,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(
                        jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
                    ),
                    batches=grain.checkpoint.CheckpointRestore(batches),
                    history=ocp.args.JsonRestore(),
                ),
            )
            state = phase.from_tree(state, restored.state)
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
            if step % eval_every and step != phase.steps:
                continue
            trained = metrics.merge(collected)
            validated = evaluate(phase.eval_step, state, validation())
            measured = {
                f"{name}_{metric}": value
                for name, found in (("train", trained), (split, validated))
                for metric, value in found.items()
            }
            history.append({"step": step, **measured})
            checkpoints.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(phase.to_tree(state)),
                    batches=grain.checkpoint.CheckpointSave(batches),
                    history=ocp.args.JsonSave({"evaluations": list(history)}),
                ),
            )
            rate = (step - first) / (time.perf_counter() - started)
            shown = [f"{key.replace('_', ' ')} {x:.3f}" for key, x in measured.items()]
            print(
                f"{phase.name} | step {step:4d}/{phase.steps} | {' | '.join(shown)} "
                f"| {rate:4.1f} steps/s",
                flush=True,
            )
            collected.clear()
            started, first = time.perf_counter(), step
    return state, history
