"""A model in LiteRT's format: run, looked into, and compared with JAX."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qwix_train.odml import flatbuffer
from qwix_train.odml.flatbuffer import OpInfo
from qwix_train.text_table import aligned

DEFAULT_SIGNATURE = "serving_default"


@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """A function of a model.

    Attributes:
      inputs: the names of its inputs, in order.
      outputs: the names of its outputs, in order.
      tree: the structure of its result, of arrays in that order; None for a tuple.
      reference: the fake-quantized model in JAX, of the same inputs; None if it is not
        at hand.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tree: Any = None
    reference: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """How an output of a LiteRT model differs from that of the model in JAX.

    Attributes:
      name: the name of the output.
      scale: the scale of its codes; None if it has none, such as an index.
      max_steps: the largest difference, in units of the scale (of 1, without one).
      equal: the share of elements that are equal, to a thousandth of a step.
      mean_steps: the mean difference, in these units.
    """

    name: str
    scale: float | None
    max_steps: float
    equal: float
    mean_steps: float


class Report(tuple[OutputReport, ...]):
    """A comparison of all outputs; prints as a table."""

    def __str__(self) -> str:
        rows = [["output", "scale", "max steps", "mean steps", "equal"]]
        for out in self:
            scale = "" if out.scale is None else f"{out.scale:.3g}"
            rows.append(
                [
                    out.name,
                    scale,
                    f"{out.max_steps:.2f}",
                    f"{out.mean_steps:.3f}",
                    f"{out.equal:.1%}",
                ]
            )
        return aligned(rows)


class OpTable(tuple[OpInfo, ...]):
    """The operations of a model; prints as a table."""

    def __str__(self) -> str:
        rows = [["op", "inputs", "output", "range"]]
        for op in self:
            out = op.outputs[0] if op.outputs else None
            ends = None if out is None else out.range
            rows.append(
                [
                    op.name,
                    " ".join(_short(t) for t in op.inputs),
                    "" if out is None else _short(out),
                    "" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}",
                ]
            )
        return aligned(rows)


def _short(tensor: flatbuffer.TensorInfo) -> str:
    shape = "x".join(map(str, tensor.shape))
    channels = " per channel" if len(tensor.scale) > 1 else ""
    return f"{tensor.dtype}[{shape}]{channels}"


