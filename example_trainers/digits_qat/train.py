"""The training loop: phases that resume wherever they were killed."""

import dataclasses
import json
import os
import pathlib
import time
from types import ModuleType
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp

import qwix_train
from example_trainers.digits_qat import (
    data,
    export,
    metrics,
    model_linen,
    model_nnx,
    report,
)
from qwix_train.files import json_text

FRAMEWORKS: dict[str, ModuleType] = {"linen": model_linen, "nnx": model_nnx}


@dataclasses.dataclass(frozen=True)
class Phase:
    """A training run with one optimizer and one set of rules."""

    name: str
    steps: int
    tx: optax.GradientTransformation
    train_step: Any
    eval_step: Any


def make_phase(
    framework: ModuleType,
    name: str,
    *,
    steps: int,
    learning_rate: float,
    rules: list[qwix_train.QuantizationRule],
) -> Phase:
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    train_step, eval_step = framework.compile_steps(rules)
    return Phase(name, steps, tx, train_step, eval_step)


def make_rules(
    config: ml_collections.ConfigDict, weight_qtype: str
) -> list[qwix_train.QuantizationRule]:
    """Every layer, the first and the last included, at the same width."""
    act_qtype = weight_qtype if config.act_qtype == "same" else config.act_qtype
    return [
        qwix_train.QuantizationRule(
            module_path=".*", weight_qtype=weight_qtype, act_qtype=act_qtype
        )
    ]


def evaluate(phase: Phase, state: Any, test: data.Batch) -> dict[str, float]:
    return metrics.merge([phase.eval_step(state, test)])


def run_phase(
    phase: Phase,
    state: Any,
    *,
    framework: ModuleType,
    config: ml_collections.ConfigDict,
    train: data.Batch,
    test: data.Batch,
    data_seed: int,
    label: str,
    checkpoint_dir: pathlib.Path,
) -> tuple[Any, list[dict[str, float]]]:
    """Trains to the end of the phase, from its latest checkpoint if there is one.

    A checkpoint holds the train state, the position of the input pipeline and the
    history, so that a resumed phase cannot be told from an unbroken one.

    Returns:
        The state, and the history: one record for each evaluation.
    """
    batches = data.train_iterator(train, batch_size=config.batch_size, seed=data_seed)
    history: list[dict[str, float]] = []
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(checkpoint_dir, options=options) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            tree = framework.to_tree(state)
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
            state = framework.from_tree(state, restored.state)
            history = restored.history["evaluations"]
            done = "done before" if start >= phase.steps else "resuming"
            print(f"{label} | step {start:4d}/{phase.steps} | {done}", flush=True)

        collected = []
        started, first = time.perf_counter(), start
        for step in range(start + 1, phase.steps + 1):
            state, step_metrics = phase.train_step(state, next(batches))
            collected.append(step_metrics)
            if step % config.eval_every and step != phase.steps:
                continue
            trained, tested = metrics.merge(collected), evaluate(phase, state, test)
            history.append(
                {
                    "step": step,
                    "train_loss": trained["loss"],
                    "train_accuracy": trained["accuracy"],
                    "test_accuracy": tested["accuracy"],
                }
            )
            checkpoints.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(framework.to_tree(state)),
                    batches=grain.checkpoint.CheckpointSave(batches),
                    history=ocp.args.JsonSave({"evaluations": list(history)}),
                ),
            )
            rate = (step - first) / (time.perf_counter() - started)
            print(
                f"{label} | step {step:4d}/{phase.steps} "
                f"| loss {trained['loss']:.3f} "
                f"| train {trained['accuracy']:6.1%} "
                f"| test {tested['accuracy']:6.1%} "
                f"| {rate:4.0f} steps/s",
                flush=True,
            )
            collected.clear()
            started, first = time.perf_counter(), step
    return state, history


class SettingsError(ValueError):
    """The workdir holds a run that was started with other settings."""


