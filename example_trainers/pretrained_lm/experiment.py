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

from example_trainers import byte_text, loop
from example_trainers.digits_qat import metrics
from example_trainers.digits_qat.train import claim_workdir
from example_trainers.pretrained_lm import (
    checkpoint,
    data,
    memory,
    model_linen,
    model_nnx,
    report,
    variants,
)
from qwix_train import calib
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
        batches = self._batches(
            getattr(self, text)["test"], config.sequence_length, config.test_batches
        )
        step = self.framework.jit(self.framework.eval_step)
        return loop.evaluate(step, state, batches)["loss"]

    def collect(self, collector: Any) -> None:
        """Has a calibrator, or a method such as GPTQ, look at the float model."""
        config = self.config
        step = collector.wrap(self.framework.jit(self.framework.eval_step))
        for batch in self._batches(
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

    def _batches(self, tokens: np.ndarray, length: int, count: int) -> Any:
        return byte_text.eval_batches(
            tokens, length=length, batch_size=1, batches=count
        )


def run_ptq(experiment: Experiment) -> None:
    """Rounds to nearest."""
    experiment.measure_variants("ptq", variants.PTQ)


PARTS: dict[str, Callable[[Experiment], None]] = {"ptq": run_ptq}