class LiteRTModel:
    """A model in LiteRT's format.

    `odml.convert` makes it, `LiteRTModel.load` reads it from a file. Called, it runs in
    LiteRT's interpreter on this machine.

    Attributes:
      content: the `.tflite` file.
      signatures: its functions, by name.
    """

    def __init__(
        self, content: bytes, signatures: Mapping[str, Signature] | None = None
    ):
        """Takes the file.

        Args:
          content: the file.
          signatures: its functions; those that the file says if None.
        """
        self.content = content
        if signatures is None:
            signatures = _signatures_in(content)
        self.signatures = dict(signatures)
        self._interpreters: dict[int | None, Any] = {}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LiteRTModel:
        """Reads a model from a `.tflite` file.

        Args:
          path: the path of the file.
        """
        with open(path, "rb") as file:
            return cls(file.read())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to a `.tflite` file.

        Args:
          path: the path of the file.
        """
        with open(path, "wb") as file:
            file.write(self.content)

    export = save

    def __call__(
        self,
        *inputs: Any,
        signature: str | None = None,
        num_threads: int | None = None,
        **named: Any,
    ) -> Any:
        """Runs the model in LiteRT's interpreter.

        Args:
          *inputs: the inputs, in the order of the model's arguments: arrays, or trees
            of them. Floats are quantized where the model takes integers.
          signature: the function to run; the only one, or `serving_default`, if None.
          num_threads: the number of threads.
          **named: inputs by the names that the signature gives them.

        Returns:
          NumPy arrays, in the structure that the model in JAX returns. Floats, where
          the model gives integers that stand for them.

        Raises:
          ValueError: if there is no such function, or inputs are missing.
        """
        name, found = self._signature(signature)
        arrays = [np.asarray(x) for x in jax.tree.leaves(inputs)]
        feed = dict(zip(found.inputs, arrays, strict=False))
        feed |= {key: np.asarray(x) for key, x in named.items()}
        if set(feed) != set(found.inputs) or len(arrays) > len(found.inputs):
            raise ValueError(
                f"The signature {name!r} takes {len(found.inputs)} inputs, "
                f"{', '.join(found.inputs)}; it was given {len(arrays)}"
                + (f" and {', '.join(named)}" if named else "")
                + "."
            )
        outputs = self._run(name, feed, num_threads)
        ordered = [outputs[key] for key in found.outputs]
        if found.tree is None:
            return ordered[0] if len(ordered) == 1 else tuple(ordered)
        return found.tree(ordered)

    def ops(self) -> OpTable:
        """The operations, in the order in which they run, with types and ranges."""
        return OpTable(flatbuffer.ops_in(self.content))

    @property
    def float_ops(self) -> list[OpInfo]:
        """The operations that compute with floats."""
        return flatbuffer.float_ops(self.ops())

    @property
    def is_full_integer(self) -> bool:
        """Whether all that computes reads and gives integers."""
        return not self.float_ops

    def report(self, *inputs: Any, signature: str | None = None) -> Report:
        """Compares the outputs with those of the fake-quantized model in JAX.

        Args:
          *inputs: the inputs, as for a call.
          signature: the function; see a call.

        Raises:
          ValueError: if the model in JAX is not at hand, as for one from a file.
        """
        name, found = self._signature(signature)
        if found.reference is None:
            raise ValueError(
                "There is no model in JAX to compare with: the model was read from a "
                "file. Use what odml.convert returns."
            )
        expected = found.reference(*inputs)
        got = self(*inputs, signature=name)
        scales = self._output_scales(name)
        reports = []
        for key, a, b in zip(
            found.outputs, jax.tree.leaves(got), jax.tree.leaves(expected), strict=True
        ):
            scale = scales.get(key)
            steps = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
            steps = steps / (scale or 1.0)
            reports.append(
                OutputReport(
                    key,
                    scale,
                    float(steps.max(initial=0)),
                    float((steps < 1e-3).mean()),
                    float(steps.mean()),
                )
            )
        return Report(reports)

    def _signature(self, name: str | None) -> tuple[str, Signature]:
        if name is None:
            names = list(self.signatures)
            name = names[0] if len(names) == 1 else DEFAULT_SIGNATURE
        if name not in self.signatures:
            raise ValueError(
                f"There is no signature {name!r}; those that exist are "
                f"{', '.join(self.signatures)}."
            )
        return name, self.signatures[name]

    def _run(self, name, feed, num_threads) -> dict[str, Any]:
        runner = self._interpreter(num_threads).get_signature_runner(name)
        details = runner.get_input_details()
        given = {key: _as_input(feed[key], details[key]) for key in feed}
        outputs = runner(**given)
        found = runner.get_output_details()
        return {key: _as_output(x, found[key]) for key, x in outputs.items()}

    def _interpreter(self, num_threads: int | None) -> Any:
        if num_threads not in self._interpreters:
            self._interpreters[num_threads] = make_interpreter(
                self.content, num_threads
            )
        return self._interpreters[num_threads]

    def _output_scales(self, name: str) -> dict[str, float]:
        """The scales of outputs, also of those that are dequantized in the end."""
        return output_scales(self.content, name)


def make_interpreter(content: bytes, num_threads: int | None = None) -> Any:
    """LiteRT's interpreter of a model.

    Args:
      content: the `.tflite` file.
      num_threads: the number of threads.

    Raises:
      ImportError: if it is not installed.
    """
    try:
        from ai_edge_litert import interpreter
    except ImportError as error:
        raise ImportError(
            "Running LiteRT models needs ai-edge-litert: pip install 'qwix_train[odml]'"
        ) from error
    return interpreter.Interpreter(model_content=content, num_threads=num_threads)


def _as_input(x: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    dtype = np.dtype(detail["dtype"])
    scale, zero_point = detail["quantization"]
    if scale and np.issubdtype(x.dtype, np.floating) and dtype.kind == "i":
        limits = np.iinfo(dtype)
        codes = np.round(x / np.float32(scale)) + zero_point
        return np.clip(codes, limits.min, limits.max).astype(dtype)
    return x.astype(dtype)


def _as_output(x: np.ndarray, detail: Mapping[str, Any]) -> np.ndarray:
    scale, zero_point = detail["quantization"]
    if scale and x.dtype.kind == "i":
        return ((x.astype(np.float32) - zero_point) * np.float32(scale)).astype(
            np.float32
        )
    return x


def _signatures_in(content: bytes) -> dict[str, Signature]:
    model = flatbuffer.read_model(content)
    found = {}
    for signature in model.signatureDefs or ():
        inputs = tuple(x.name.decode() for x in signature.inputs or ())
        outputs = tuple(x.name.decode() for x in signature.outputs or ())
        found[signature.signatureKey.decode()] = Signature(inputs, outputs)
    return found


def output_scales(content: bytes, name: str) -> dict[str, float]:
    """The scales of the outputs of a signature that stand for floats.

    Args:
      content: the file.
      name: the signature.
    """
    model = flatbuffer.read_model(content)
    signature = next(s for s in model.signatureDefs if s.signatureKey.decode() == name)
    graph = model.subgraphs[signature.subgraphIndex]
    made_by = {int(i): op for op in graph.operators for i in op.outputs}
    found = {}
    for output in signature.outputs:
        index = int(output.tensorIndex)
        op = made_by.get(index)
        candidates: Sequence[int] = [index]
        if op is not None and "float" in flatbuffer.dtype_of(graph.tensors[index]):
            candidates = [*candidates, int(op.inputs[0])]
        for candidate in candidates:
            scale = getattr(graph.tensors[candidate].quantization, "scale", None)
            if scale is not None and len(scale) == 1:
                found[output.name.decode()] = float(scale[0])
    return found
