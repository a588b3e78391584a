"""Quantized params in safetensors files, in the layouts of compressed-tensors.

This is the layout of quantized checkpoints on the Hugging Face hub: a folder with
``model.safetensors`` (or shards and their index) and ``config.json``, whose
``quantization_config`` says how each layer is quantized. See `compressed_layers` for
the tensors of a layer, and https://github.com/vllm-project/compressed-tensors.

Names and axes: the param ``Dense_0/kernel`` of shape ``[in, out]`` is the tensor
``Dense_0.weight`` of shape ``[out, in]``. Only matrices whose param is called
``kernel`` are transposed, codes and scales alike. An ``embedding`` (a matrix) and a
``scale`` (a vector, of a norm) are called ``weight``, too. Other params keep their
names. For a PyTorch implementation of the model to load the file, ``rename`` must map
the params to its names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qwix_train.core import numerics
from qwix_train.core.errors import located
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import QArray, WithAux
from qwix_train.files import json_text, processes, writing
from qwix_train.files.progress import tracked
from qwix_train.planning.leaves import Leaf, OperandName, Part, Path, range_of
from qwix_train.ptq import compressed_config, compressed_layers, safetensors_files
from qwix_train.ptq.hugging_face import places
from qwix_train.ptq.hugging_face.places import TensorMapping
from qwix_train.ptq.trees import to_tree
from qwix_train.trace.function import by_path
from qwix_train.values import stored

# Where a file says which params its tensors are, so that a tree comes back as it was.
_PARAMS = "qwix_train.params"
_ENTRY, _METHOD = "quantization_config", "compressed-tensors"
# The input of a layer is that of the first product of its module.
_INPUTS = [OperandName("", op, "lhs").path for op in ("dot_general0", "einsum0")]
_KINDS: tuple[Part, ...] = ("scale", "zero_point")
_STATIC = {Leaf(x, kind).path[-1]: kind for x in _INPUTS for kind in _KINDS}
_QUANTIZED = re.compile(r"(weight|input|output)($|_)")


def save_compressed_tensors(
    directory: str | pathlib.Path,
    params: Any,
    *,
    rename: Callable[[str], str] | None = None,
    mapping: TensorMapping | None = None,
    act_qtype: Any = None,
    int8_format: str = "int-quantized",
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes quantized params as a compressed-tensors checkpoint.

    If a save is killed, the files that were there stay, or nothing is left that readers
    take for a checkpoint. With several processes, all call this, and the first writes.

    int8 codes are written as they are, int2 and int4 packed ("pack-quantized"), other
    integers as int8, and float8_e4m3fn as it is ("float-quantized"). nvfp4, mxfp4,
    mxfp6 and mxfp8 are written as `compressed_blocks` says. The reciprocal that is
    written for the scale of an nvfp4 tensor is rounded to float32.

    Args:
        directory: The folder, made if it does not exist. ``model.safetensors`` is
            written, and ``quantization_config`` in ``config.json``. Other entries of an
            existing ``config.json`` are kept.
        params: Nested mappings of arrays and `WithAux`, or an NNX model. The static
            range of a layer's input (``dot_general0_lhs_scale``) becomes its
            ``input_scale``.
        rename: Maps the path of a param, such as ``"layers_0/mlp/kernel"``, to the name
            of its tensor, such as ``"model.layers.0.mlp.weight"``. By default
            ``a/kernel`` is ``a.weight``; see `qwix_train.ptq.compressed_tensors`.
        mapping: Instead of ``rename``, the `hugging_face.Place` of each tensor. It is
            for params that stack layers or experts, or have an axis of heads: each
            tensor is then a matrix of its own. Such a file does not say which params
            its tensors were.
        act_qtype: The type to which readers quantize activations at run time, per
            token, or in the blocks of mxfp8 and mxfp4. Layers with a static range keep
            it. None for weight-only.
        int8_format: ``"int-quantized"``, or ``"pack-quantized"``, which vLLM needs for
            weight-only int8.
        config: More entries for ``config.json``, such as the ``model_type``.
        max_shard_bytes: How many bytes of tensors a file holds at most, if it holds
            more than one. Beyond that there are shards and their index.
        overwrite: Whether to replace the compressed-tensors checkpoint that is there.

    Raises:
        FileExistsError: There is a checkpoint and ``overwrite`` is not set; or one of
            another kind, such as shards, which readers would read instead.
        ImportError: `safetensors` is not installed.
        OSError: The files cannot be written; those that were there stay.
        ValueError: The format cannot hold a param (a type or layout that it lacks, an
            array that is not a matrix, such as a stack of layers, codes outside of
            their type, scales that are not positive numbers, scales of input channels
            as of `Awq` and `SmoothQuant`), or two params have one name; the message has
            the path. Or no param is quantized.

    >>> import tempfile
    >>> from jax import numpy as jnp
    >>> from qwix_train import HowToQuantize, WithAux
    >>> from qwix_train.core.qarray import quantize_array
    >>> from qwix_train.ptq import load_compressed_tensors, save_compressed_tensors
    >>> how = HowToQuantize(qtype='int4', channelwise_axes=(1,), tiled_axes={0: 4})
    >>> kernel = WithAux(quantize_array(jnp.ones((16, 2)), how), how)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_compressed_tensors(folder, {'Dense_0': {'kernel': kernel}})
    ...     again = load_compressed_tensors(folder)['Dense_0']['kernel']
    >>> again.array.scale.shape, again.how == how
    ((4, 2), True)
    """
    safetensors_files.check_installed()
    if rename is not None and mapping is not None:
        raise ValueError("Pass rename or mapping, not both: each names the tensors.")
    if int8_format not in ("int-quantized", "pack-quantized"):
        raise ValueError(
            f"Unknown int8_format {int8_format!r}; choose int-quantized or "
            "pack-quantized."
        )
    activations = None
    if act_qtype is not None:
        activations = compressed_config.dynamic_activations(act_qtype)
    writer = _Writer(rename, activations, int8_format)
    static, others = {}, {}
    leaves = (WithAux, *stored.QUANTIZED_ARRAYS)
    flat = by_path(to_tree(params), lambda value: isinstance(value, leaves))
    lines = (
        f"{'/'.join(path)}: {jax.tree.map(stored.shape_of, leaf)}"
        for path, leaf in flat.items()
    )
    processes.check_same("The params", lines)
    counted = tracked("encoding params", flat.items(), lambda x: "/".join(x[0]))
    for path, leaf in counted:
        if path[-1] == "qvalue":
            raise ValueError(
                f"{'/'.join(path[:-2])} is a quantized param as a pure dict, which "
                "does not say its type. Pass the NNX model, or a tree with WithAux "
                "leaves."
            )
        leaf = processes.whole(leaf)
        if path[-1] in _STATIC:
            static[path] = leaf
        elif mapping is None:
            processes.together(functools.partial(writer.add, path, leaf))
        else:
            others[path] = leaf
    if mapping is not None:
        processes.together(functools.partial(writer.add_mapped, others, mapping))
    for path, leaf in static.items():
        symmetric = Leaf(range_of(path), "zero_point").path not in static
        writer.add_static(path, leaf, symmetric)
    if not writer.layers:
        raise ValueError(
            "No param is quantized, so this is no compressed-tensors checkpoint. "
            "Quantize the params with ptq.quantize first."
        )
    folder = pathlib.Path(directory)
    processes.once(
        lambda: _write(folder, writer, config or {}, max_shard_bytes, overwrite)
    )