def claim_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Refuses to resume a run that was started with other settings."""
    settings = json.loads(config.to_json())
    path = workdir / "config.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != settings:
            names = sorted(settings.keys() | found.keys())
            changed = "\n".join(
                f"  {name}: {found.get(name)} there, {settings.get(name)} here"
                for name in names
                if found.get(name) != settings.get(name)
            )
            raise SettingsError(
                f"{workdir} holds a run with other settings:\n{changed}\n"
                "Pass its settings to resume it, --restart to discard it, or another "
                "--workdir."
            )
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        json_text.write(path, settings, overwrite=True)


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
    """Trains float and QAT models, and reports what each width costs.

    Args:
        config: The settings, see `config.get_config`.
        workdir: Where checkpoints and results go. A run that was killed in it continues
            where its latest checkpoint is.

    Returns:
        What `results.json` holds.
    """
    # Orbax takes absolute paths only.
    workdir = pathlib.Path(workdir).resolve()
    claim_workdir(config, workdir)
    framework = FRAMEWORKS[config.framework]
    train, test = data.load_split()

    float_phase = make_phase(
        framework,
        "float",
        steps=config.float_steps,
        learning_rate=config.float_learning_rate,
        rules=[],
    )
    # The control: what the fine-tuning steps do without any quantization.
    longer_phase = make_phase(
        framework,
        "float_longer",
        steps=config.qat_steps,
        learning_rate=config.qat_learning_rate,
        rules=[],
    )
    # One compiled step for each width, shared by all seeds.
    qat_phases = [
        make_phase(
            framework,
            qtype,
            steps=config.qat_steps,
            learning_rate=config.qat_learning_rate,
            rules=make_rules(config, qtype),
        )
        for qtype in config.weight_qtypes
    ]

    narrowest = make_rules(config, config.weight_qtypes[-1])
    print(f"{framework.make_plan(config, narrowest)}\n", flush=True)

    measurements: list[dict[str, Any]] = []
    # For each type of weights, the state of the seed that came out best.
    best: dict[str, tuple[float, Any]] = {}

    def measure(seed: int, phase: Phase, method: str, accuracy: float, history):
        measurements.append(
            {
                "seed": seed,
                "weights": phase.name,
                "method": method,
                "test_accuracy": accuracy,
                "history": history,
            }
        )

    def run(seed: int, phase: Phase, state: Any, data_seed: int) -> Any:
        state, history = run_phase(
            phase,
            state,
            framework=framework,
            config=config,
            train=train,
            test=test,
            data_seed=data_seed,
            label=f"seed {seed} | {phase.name}",
            checkpoint_dir=workdir / "checkpoints" / f"seed_{seed}" / phase.name,
        )
        method = "qat" if phase in qat_phases else "float"
        accuracy = evaluate(phase, state, test)["accuracy"]
        measure(seed, phase, method, accuracy, history)
        if phase is not longer_phase and accuracy > best.get(phase.name, (0, None))[0]:
            best[phase.name] = accuracy, state
        return state

    for seed in config.seeds:
        # Two streams of batches for each seed; all widths fine-tune on the same one.
        float_data, qat_data = np.random.SeedSequence(seed).generate_state(2)
        state = framework.create_train_state(config, float_phase.tx, seed)
        state = run(seed, float_phase, state, int(float_data))
        for phase in qat_phases:
            # The same float weights, seen through the quantized eval step, are what
            # quantizing after training gives.
            accuracy = evaluate(phase, state, test)["accuracy"]
            measure(seed, phase, "ptq", accuracy, None)
            print(
                f"seed {seed} | {phase.name} | plain fake quant, no training "
                f"| test {accuracy:6.1%}",
                flush=True,
            )
            finetune_state = framework.create_finetune_state(state, phase.tx)
            run(seed, phase, finetune_state, int(qat_data))
        finetune_state = framework.create_finetune_state(state, longer_phase.tx)
        run(seed, longer_phase, finetune_state, int(qat_data))

    results = report.summarize(config, measurements)
    report.write(results, workdir)
    export.export_and_serve(
        framework,
        config,
        {name: state for name, (_, state) in best.items()},
        {"float": [], **{q: make_rules(config, q) for q in config.weight_qtypes}},
        test,
        workdir,
    )
    return results
