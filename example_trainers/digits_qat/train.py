"""Training in float and with QAT, in phases that resume where they were killed."""

import dataclasses
import os
import pathlib
from types import ModuleType
from typing import Any

import ml_collections
import numpy as np
import optax

import qwix_train
from example_trainers import loop
from example_trainers.digits_qat import (
    data,
    export,
    model_linen,
    model_nnx,
    report,
)
from example_trainers.workdirs import claim_workdir

FRAMEWORKS: dict[str, ModuleType] = {"linen": model_linen, "nnx": model_nnx}


@dataclasses.dataclass(frozen=True)
class Phase(loop.Phase):
    """A training run with one optimizer and one set of rules."""

    tx: optax.GradientTransformation


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
    return Phase(
        name, steps, train_step, eval_step, framework.to_tree, framework.from_tree, tx
    )


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
    return loop.evaluate(phase.eval_step, state, [test])


def run_phase(
    phase: Phase,
    state: Any,
    *,
    config: ml_collections.ConfigDict,
    train: data.Batch,
    test: data.Batch,
    seed: int,
    data_seed: int,
    workdir: pathlib.Path,
) -> tuple[Any, list[dict[str, float]]]:
    """Trains one seed on the digits, see `loop.run_phase`."""
    return loop.run_phase(
        dataclasses.replace(phase, name=f"seed {seed} | {phase.name}"),
        state,
        batches=data.train_iterator(
            train, batch_size=config.batch_size, seed=data_seed
        ),
        validation=lambda: [test],
        split="test",
        eval_every=config.eval_every,
        checkpoint_dir=workdir / "checkpoints" / f"seed_{seed}" / phase.name,
    )


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
            config=config,
            train=train,
            test=test,
            seed=seed,
            data_seed=data_seed,
            workdir=workdir,
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