def _write(
    folder: pathlib.Path,
    writer: _Writer,
    others: Mapping[str, Any],
    max_shard_bytes: int,
    overwrite: bool,
) -> None:
    writing.finish(folder)
    config_file = folder / safetensors_files.CONFIG
    entry = {_ENTRY: compressed_config.make_config(writer.layers)}
    metadata = {
        # Readers of the hub look for this entry. It says nothing about the layout.
        "format": "pt",
        _PARAMS: json.dumps(writer.recorded),
        **safetensors_files.config_metadata(entry),
    }
    files = safetensors_files.contents(
        {name: functools.partial(np.asarray, x) for name, x in writer.tensors.items()},
        {name: x.nbytes for name, x in writer.tensors.items()},
        metadata,
        max_shard_bytes,
    )
    _check_folder(folder, list(files), overwrite)
    config = {**_config(config_file), **others, **entry}
    text = json_text.dump(config, str(config_file), indent=2) + "\n"
    files[safetensors_files.CONFIG] = text.encode()
    writing.write_together(folder, files)


def _check_folder(folder: pathlib.Path, names: list[str], overwrite: bool) -> None:
    """Checks that a checkpoint may be written to a folder."""
    entry = _config(folder / safetensors_files.CONFIG).get(_ENTRY)
    is_any = isinstance(entry, dict) and entry.get("quant_method") == _METHOD

    def is_one(file: pathlib.Path) -> bool:
        del file  # One of them tells what all are.
        read = safetensors_files.read_metadata
        return is_any or any(_PARAMS in read(folder / name) for name in names)

    safetensors_files.check_folder(
        folder,
        names if entry is None else [*names, safetensors_files.CONFIG],
        what="of a compressed-tensors checkpoint",
        is_one=is_one,
        overwrite=overwrite,
    )


