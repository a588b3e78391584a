"""The comparison: what is loaded, quantized, trained and measured, in order."""

import functools
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import ml_collections
import numpy as np

import qwix_train
from example_trainers import byte_text, loop, metrics
from example_trainers.pretrained_lm import (
    checkpoint,
    data,
    generate,
    memory,
    model_linen,
    model_nnx,
    report,
    variants,
)
from example_trainers.workdirs import claim_workdir
from qwix_train import calib, lora
from qwix_train.files import json_text

FRAMEWORKS: dict[str, ModuleType] = {"linen": model_linen, "nnx": model_nnx}


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
    """Goes through the parts that the configuration names.

    Args:
        config: The settings, see `config.get_config`.
        workdir: Where results, checkpoints and exports go. What is there already is not
            measured again.

    Returns:
        What `results.json` holds.
    """
    # Orbax takes absolute paths only.
    workdir = pathlib.Path(workdir).resolve()
    # A later run may go through other parts.
    parts = config.parts
    settings = ml_collections.ConfigDict(
        {name: value for name, value in config.items() if name != "parts"}
    )
    if unknown := set(parts) - PARTS.keys():
        raise ValueError(
            f"There is no part {unknown.pop()!r}. Choose from {', '.join(PARTS)}."
        )
    claim_workdir(settings, workdir)
    experiment = Experiment(config, FRAMEWORKS[config.framework], workdir)
    experiment.measure_float()
    for part in parts:
        PARTS[part](experiment)
    results = {
        "config": json.loads(settings.to_json()),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "test_tokens": config.sequence_length * config.test_batches,
        "layer_bytes": experiment.sizes.layer_bytes,
        "rows": list(experiment.rows.values()),
    }
    report.write(results, workdir)
    return results


