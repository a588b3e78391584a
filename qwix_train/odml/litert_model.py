"""A model in LiteRT's format: run, looked into, and compared with JAX."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train.core.errors import imported, located
from qwix_train.files import writing
from qwix_train.odml import edit, flatbuffer
from qwix_train.odml.flatbuffer import OpInfo, Signature, TensorInfo
from qwix_train.odml.report import OpTable, Report, output_report
from qwix_train.trace import function

DEFAULT_SIGNATURE = "serving_default"


class InJax(NamedTuple):
    """The function in JAX that a function of a model was made from.

    Attributes:
      tree: gives its result from the arrays of the outputs, in order.
      reference: the fake-quantized function, of the arrays of the inputs, in order.
    """

    tree: Callable[[list[Any]], Any]
    reference: Callable[..., Any]


class LiteRTModel:
    """A model in LiteRT's format.

    `odml.convert` makes it, `LiteRTModel.load` reads it from a file. Called, it runs in
    LiteRT's interpreter on this machine.

    Attributes:
      content: the `.tflite` file.
      signatures: its functions, by name.
    """

    def __init__(self, content: bytes, in_jax: Mapping[str, InJax] | None = None):
        """Takes the file.

        Args:
          content: the file.
          in_jax: what its functions were made from, by name; None if that is not at
            hand: a result is then a tuple, or the only output.

        Raises:
          ImportError: if the packages of the extra `odml` are not installed.
          ValueError: if it is no `.tflite` file.
        """
        self.content = content
        self.signatures: Mapping[str, Signature] = flatbuffer.signatures_in(content)
        self._in_jax = dict(in_jax or {})
        self._runners: dict[tuple[str, int | None], Any] = {}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LiteRTModel:
        """Reads a model from a `.tflite` file.

        Args:
          path: the path of the file.

        Raises:
          ValueError: if it is no `.tflite` file, or is cut off or corrupted.
        """
        with open(path, "rb") as file:
            content = file.read()
        with located(os.fspath(path)):
            return cls(content)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the model to a `.tflite` file, as a whole or not at all.

        Args:
          path: the path of the file.
          overwrite: whether to replace a `.tflite` file that is there.

        Raises:
          FileExistsError: if there is such a file and `overwrite` is not set, or
            something else.
          OSError: if the file cannot be written; what was there stays.
        """
        writing.write_file(
            path,
            self.content,
            what="a LiteRT model",
            signature=slice(4, 8),  # the file identifier of a flatbuffer
            overwrite=overwrite,
        )

    export = save

    def __call__(
        self,
        *inputs: Any,
        signature: str | None = None,
        dequantize: bool = True,
        num_threads: int | None = None,
        **named: Any,
    ) -> Any:
        """Runs the model in LiteRT's interpreter.

        Args:
          *inputs: the inputs, in the order of the model's arguments: arrays, or trees
            of them. Where the model takes codes, floats are quantized; arrays of the
            type of the codes are taken as codes.
          signature: the function to run; the only one, or `serving_default`, if None.
          dequantize: whether to return, in the place of codes that the model gives, the
            floats that they stand for.
          num_threads: the number of threads.
          **named: inputs by the names that the signature gives them, or by the name of
            the argument.

        Returns:
          NumPy arrays, in the structure that the model in JAX returns.

        Raises:
          ValueError: if there is no such function, or inputs are missing, or have other
            shapes or types than the model takes.
        """
        name = self._name(signature)
        feed = self._feed(name, inputs, named)
        outputs = self._run(name, feed, dequantize, num_threads)
        if name in self._in_jax:
            return self._in_jax[name].tree(outputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def ops(self) -> OpTable:
        """The operations, in the order in which they run, with types and ranges."""
        return OpTable(self._ops)

    @functools.cached_property
    def _ops(self) -> tuple[OpInfo, ...]:
        return tuple(flatbuffer.ops_in(self.content))

    @property
    def float_ops(self) -> list[OpInfo]:
        """The operations that compute with floats, or quantize them again."""
        return flatbuffer.float_ops(self._ops)

    @property
    def is_full_integer(self) -> bool:
        """Whether all computes in integers; only inputs and outputs may be floats."""
        return not self.float_ops

    @property
    def metadata(self) -> dict[str, bytes]:
        """The entries of the metadata of the file, by name."""
        return edit.metadata_in(self.content)

    def report(
        self, *inputs: Any, signature: str | None = None, **named: Any
    ) -> Report:
        """Compares the outputs with those of the fake-quantized model in JAX.

        Args:
          *inputs: the inputs, as for a call.
          signature: the function; see a call.
          **named: inputs by name; see a call.

        Raises:
          ValueError: if the model in JAX is not at hand, as for one from a file; or for
            inputs that do not fit, as in a call.
        """
        name = self._name(signature)
        if name not in self._in_jax:
            raise ValueError(
                "There is no model in JAX to compare with: the model was read from a "
                "file. Use what odml.convert returns."
            )
        feed = self._feed(name, inputs, named)
        found = self.signatures[name]
        floats = [_as_floats(feed[key], info) for key, info in found.takes.items()]
        expected = [
            x
            for x in jax.tree.leaves(self._in_jax[name].reference(*floats))
            if isinstance(x, jax.Array | np.ndarray)
        ]
        got = self._run(name, feed)
        return Report(
            output_report(key, found.output_scales.get(key), a, b)
            for key, a, b in zip(found.outputs, got, expected, strict=True)
        )

    def _name(self, name: str | None) -> str:
        if name is None:
            names = list(self.signatures)
            name = names[0] if len(names) == 1 else DEFAULT_SIGNATURE
        if name not in self.signatures:
            raise ValueError(
                f"There is no signature {name!r}; those that exist are "
                f"{', '.join(self.signatures) or 'none'}."
            )
        return name

    def _feed(
        self, name: str, inputs: tuple[Any, ...], named: Mapping[str, Any]
    ) -> dict[str, np.ndarray]:
        """The arrays for the inputs of a signature, by name."""
        found = self.signatures[name]
        leaves = jax.tree.leaves(inputs)
        pairs = list(zip(found.inputs, leaves, strict=False))
        for key, tree in named.items():
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                pairs.append(("_".join([key, *function.param_path(path)]), leaf))
        given = [key for key, _ in pairs]
        if sorted(given) != sorted(found.inputs) or len(leaves) > len(found.inputs):
            names = ", ".join(key for key in given[len(leaves) :])
            raise ValueError(
                f"The signature {name!r} takes {len(found.inputs)} inputs, "
                f"{', '.join(found.inputs)}; it was given {len(leaves)}"
                + (f", and by name {names}." if names else ".")
            )
        feed = {key: _as_input(key, x, found.takes[key]) for key, x in pairs}
        _check_batch(name, feed, found)
        return feed

    def _run(
        self,
        name: str,
        feed: Mapping[str, np.ndarray],
        dequantize: bool = True,
        num_threads: int | None = None,
    ) -> list[Any]:
        """The arrays of the outputs of a signature, in order."""
        key = (name, num_threads)
        if key not in self._runners:
            interpreter = make_interpreter(self.content, num_threads)
            self._runners[key] = interpreter.get_signature_runner(name)
        # It resizes the model to the shapes of the inputs.
        outputs = self._runners[key](**feed)
        return [
            _as_floats(outputs[key], info) if dequantize else outputs[key]
            for key, info in self.signatures[name].gives.items()
        ]


def make_interpreter(content: bytes, num_threads: int | None = None) -> Any:
    """LiteRT's interpreter of a model.

    Args:
      content: the `.tflite` file.
      num_threads: the number of threads.

    Raises:
      ImportError: if it is not installed.
      ValueError: if there is no such number of threads.
    """
    interpreter = imported(
        "ai_edge_litert.interpreter",
        "Running LiteRT models needs ai-edge-litert: pip install 'qwix_train[odml]'",
    )
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads={num_threads}: give 1 or more, or None.")
    return interpreter.Interpreter(model_content=content, num_threads=num_threads)


def _as_input(name: str, x: Any, info: TensorInfo) -> np.ndarray:
    """An input in the type that a model takes."""
    x = np.asarray(x)
    fits = len(x.shape) == len(info.shape) and all(
        b in (-1, a) for a, b in zip(x.shape, info.shape, strict=True)
    )
    if not fits:
        shape = tuple("any" if n < 0 else n for n in info.shape)
        hint = ""
        if x.shape[1:] == info.shape[1:]:
            hint = " Convert it with dynamic_batch=True for batches of any length."
        text = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(
            f"The input {name!r} has the shape {x.shape}, and the model takes ({text})."
            + hint
        )
    dtype = np.dtype(info.dtype)
    # Among them those that NumPy has no name for, such as bfloat16.
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if x.dtype == dtype or info.is_float:
        return x.astype(dtype)
    if is_float and len(info.scale) == 1:
        limits = np.iinfo(dtype)
        codes = np.round(x.astype(np.float32) / np.float32(info.scale[0]))
        codes = codes + info.zero_point[0]
        return np.clip(codes, limits.min, limits.max).astype(dtype)
    converted = x.astype(dtype)
    if is_float or info.scale or (converted != x).any():
        takes = f"codes of type {dtype}, or floats" if info.scale else f"{dtype}"
        raise ValueError(
            f"The input {name!r} is of type {x.dtype}, and the model takes {takes}."
        )
    return converted


def _as_floats(x: np.ndarray, info: TensorInfo) -> np.ndarray:
    """What the codes of a tensor stand for; the tensor itself if it holds none."""
    if len(info.scale) != 1 or x.dtype.kind != "i":
        return x
    (scale,), (zero_point,) = info.scale, info.zero_point
    return (x.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)


def _check_batch(name: str, feed: Mapping[str, np.ndarray], found: Signature) -> None:
    """Checks the length of the batch, where it is open."""
    lengths = {
        key: x.shape[0]
        for key, x in feed.items()
        if x.shape and found.takes[key].shape[0] == -1
    }
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        text = ", ".join(f"{key}: {n}" for key, n in lengths.items())
        raise ValueError(
            f"The signature {name!r} takes inputs with batches of one length, 1 or "
            f"more; their first axes have the lengths {text}."
        )