def _config(file: pathlib.Path) -> dict[str, Any]:
    return json_text.read(file) if file.exists() else {}


def load_compressed_tensors(
    path: str | pathlib.Path, *, rename: Callable[[str], str] | None = None
) -> dict[str, Any]:
    """Reads a checkpoint in the compressed-tensors layout, or a plain fp8 one.

    Layers may be int8, packed int2, int4 or int8, other integers stored as int8, or
    float8, with scales for the tensor, rows, groups or blocks; or nvfp4, mxfp4 or
    mxfp8. Codes and scales are those of the file, and `dequantize` gives what the
    library of the format gives. (Scales of nvfp4 tensors are stored as reciprocals,
    which are rounded to float32. The library rounds the values of nvfp4 to bfloat16,
    which is not done here.)

    Weights of types with blocks are dequantized to the ``dtype`` (or ``torch_dtype``)
    that ``config.json`` has for the model, and to float32 if it has none. What the
    input of an nvfp4 layer is divided by (``input_global_scale``) is left out: here
    nvfp4 finds it from the input itself.

    Args:
        path: The folder, or one safetensors file, with ``config.json`` beside it.
        rename: Maps the name of a tensor, such as ``"model.embed_tokens.weight"``, to
            the path of its param, such as ``"embed_tokens/embedding"``; quantized
            weights are named ``...weight`` however they are stored. By default params
            that `save_compressed_tensors` wrote get their paths back, and in others the
            matrix ``a.b.weight`` is ``a/b/kernel``, the vector ``a.b.weight`` is
            ``a/b/scale``, and ``.`` becomes ``/``.

    Returns:
        Nested dicts of arrays and `WithAux`; matrices at a path that ends in
        ``kernel`` are transposed to ``[in, out]``. The ``input_scale`` of a layer
        becomes ``dot_general0_lhs_scale``, of rank 2 if the file does not say.

    Raises:
        ImportError: `safetensors` is not installed.
        FileNotFoundError: There is no such file.
        ValueError: A layer has a scheme that is not supported, or tensors that do not
            fit together; or integers need 64 bits, which JAX does not have without
            ``jax_enable_x64``. The message has the name of the layer or tensor.
    """
    path = pathlib.Path(path)
    writing.finish(path if path.is_dir() else path.parent)
    tensors, metadata, config_file = safetensors_files.read_checkpoint(path)
    whole = _config(config_file)
    safetensors_files.check_config(metadata, whole, config_file)
    config = whole.get(_ENTRY)
    if config is not None:
        with located(f"{config_file}, {_ENTRY}"):
            compressed_config.check_config(config)
    recorded = json_text.parse(metadata.get(_PARAMS, "{}"), f"{_PARAMS} in {path}")
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in sorted(tensors.items()):
        layer, _, part = name.rpartition(".")
        modules.setdefault(layer, {})[part] = tensor

    reader = _Reader(rename, recorded, _float_dtype(whole))
    for layer, parts in tracked("reading layers", modules.items(), lambda x: x[0]):
        prefix = f"{layer}." if layer else ""
        if is_layer(parts):
            scheme = compressed_config.find_scheme(config, layer)
            own = {p: parts.pop(p) for p in list(parts) if _QUANTIZED.match(p)}
            reader.add_layer(prefix, own, scheme)
        for part, tensor in parts.items():
            with located(prefix + part):
                dtype = jax.dtypes.canonicalize_dtype(tensor.dtype)
                safetensors_files.check_fits(tensor, dtype)
            reader.add(prefix + part, jnp.asarray(tensor, dtype))
    return reader.tree()


