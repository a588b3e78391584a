"""Conversion to LiteRT, and what is measured of the files."""

import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from ai_edge_litert import interpreter as litert

import qwix_train
from example_trainers.digits_qat import data, model_linen
from qwix_train import odml


def float_model(
    config: ml_collections.ConfigDict, state: model_linen.TrainState
) -> Callable[[Any], jax.Array]:
    """The logits that the float model gives for images."""
    model = model_linen.create_model(tuple(config.features))
    return jax.jit(functools.partial(model.apply, _variables(state), train=False))


def convert_and_compare(
    config: ml_collections.ConfigDict,
    state: model_linen.TrainState,
    provider: odml.OdmlQatProvider | None,
    quant_stats: Any,
    test: data.Batch,
    path: pathlib.Path,
) -> tuple[odml.LiteRTModel, dict[str, Any]]:
    """Converts a model, reads the file, and compares it with the model in JAX.

    Args:
        config: The settings.
        state: The trained weights.
        provider: What the model is quantized with; None to convert it in float.
        quant_stats: The ranges of its activations.
        test: The images to run.
        path: The file.

    Returns:
        What `odml.convert` returned, and what was measured.
    """
    model = model_linen.create_model(tuple(config.features))
    if provider is None:
        expected = float_model(config, state)(test["image"])
        # No rules: all stays in float.
        provider = odml.OdmlQatProvider([], allow_unmatched=True)
    else:
        trained = qwix_train.quantize_model(model, provider.with_ranges(quant_stats))
        apply = jax.jit(functools.partial(trained.apply, train=False))
        expected = apply(_variables(state), test["image"])
    converted = odml.convert(
        model,
        _variables(state),
        provider,
        model_linen.IMAGE,
        quant_stats=quant_stats,
        # The file takes any number of images.
        dynamic_batch=True,
        train=False,
    )
    converted.save(path, overwrite=True)
    got = odml.LiteRTModel.load(path)(test["image"])
    difference = float(np.max(np.abs(got - np.asarray(expected))))
    predictions, expected = np.argmax(got, -1), np.argmax(np.asarray(expected), -1)
    compared = converted.report(test["image"])
    (output,) = compared
    return converted, {
        "jax_accuracy": float(np.mean(expected == test["label"])),
        "litert_accuracy": float(np.mean(predictions == test["label"])),
        "same_predictions": int(np.sum(predictions == expected)),
        "images": len(expected),
        "max_difference": difference,
        "max_steps": output.max_steps if output.scale else None,
        "equal_logits": output.equal if output.scale else None,
        "full_integer": converted.is_full_integer,
        "bytes": path.stat().st_size,
        "report": str(compared),
    }


def latency(
    float_model: Callable[[Any], jax.Array],
    files: Mapping[str, pathlib.Path],
    images: np.ndarray,
    rounds: int,
) -> dict[str, float]:
    """The median time of a call in microseconds, from array to array.

    Args:
        float_model: The model in JAX, compiled.
        files: Models for LiteRT, by name.
        images: The images of a call.
        rounds: The calls of each model. The models take turns, so that their times can
            be compared.
    """
    models: dict[str, Callable[[], np.ndarray]] = {
        "jax.jit": lambda: np.asarray(float_model(images))
    }
    models |= {name: _litert_call(path, images) for name, path in files.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model()
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def _litert_call(path: pathlib.Path, images: np.ndarray) -> Callable[[], np.ndarray]:
    """A call on one thread, with its memory allocated beforehand."""
    interpreter = litert.Interpreter(model_path=str(path), num_threads=1)
    place = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(place, images.shape)
    interpreter.allocate_tensors()
    output = interpreter.get_output_details()[0]["index"]

    def call():
        interpreter.set_tensor(place, images)
        interpreter.invoke()
        return interpreter.get_tensor(output)

    return call


def _variables(state: model_linen.TrainState) -> dict[str, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}
