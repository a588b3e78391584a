"""The comparison: what is trained, converted and measured, in order."""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time
from typing import Any

import jax
import ml_collections
import numpy as np

import qwix_train
from example_trainers import workdirs
from example_trainers.digits_qat import data, model_linen
from example_trainers.digits_qat import train as digits_train
from example_trainers.odml_digits import measure as measure_lib
from example_trainers.odml_digits import report
from qwix_train import calib, odml

# What the command is held to.
MIN_SAME_PREDICTIONS = 0.995
MAX_LOST_ACCURACY = 0.005


def make_provider(weight_qtype: str, averaging: str = "mean") -> odml.OdmlQatProvider:
    """Every tensor in int8, weights in `weight_qtype`; images are in [0, 1]."""
    rule = qwix_train.QuantizationRule(
        weight_qtype=weight_qtype, act_qtype="int8", act_averaging=averaging
    )
    return odml.OdmlQatProvider([rule], fixed_range_for_inputs=(0, 1))


def make_qat_phase(
    config: ml_collections.ConfigDict, provider: odml.OdmlQatProvider
) -> digits_train.Phase:
    """Fine-tuning with the train step of `digits_qat`, wrapped."""
    weight_qtype = provider.rules[0].weight_qtype
    phase = digits_train.make_phase(
        model_linen,
        f"qat_{weight_qtype}",
        steps=config.qat_steps,
        learning_rate=config.qat_learning_rate,
        rules=[],
    )
    schedule = qwix_train.Schedule(quant_stats_warmup=config.warmup_batches)
    train_step = qwix_train.wrap_train_step(
        model_linen.train_step, provider, schedule=schedule
    )
    eval_step = qwix_train.wrap_eval_step(model_linen.eval_step, provider)
    return dataclasses.replace(
        phase,
        train_step=jax.jit(train_step, donate_argnums=0),
        eval_step=jax.jit(eval_step),
    )


def calibrate(
    config: ml_collections.ConfigDict,
    state: model_linen.TrainState,
    provider: odml.OdmlQatProvider,
    train: data.Batch,
) -> Any:
    """The ranges of the float model's activations, from the training images."""
    calibrator = calib.Calibrator(provider)
    eval_step = calibrator.wrap(jax.jit(model_linen.eval_step))
    for start in range(0, len(train["label"]), config.batch_size):
        chosen = slice(start, start + config.batch_size)
        eval_step(state, {name: column[chosen] for name, column in train.items()})
    return calibrator.quant_stats