def _float_dtype(config: Mapping[str, Any]) -> Any:
    """The dtype of a model's floats, as its config says it."""
    name = config.get("dtype", config.get("torch_dtype"))
    return jnp.dtype(name if name in ("float16", "bfloat16") else "float32")


def is_layer(parts: Iterable[str]) -> bool:
    """Returns whether the tensors of a module are those of a quantized layer.

    Args:
        parts: Their names within the module.
    """
    return any(part.startswith(("weight_packed", "weight_scale")) for part in parts)


@dataclasses.dataclass
class _Writer:
    """Collects the tensors of a checkpoint.

    Attributes:
        rename: As in `save_compressed_tensors`.
        activations: How activations are quantized where they have no static range.
        int8_format: As in `save_compressed_tensors`.
        tensors: The tensors, by name.
        layers: The scheme of each quantized layer, by name.
        recorded: The path and rank of each param, by the name of its tensor.
        layers_of: The names of the quantized layers of each module, by its path.
    """

    rename: Callable[[str], str] | None
    activations: dict[str, Any] | None
    int8_format: str
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    recorded: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    layers_of: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, path: tuple[str, ...], leaf: Any) -> None:
        where = "/".join(path)
        self._check(path, leaf)
        if _is_pre_quant_scale(path):
            return
        name = tensor_name(path, leaf.ndim)
        if self.rename is not None:
            name = self.rename(where)
        if name in self.recorded:
            other = self.recorded[name][0]
            raise ValueError(
                f"{where} and {other} would both be written as {name}. Pass `rename`."
            )
        self.recorded[name] = (where, leaf.ndim)
        if is_transposed(path, leaf.ndim):
            leaf = _transpose(leaf)
        self._add_tensor(name, path, leaf)

    def add_mapped(self, leaves: Mapping[Path, Any], mapping: TensorMapping) -> None:
        """Adds params that are tensors as a mapping says."""
        for path, leaf in leaves.items():
            self._check(path, leaf)
        shapes = {
            path: tuple(leaf.shape)
            for path, leaf in leaves.items()
            if not _is_pre_quant_scale(path)
        }
        for found in places.assemblies(mapping, shapes, None, "the checkpoint"):
            leaf = leaves[found.path]
            for name, at in found.tensors():
                array = leaf.array if isinstance(leaf, WithAux) else np.asarray(leaf)
                with located(f"{name} cannot be written", "."):
                    array = found.axes.tensor_at(array, found.sizes, at)
                if isinstance(leaf, WithAux):
                    array = WithAux(array, leaf.how)
                self._add_tensor(name, found.path, array)

    def _add_tensor(self, name: str, path: Path, leaf: Any) -> None:
        where = "/".join(path)
        if not isinstance(leaf, WithAux):
            self.tensors[name] = np.asarray(leaf)
            return
        with located(f"{where} cannot be written", "."):
            stored.check_own_basis(leaf)
            scheme = self._encode(name, leaf.array)
        layer = name.removesuffix("weight").removesuffix(".")
        self.layers[layer] = scheme
        self.layers_of.setdefault("/".join(path[:-1]), []).append(layer)

    def _check(self, path: Path, leaf: Any) -> None:
        where = "/".join(path)
        if isinstance(leaf, stored.QUANTIZED_ARRAYS):
            raise ValueError(
                f"{where} is a {type(leaf).__name__} that does not say how it was "
                "quantized. Pass it as WithAux(array, how)."
            )
        if _is_pre_quant_scale(path) and not (np.asarray(leaf) == 1).all():
            raise ValueError(
                f"{where} cannot be written: the format has no scales of input "
                "channels, and readers would run the layer without. Divide what "
                "comes before the layer by them, such as a norm's scale, or use "
                "ptq.save."
            )

    def _encode(self, name: str, array: Any) -> dict[str, Any]:
        if not isinstance(array, QArray):
            raise ValueError(
                "it is the scale of an activation that is not the input of a layer: "
                "give its op dynamic ranges, or use ptq.save"
            )
        format = compressed_layers.layer_format(array.qtype, self.int8_format)
        tensors, args = compressed_layers.encode_layer(array, format)
        if name.rpartition(".")[2] != "weight":
            raise ValueError(
                f"quantized params are named 'weight', not {name!r}; pass `rename`"
            )
        prefix = name.removesuffix("weight")
        self.tensors.update({prefix + part: x for part, x in tensors.items()})
        return dict(format=format, weights=args, input_activations=self.activations)

    def add_static(self, path: Path, leaf: Any, symmetric: bool) -> None:
        """Adds the static scale, or zero point, of the input of a layer."""
        where, kind = "/".join(path), _STATIC[path[-1]]
        layers = self.layers_of.get("/".join(path[:-1]), [])
        value = leaf.array if isinstance(leaf, WithAux) else leaf
        if len(layers) != 1 or value.size != 1:
            raise ValueError(
                f"{where} cannot be written: a layer, which has one quantized matrix, "
                "can have one scale for its input. This module has "
                f"{len(layers)} such matrices, and the range has shape {value.shape}. "
                "Give its op dynamic ranges, or use ptq.save."
            )
        (layer,) = layers
        name = f"{layer}.input_{kind}" if layer else f"input_{kind}"
        self.recorded[name] = (where, value.ndim)
        value = np.asarray(value).reshape(1)
        if kind == "scale":
            self.layers[layer]["input_activations"] = (
                compressed_config.static_activations(leaf.how.qtype, symmetric)
            )
        self.tensors[name] = value if kind == "scale" else value.astype(np.int8)


