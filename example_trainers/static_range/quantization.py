"""Post-training quantization, each model exported and evaluated from its files."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from flax.training import train_state

import qwix_train
from example_trainers import metrics
from example_trainers.static_range import model as model_lib
from example_trainers.static_range import train
from qwix_train import calib, ptq

# The product of attention's probabilities and the values.
_MIXING = "einsum1"


def make_rules(
    weight_qtype: str, act_qtype: str | None = "int8", **options: Any
) -> list[qwix_train.QuantizationRule]:
    """All layers, and the products of attention where activations are quantized."""
    return [
        qwix_train.QuantizationRule(
            weight_qtype=weight_qtype, act_qtype=act_qtype, **options
        )
    ]


def static_rules(
    weight_qtype: str,
    observer: str,
    averaging: str = "mean",
    probabilities: str | None = None,
) -> list[qwix_train.QuantizationRule]:
    """The same with ranges of activations that are collected.

    Args:
        weight_qtype: The type of the weights.
        observer: What is measured.
        averaging: How batches combine.
        probabilities: What is measured where attention mixes values, if not that.
    """
    # A range with two ends makes codes with a zero point.
    field = "act_calibration_method" if observer == "minmax" else "act_observer"
    options: dict[str, Any] = {field: observer, "act_averaging": averaging}
    rules = make_rules(weight_qtype, act_static_scale=True, **options)
    if probabilities is None:
        return rules
    mixing = make_rules(
        weight_qtype,
        op_names=(_MIXING,),
        act_static_scale=True,
        act_observer=probabilities,
    )
    return [*mixing, *rules]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """Quantizes params, and measures what a restored export of them computes.

    Attributes:
        config: The settings.
        folder: Where exports go.
        validation: Returns the batches that ranges are collected from.
        test: Returns the batches of the reported loss.
    """

    config: ml_collections.ConfigDict
    folder: pathlib.Path
    validation: Callable[[], Any]
    test: Callable[[], Any]

    def calibrate(self, params: Any, rules: train.Rules) -> Any:
        """The ranges of activations, collected while the eval loop runs."""
        calibrator = calib.Calibrator(rules)
        eval_step = calibrator.wrap(jax.jit(model_lib.eval_step))
        train.evaluate(eval_step, self._state(params), self.validation())
        return calibrator.quant_stats

    def compare(self, params: Any) -> Any:
        """The error of each activation with each observer."""
        state = self._state(params)
        batches = ((state, batch) for batch in self.validation())
        return calib.compare(
            jax.jit(model_lib.eval_step),
            make_rules("int8"),
            batches,
            self.config.compared_observers,
        )

    def round_to_nearest(
        self, name: str, params: Any, rules: train.Rules, quant_stats: Any = None
    ) -> dict[str, float]:
        """Rounds weights to nearest, exports, and evaluates.

        Args:
            name: The name of the export.
            params: The float params.
            rules: The rules.
            quant_stats: The ranges of activations, for rules with static ranges.

        Returns:
            What was measured on the test split: `loss`, `accuracy`, and the size of
            the params in `bytes`.
        """
        provider = ptq.PtqProvider(rules)
        abstract = self._abstract(provider)
        quantized = qwix_train.quantize_params(params, abstract, quant_stats)
        return self._measure(name, quantized, provider, abstract)

    def with_method(
        self, name: str, params: Any, method: Any, quant_stats: Any = None
    ) -> dict[str, float]:
        """The same by a method that looks at the inputs of weights, such as GPTQ."""
        eval_step = method.wrap(jax.jit(model_lib.eval_step))
        train.evaluate(eval_step, self._state(params), self.validation())
        abstract = self._abstract(method.provider)
        quantized = method.quantize_params(params, abstract, quant_stats)
        return self._measure(name, quantized, method.provider, abstract)

    def measure_float(self, params: Any) -> dict[str, float]:
        """The same of the float model."""
        step = jax.jit(model_lib.eval_step)
        measured = train.evaluate(step, self._state(params), self.test())
        return {**measured, "bytes": metrics.nbytes(params)}

    def _measure(
        self, name: str, quantized: Any, provider: Any, abstract: Any
    ) -> dict[str, float]:
        """Saves quantized params, restores them, and evaluates the PTQ model."""
        path = self.folder / name
        ptq.save(path, quantized, overwrite=True)
        restored = ptq.restore(path, abstract)
        state = self._state(restored, self._model(provider))
        measured = train.evaluate(jax.jit(model_lib.eval_step), state, self.test())
        return {**measured, "bytes": metrics.nbytes(restored)}

    def _model(self, provider: Any) -> Any:
        return qwix_train.quantize_model(model_lib.create_model(self.config), provider)

    def _abstract(self, provider: Any) -> Any:
        tokens = model_lib.example_input(self.config)
        init = self._model(provider).init
        return jax.eval_shape(init, jax.random.key(0), tokens)["params"]

    def _state(self, params: Any, model: Any = None) -> train_state.TrainState:
        """What the eval step takes; there is no optimizer."""
        model = model_lib.create_model(self.config) if model is None else model
        nothing: Any = None
        return train_state.TrainState(
            step=0,
            apply_fn=model.apply,
            params=params,
            tx=nothing,
            opt_state=nothing,
        )