class Experiment:
    """What is measured, and where it is kept.

    Attributes:
        config: The settings.
        framework: The dialect of Flax.
        workdir: Where results, checkpoints and exports go.
        rows: What was measured, in this run or one before it.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        framework: ModuleType,
        workdir: pathlib.Path,
    ):
        self.config = config
        self.framework = framework
        self.workdir = workdir
        loaded = checkpoint.load(config.model)
        self.sizes, self.tokenizer = loaded.architecture, loaded.tokenizer
        self.floating = framework.create_state(loaded)
        self._kept = workdir / "rows.json"
        self.rows: dict[str, dict[str, Any]] = {}
        if self._kept.exists():
            self.rows = json_text.read(self._kept)

    @functools.cached_property
    def prose(self) -> dict[str, np.ndarray]:
        return data.load_prose(self.tokenizer)

    @functools.cached_property
    def code(self) -> dict[str, np.ndarray]:
        return data.load_code(self.tokenizer)

    def measure(
        self,
        part: str,
        about: Mapping[str, str],
        make: Callable[[], Any],
        text: str = "prose",
    ) -> None:
        """Measures what `make` gives, unless that was done before.

        Args:
            part: The part that it belongs to.
            about: What the table says of it: `weights`, `activations`, `method`.
            make: Makes a model; and, with it, what else the row is to hold.
            text: What its perplexity is measured on, `prose` or `code`.
        """
        name = " | ".join([part, *about.values(), text])
        if name not in self.rows:
            with memory.peak() as peak:
                started = time.perf_counter()
                state, found = make()
                loss = self.evaluate(state, text)
                seconds = time.perf_counter() - started
            self.rows[name] = {
                "part": part,
                **about,
                "text": text,
                "loss": loss,
                "bytes": metrics.nbytes(self.framework.params(state)),
                "seconds": seconds,
                "peak_bytes": peak.nbytes,
                **found,
            }
            json_text.write(self._kept, self.rows, overwrite=True)
        print(report.format_row(self.rows[name]), flush=True)

    def evaluate(self, state: Any, text: str = "prose") -> float:
        """The loss on held-out text, in nats per token."""
        config = self.config
        batches = self.batches(
            getattr(self, text)["test"], config.sequence_length, config.test_batches
        )
        step = self.framework.jit(self.framework.eval_step)
        return loop.evaluate(step, state, batches)["loss"]

    def collect(self, collector: Any) -> None:
        """Has a calibrator, or a method such as GPTQ, look at the float model."""
        config = self.config
        step = collector.wrap(self.framework.jit(self.framework.eval_step))
        for batch in self.batches(
            self.prose["validation"],
            config.calibration_length,
            config.calibration_batches,
        ):
            step(self.floating, batch)

    def quantize(self, variant: variants.Variant) -> Any:
        """The float model, quantized."""
        quant_stats = None
        if any(rule.act_static_scale for rule in variant.rules):
            calibrator = calib.Calibrator(variant.rules)
            self.collect(calibrator)
            quant_stats = calibrator.quant_stats
        arguments = self.sizes, self.floating
        if variant.make_method is None:
            return self.framework.quantize(*arguments, variant.rules, quant_stats)
        method = variant.make_method(variant.rules)
        self.collect(method)
        return self.framework.quantize_with(*arguments, method, quant_stats)

    def measure_float(self, text: str = "prose") -> None:
        about = {"weights": "float", "activations": "float", "method": "-"}
        self.measure("float", about, lambda: (self.floating, {}), text)

    def measure_variants(self, part: str, compared: list[variants.Variant]) -> None:
        for variant in compared:
            about = {
                "weights": variant.weights,
                "activations": variant.activations,
                "method": variant.method,
            }
            self.measure(part, about, lambda: (self.quantize(variant), {}))

    def batches(self, tokens: np.ndarray, length: int, count: int) -> Any:
        return byte_text.eval_batches(
            tokens, length=length, batch_size=1, batches=count
        )

    def train(
        self,
        name: str,
        train_step: Callable[..., Any],
        state: Any,
        text: dict[str, np.ndarray],
        steps: int,
        rules: variants.Rules = (),
    ) -> Any:
        """Trains, from the latest checkpoint if there is one.

        Args:
            name: The name of the phase.
            train_step: A compiled step.
            state: What it begins with.
            text: What it trains on, by split.
            steps: The number of its steps.
            rules: What it quantizes, for the loss on the validation split.
        """
        config, framework = self.config, self.framework
        eval_step = framework.eval_step
        if rules:
            eval_step = qwix_train.wrap_eval_step(eval_step, rules)
        evaluate = framework.jit(eval_step)
        phase = loop.Phase(
            name,
            steps,
            train_step,
            lambda state, batch: evaluate(framework.model_of(state), batch),
            framework.to_tree,
            framework.from_tree,
        )
        batches = byte_text.train_iterator(
            text["train"],
            length=config.train_length,
            batch_size=config.train_batch_size,
            seed=config.seed,
        )
        state, _ = loop.run_phase(
            phase,
            state,
            batches=batches,
            validation=lambda: self.batches(text["validation"], config.train_length, 1),
            eval_every=config.eval_every,
            checkpoint_dir=self.workdir / "checkpoints" / name,
        )
        return state


def run_ptq(experiment: Experiment) -> None:
    """Rounds to nearest."""
    experiment.measure_variants("ptq", variants.PTQ)


def run_static(experiment: Experiment) -> None:
    """int8 with static ranges."""
    experiment.measure_variants("static", variants.STATIC)


def run_methods(experiment: Experiment) -> None:
    """int4 by methods that look at the inputs of weights."""
    experiment.measure_variants("methods", variants.METHODS)


def run_qlora(experiment: Experiment) -> None:
    """Fine-tunes on source code, and writes the adapters as PEFT does."""
    config, framework = experiment.config, experiment.framework
    experiment.measure_float("code")
    tx = loop.make_optimizer(config.qlora_learning_rate, config.qlora_steps)
    options = {"rank": config.rank, "alpha": config.alpha}
    quantized = {"tile_size": config.tile_size, "double_quant": True}

    def finetune(name: str, base: dict[str, Any]) -> Any:
        rules = [lora.LoraRule(module_path="layers/.*", **options, **base)]
        state = framework.adapted_state(experiment.floating, tx, rules)
        code = experiment.code
        batch = next(experiment.batches(code["train"], config.train_length, 1))
        step, compiled = framework.compiled_train_step(state, batch)
        temporary = memory.temporary_bytes(compiled)
        state = experiment.train(name, step, state, code, config.qlora_steps)
        names = _hugging_face_names()
        framework.save_peft(state, names, experiment.workdir / "adapters" / name)
        return framework.model_of(state), {"temporary_bytes": temporary}

    for weights, name, base in (
        ("float", "LoRA", {}),
        ("nf4, tile 64", "QLoRA", {"weight_qtype": "nf4", **quantized}),
    ):
        about = {"weights": weights, "activations": "float", "method": name}
        make = functools.partial(finetune, name, base)
        experiment.measure("qlora", about, make, "code")


def run_qat(experiment: Experiment) -> None:
    """int3: rounded to nearest, and trained to be like the float model."""
    config, framework = experiment.config, experiment.framework
    rules = variants.weight_rules("int3", tile_size=config.qat_tile_size)
    weights = f"int3, tile {config.qat_tile_size}"
    plain = variants.Variant(weights, "float", "to nearest", rules)
    experiment.measure_variants("qat", [plain])

    def train() -> Any:
        tx = loop.make_optimizer(config.qat_learning_rate, config.qat_steps)
        step = framework.compile_step(
            qwix_train.wrap_train_step(framework.distill_step, rules)
        )
        state = experiment.train(
            "QAT",
            lambda state, batch: step(state, experiment.floating, batch),
            framework.trained_state(experiment.floating, tx),
            experiment.prose,
            config.qat_steps,
            rules,
        )
        trained = framework.model_of(state)
        return framework.quantize(experiment.sizes, trained, rules), {}

    method = f"QAT, distilled, {config.qat_steps} steps"
    about = {"weights": weights, "activations": "float", "method": method}
    experiment.measure("qat", about, train)


def run_export(experiment: Experiment) -> None:
    """Saves int8, restores it, and has it answer a question."""
    config, framework = experiment.config, experiment.framework
    rules, path = variants.int8_rules(), experiment.workdir / "exported"

    def restored() -> Any:
        quantized = framework.quantize(experiment.sizes, experiment.floating, rules)
        framework.save(quantized, rules, path)
        state = framework.restore(experiment.sizes, rules, path)
        text = generate.answer(
            framework,
            state,
            experiment.tokenizer,
            config.prompt,
            config.generated_tokens,
        )
        return state, {"prompt": config.prompt, "answer": text}

    about = {"weights": "int8", "activations": "int8 dynamic", "method": "restored"}
    experiment.measure("export", about, restored)


def _hugging_face_names() -> dict[str, str]:
    """The modules of Hugging Face's Llama, by the paths of our params."""
    attention, feed_forward = "self_attn", "mlp"
    modules = {
        "query": (attention, "q_proj"),
        "key": (attention, "k_proj"),
        "value": (attention, "v_proj"),
        "out": (attention, "o_proj"),
        "gate": (feed_forward, "gate_proj"),
        "up": (feed_forward, "up_proj"),
        "down": (feed_forward, "down_proj"),
    }
    return {
        f"layers/{ours}/kernel": ".".join(["model.layers.{layer}", *theirs])
        for ours, theirs in modules.items()
    }


PARTS: dict[str, Callable[[Experiment], None]] = {
    "ptq": run_ptq,
    "static": run_static,
    "methods": run_methods,
    "qlora": run_qlora,
    "qat": run_qat,
    "export": run_export,
}