@dataclasses.dataclass
class _Reader:
    """Collects the params of a checkpoint.

    Attributes:
        rename: As in `load_compressed_tensors`.
        recorded: The path and rank of params, by the names of their tensors.
        dtype: The dtype of dequantized arrays, where scales do not say it.
        params: The params, by path.
        names: The names of the tensors that they come from, by path.
    """

    rename: Callable[[str], str] | None
    recorded: Mapping[str, tuple[str, int]]
    dtype: Any
    params: dict[tuple[str, ...], Any] = dataclasses.field(default_factory=dict)
    names: dict[tuple[str, ...], str] = dataclasses.field(default_factory=dict)

    def tree(self) -> dict[str, Any]:
        """The params as nested dicts.

        Raises:
            ValueError: A path would be both a param and a module that holds others.
        """
        for path, name in self.names.items():
            for end in range(1, len(path)):
                if path[:end] in self.names:
                    raise ValueError(
                        f"{self.names[path[:end]]} would become the param "
                        f"{'/'.join(path[:end])}, and {name} a param within it. Pass "
                        "`rename`."
                    )
        return traverse_util.unflatten_dict(self.params)

    def add(self, name: str, leaf: Any) -> tuple[str, ...]:
        if self.rename is not None:
            where = self.rename(name)
        elif name in self.recorded:
            where = self.recorded[name][0]
        else:
            where = param_path(name, leaf.ndim)
        path = tuple(where.split("/"))
        if path in self.params:
            raise ValueError(
                f"{name} and another tensor would both become {where}. Pass `rename`."
            )
        self.names[path] = name
        transposed = is_transposed(path, leaf.ndim)
        self.params[path] = _transpose(leaf) if transposed else leaf
        return path

    def add_layer(
        self, prefix: str, tensors: dict[str, np.ndarray], scheme: Mapping[str, Any]
    ) -> None:
        given: dict[Part, Any]
        given = {kind: tensors.pop(f"input_{kind}", None) for kind in _KINDS}
        tensors.pop("input_global_scale", None)
        with located(f"{prefix}weight cannot be read", "."):
            weight = compressed_layers.decode_layer(
                tensors, scheme.get("weights"), self.dtype
            )
            ranges = _static_ranges(given, scheme, weight.how.qtype)
        path = self.add(f"{prefix}weight", weight)
        for kind, (value, how) in ranges.items():
            (name,) = Leaf(_INPUTS[0], kind).path
            where, ndim = self.recorded.get(f"{prefix}input_{kind}", (name, 2))
            value = jnp.asarray(value).reshape((1,) * ndim)
            leaf = value if how is None else WithAux(value, how)
            self.params[(*path[:-1], where.rpartition("/")[2])] = leaf


