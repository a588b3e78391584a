"""The comparison: what is trained, quantized and measured, in order."""

import json
import os
import pathlib
import platform
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

import qwix_train
from example_trainers import byte_text
from example_trainers.static_range import data, quantization, report, train
from example_trainers.static_range import model as model_lib
from example_trainers.workdirs import claim_workdir
from qwix_train import hooks, ptq


class JsonLinesWriter:
    """A `clu`-style metric writer that appends lines to a file."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
    """Trains, quantizes in many ways, and reports the loss of each.

    Args:
        config: The settings, see `config.get_config`.
        workdir: Where checkpoints, exports and results go. A run that was killed in
            it continues where its latest checkpoint is.

    Returns:
        What `results.json` holds.
    """
    # Orbax takes absolute paths only.
    workdir = pathlib.Path(workdir).resolve()
    claim_workdir(config, workdir)
    started = time.perf_counter()
    splits = data.load_splits()

    def batches(split: str, count: int):
        return byte_text.eval_batches(
            splits[split],
            length=config.sequence_length,
            batch_size=config.eval_batch_size,
            batches=count,
        )

    quantizer = quantization.Quantizer(
        config,
        workdir / "exported",
        validation=lambda: batches("validation", config.validation_batches),
        test=lambda: batches("test", config.test_batches),
    )
    rows: list[dict[str, Any]] = []
    histories: dict[str, Any] = {}

    def run(phase: train.Phase, params: Any, phase_hooks=()) -> Any:
        state = model_lib.create_train_state(config, params, phase.tx)
        state, histories[phase.name] = train.run_phase(
            phase,
            train.with_ranges(phase, state, model_lib.example_input(config)),
            config=config,
            text=splits["train"],
            validation=quantizer.validation,
            checkpoint_dir=workdir / "checkpoints" / phase.name,
            hooks=phase_hooks,
        )
        return state

    def add(weights: str, activations: str, method: str, measured: Any) -> None:
        rows.append(
            {"weights": weights, "activations": activations, "method": method}
            | measured
        )
        print(report.format_row(rows[-1], rows[0]), flush=True)

    # 1. Float training, with a report of what int8 would do to each weight.
    int8 = quantization.make_rules("int8")
    plan = qwix_train.plan(
        model_lib.create_model(config), int8, model_lib.example_input(config)
    )
    print(f"{plan}\n", flush=True)
    quant_report = hooks.QuantReport(
        JsonLinesWriter(workdir / "quant_report.jsonl"),
        plan,
        every_steps=config.eval_every,
    )
    float_phase = train.make_phase(
        "float", steps=config.float_steps, learning_rate=config.float_learning_rate
    )
    params = run(float_phase, model_lib.create_params(config), [quant_report]).params

    # 2. Which observer fits which activation, from one run of the float model.
    comparison = quantizer.compare(params)
    print(f"\n{comparison}", flush=True)
    comparison.plot(workdir / "comparison.png", overwrite=True)

    # 3. int8: a scale for each row of an activation as it comes, or static ranges.
    print("\nTest loss of models that were exported and restored", flush=True)
    add("float", "float", "", quantizer.measure_float(params))
    measured = quantizer.round_to_nearest("int8_dynamic", params, int8)
    add("int8", "int8 dynamic", "", measured)

    def static(weights: str, method: str, rules: train.Rules) -> Any:
        quant_stats = quantizer.calibrate(params, rules)
        name = re.sub(r"\W+", "_", f"{weights} static {method}").strip("_")
        measured = quantizer.round_to_nearest(name, params, rules, quant_stats)
        add(weights, "int8 static", method, measured)
        return quant_stats

    for observer, averaging, *probabilities in config.observers:
        rules = quantization.static_rules("int8", observer, averaging, *probabilities)
        method = (
            observer if averaging == "mean" else f"{observer}, averaging {averaging}"
        )
        if probabilities:
            method += f" ({probabilities[0]}: probabilities)"
        static("int8", method, rules)
    static("int8", "best observer of each op", comparison.rules())

    # 4. int4 weights, alone and with static ranges, by methods that look at inputs.
    int4 = quantization.make_rules("int4", None)
    measured = quantizer.round_to_nearest("int4", params, int4)
    add("int4", "float", "round to nearest", measured)
    for name in config.int4_methods:
        method = {"GPTQ": ptq.Gptq, "AWQ": ptq.Awq}[name](int4)
        measured = quantizer.with_method(f"int4_{name}", params, method)
        print(f"\n{method.report}\n", flush=True)
        add("int4", "float", name, measured)
    for weights in config.weight_qtypes:
        rules = quantization.static_rules(weights, "absmax")
        if weights == "int4":
            quant_stats = static(weights, "absmax", rules)
        else:
            quant_stats = quantizer.calibrate(params, rules)
        method = ptq.SmoothQuant(rules)
        name = f"{weights}_static_{method.title}"
        measured = quantizer.with_method(name, params, method, quant_stats)
        add(weights, "int8 static", f"absmax, {method.title}", measured)

    # 5. QAT with static ranges, and as much more training in float as its control.
    options: dict[str, Any] = {
        "steps": config.qat_steps,
        "learning_rate": config.qat_learning_rate,
    }
    longer = run(train.make_phase("float_longer", **options), params)
    more = f"{config.qat_steps} steps more"
    add("float", "float", more, quantizer.measure_float(longer.params))
    for weights in config.weight_qtypes:
        rules = quantization.static_rules(weights, *config.qat_observer)
        state = run(train.make_phase(f"qat_{weights}", rules=rules, **options), params)
        measured = quantizer.round_to_nearest(
            f"{weights}_static_qat", state.params, rules, state.quant_stats
        )
        add(weights, "int8 static", f"QAT for {config.qat_steps} steps", measured)

    results = {
        "config": json.loads(config.to_json()),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "bytes_of_text": {name: len(text) for name, text in splits.items()},
        "rows": rows,
        "histories": histories,
        "seconds": time.perf_counter() - started,
    }
    report.write(results, workdir)
    return results