def check(results: dict[str, Any]) -> list[str]:
    """What does not hold of what must, in words."""
    broken = []
    rows = {(row["weights"], row["method"]): row["seeds"] for row in results["rows"]}
    for (weights, method), measured in rows.items():
        if weights != "int8":
            continue
        for seed, record in zip(results["config"]["seeds"], measured, strict=True):
            name = f"{weights} {method}, seed {seed}"
            if not record["full_integer"]:
                broken.append(f"{name}: the file computes with floats.")
            same = record["same_predictions"] / record["images"]
            if same < MIN_SAME_PREDICTIONS:
                broken.append(f"{name}: only {same:.2%} of predictions are as in JAX.")
    if ("int8", "QAT") in rows:
        floating, trained = (
            statistics.fmean(record["litert_accuracy"] for record in rows[key])
            for key in (("float", "longer"), ("int8", "QAT"))
        )
        if trained < floating - MAX_LOST_ACCURACY:
            broken.append(
                f"int8 QAT: an accuracy of {trained:.2%}, where float has "
                f"{floating:.2%}."
            )
    return broken


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
    """Trains, converts, runs and compares.

    Args:
        config: The settings, see `config.get_config`.
        workdir: Where checkpoints, files and results go. A run that was killed in it
            continues where its latest checkpoint is.

    Returns:
        What `results.json` holds; `broken` in it lists what does not hold of what
        must.
    """
    # Orbax takes absolute paths only.
    workdir = pathlib.Path(workdir).resolve()
    workdirs.claim_workdir(config, workdir)
    started = time.perf_counter()
    exported = workdir / "exported"
    exported.mkdir(exist_ok=True)
    train, test = data.load_split()

    float_phase, longer_phase = (
        digits_train.make_phase(
            model_linen, name, steps=steps, learning_rate=learning_rate, rules=[]
        )
        for name, steps, learning_rate in (
            ("float", config.float_steps, config.float_learning_rate),
            # The control: what the steps of QAT do without any quantization.
            ("float_longer", config.qat_steps, config.qat_learning_rate),
        )
    )
    providers = {
        qtype: make_provider(qtype, config.averaging) for qtype in config.weight_qtypes
    }
    qat_phases = {
        qtype: make_qat_phase(config, provider) for qtype, provider in providers.items()
    }
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    shown: dict[str, Any] = {}
    timed: dict[str, pathlib.Path] = {}

    def run(seed: int, phase: digits_train.Phase, state: Any, data_seed: int) -> Any:
        return digits_train.run_phase(
            phase,
            state,
            config=config,
            train=train,
            test=test,
            seed=seed,
            data_seed=data_seed,
            workdir=workdir,
        )

    def measure(seed, weights, method, state, provider, quant_stats, history):
        name = "_".join(filter(None, (weights, method, f"seed_{seed}")))
        path = exported / f"{name.lower()}.tflite"
        converted, measured = measure_lib.convert_and_compare(
            config, state, provider, quant_stats, test, path
        )
        compared = measured.pop("report")
        if method == "QAT" and not shown:
            shown["shown"] = f"{weights} weights, {method}, seed {seed}"
            shown["ops"], shown["report"] = str(converted.ops()), compared
        rows.setdefault((weights, method), []).append({**measured, "history": history})
        timed[weights] = path
        print(
            f"seed {seed} | {path.name} | test {measured['litert_accuracy']:6.1%} "
            f"| {measured['same_predictions']} of {measured['images']} predictions as "
            "in JAX",
            flush=True,
        )

    for seed in config.seeds:
        # Two streams of batches for each seed; all widths fine-tune on the same one.
        float_data, qat_data = map(int, np.random.SeedSequence(seed).generate_state(2))
        state = model_linen.create_train_state(config, float_phase.tx, seed)
        state, history = run(seed, float_phase, state, float_data)
        measure(seed, "float", "", state, None, None, history)
        longer = model_linen.create_finetune_state(state, longer_phase.tx)
        longer, history = run(seed, longer_phase, longer, qat_data)
        measure(seed, "float", "longer", longer, None, None, history)
        for qtype, provider in providers.items():
            after = make_provider(qtype)
            quant_stats = calibrate(config, state, after, train)
            measure(seed, qtype, "PTQ", state, after, quant_stats, None)

            phase = qat_phases[qtype]
            trained = qwix_train.attach(
                model_linen.create_finetune_state(state, phase.tx),
                provider,
                model_linen.IMAGE,
                train=False,
            )
            trained, history = run(seed, phase, trained, qat_data)
            measure(seed, qtype, "QAT", trained, provider, trained.quant_stats, history)
        # What a model takes of time does not depend on its weights.
        jitted = measure_lib.float_model(config, longer)

    results = {
        "config": json.loads(config.to_json()),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "rows": [
            {"weights": weights, "method": method, "seeds": measured}
            for (weights, method), measured in rows.items()
        ],
        "latency": [
            {
                "images": count,
                "microseconds": measure_lib.latency(
                    jitted, timed, test["image"][:count], config.timing_rounds
                ),
            }
            for count in (1, len(test["label"]))
        ],
        **shown,
        "seconds": time.perf_counter() - started,
    }
    results["broken"] = check(results)
    report.write(results, workdir)
    return results