def _static_ranges(
    ranges: Mapping[Part, np.ndarray | None],
    scheme: Mapping[str, Any],
    default: Any,
) -> dict[Part, tuple[np.ndarray, HowToQuantize | None]]:
    """Returns the static scale and zero point of the input of a layer."""
    scale, zero = ranges["scale"], ranges["zero_point"]
    if scale is None:
        return {}
    if scale.size != 1:
        raise ValueError(f"its input_scale has shape {scale.shape}; it must be one")
    compressed_layers.check_scale(scale)
    args = scheme.get("input_activations")
    qtype = compressed_config.activation_qtype(args, default)
    if zero is not None and numerics.is_integer_qtype(qtype):
        compressed_layers.check_codes(zero, numerics.qtype_bits(qtype), "zero point")
    asymmetric = zero is not None and bool(np.any(zero.astype(np.float32)))
    method = "minmax" if asymmetric else "absmax"
    how = HowToQuantize(qtype=qtype, calibration_method=method)
    result: dict[Part, tuple[np.ndarray, HowToQuantize | None]] = {
        "scale": (scale, how)
    }
    if zero is not None and asymmetric:
        result["zero_point"] = (zero.astype(numerics.storage_dtype(qtype)), None)
    return result


def _is_pre_quant_scale(path: Path) -> bool:
    known = Leaf.parse(path)
    return known is not None and known.part == "pre_quant_scale"


def is_transposed(path: Path, ndim: int) -> bool:
    """Returns whether the tensor of a param is its transpose."""
    return path[-1] == "kernel" and ndim == 2


def _transpose(leaf: Any) -> Any:
    if not isinstance(leaf, WithAux):
        return leaf.T
    how = dataclasses.replace(
        leaf.how,
        channelwise_axes=[1 - axis % 2 for axis in leaf.how.channelwise_axes],
        tiled_axes={1 - axis % 2: t for axis, t in leaf.how.tiled_axes.items()},
    )
    return WithAux(leaf.array.T, how)  # pyright: ignore


def tensor_name(path: Path, ndim: int) -> str:
    """Returns the name of the tensor of a param by default.

    >>> tensor_name(("Dense_0", "kernel"), 2)
    'Dense_0.weight'
    """
    last = path[-1]
    matrix = ndim == 2 and last in ("kernel", "embedding")
    if matrix or (ndim == 1 and last == "scale"):
        path = (*path[:-1], "weight")
    return ".".join(path)


def param_path(name: str, ndim: int) -> str:
    """Returns the path of the param of a tensor by default.

    >>> param_path("Dense_0.weight", 2)
    'Dense_0/kernel'
    """
    *modules, last = name.split(".")
    if last == "weight":
        last = {1: "scale", 2: "kernel"}.get(ndim, last)
    return "/".join((*modules, last))
