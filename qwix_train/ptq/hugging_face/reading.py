"""Params from a checkpoint, tensor by tensor, quantized on the way."""

from __future__ import annotations

import functools
import gc
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import Sharding

from qwix_train.core import numerics, tiling
from qwix_train.core.compiled import of_bytes, wants_bytes
from qwix_train.core.errors import located
from qwix_train.core.formats import Scales
from qwix_train.core.how import HowToQuantize, parse_calibration_method
from qwix_train.core.operands import with_sharding
from qwix_train.core.qarray import WithAux
from qwix_train.files import writing
from qwix_train.files.progress import tracked
from qwix_train.planning import static_range
from qwix_train.planning import table as plan_table
from qwix_train.planning.leaves import Leaf, Path
from qwix_train.ptq import (
    given_scales,
    given_shardings,
    params,
    safetensors_files,
    stored_arrays,
    trees,
)
from qwix_train.ptq.given_scales import GivenScales
from qwix_train.ptq.hugging_face import axes, places, quantized_tensors
from qwix_train.ptq.hugging_face.places import Assembly, TensorMapping
from qwix_train.ptq.hugging_face.quantized_tensors import QUANTIZED, Tensor
from qwix_train.values import stored

# How the range of a slice is found so that it has the bits of that of the whole.
_OF_SLICES = ("absmax", "minmax", "fixed")


def load(
    path: str | pathlib.Path,
    mapping: TensorMapping,
    abstract_params: Any,
    *,
    shardings: Any = None,
    quant_stats: Any = None,
) -> Any:
    """Reads a safetensors checkpoint into the params of a model, quantized or not.

    It reads tensor by tensor: besides the result, there are never more than two tensors
    in memory, in the dtype of the params. If the model is quantized, each param is
    quantized when it is read, to the bits that `quantize_params` gives for the whole
    float tree. A param that stacks layers or experts is quantized tensor by tensor,
    too. (With ``rms``, ``absmean`` and rotations, codes depend on how a whole array is
    summed up, so the float param is read as a whole.)

    Tensors that are quantized in the file, as those of gpt-oss (mxfp4) and DeepSeek-V3
    (fp8), keep their codes and scales if the param has their type. A float param gets
    their values. See `hugging_face.quantized_tensors`.

    Args:
        path: The folder, with ``model.safetensors`` or shards and their index; or one
            safetensors file.
        mapping: The `Place` of each tensor, by its name.
        abstract_params: The params of the model, or their shapes: for a Linen model
            ``jax.eval_shape(model.init, key, x)["params"]``; for an NNX model the model
            itself, which may be abstract (``nnx.eval_shape``). With a model that
            `quantize_model` gave, params are quantized. Numbers are cast to the dtypes
            of these params. Leaves beside the params, such as adapters, are left out.
        shardings: Where the params go: a `jax.sharding.Sharding`; nested dictionaries
            of them, as `ptq.restore` takes them; or a function that gives a sharding or
            None for the path of a param, such as ``"layers_0/mlp/kernel"``. A process
            reads only the parts of a file that its devices hold. Scales are sharded as
            their codes are. If None, the shardings of `abstract_params` count.
        quant_stats: The ranges of activations; see `quantize_params`.

    Returns:
        The params, unboxed: nested dictionaries of arrays, with a `WithAux` for each
        that is quantized; for an NNX model what ``nnx.update(model, ...)`` takes.

    Raises:
        FileNotFoundError: A file is missing.
        ImportError: `safetensors` is not installed.
        TypeError: ``shardings`` holds something else than shardings, or the mapping
            something else than places.
        ValueError: A file is damaged. Tensors are missing, left over, or of another
            shape or kind of dtype than the params, or an entry of the mapping matches
            nothing; the message lists all of these. Integers do not fit into the dtype
            of their param. Or a param cannot be quantized.

    >>> import pathlib, tempfile
    >>> import jax, numpy as np
    >>> from flax import linen as nn
    >>> from safetensors.numpy import save_file
    >>> from qwix_train import PtqProvider, QuantizationRule, quantize_model
    >>> from qwix_train.ptq import hugging_face
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"fc.weight": np.ones((2, 4), np.float32)}, file)
    >>> mapping = {"fc.weight": hugging_face.Place("kernel", "out in -> in out")}
    >>> model = quantize_model(
    ...     nn.Dense(2, use_bias=False),
    ...     PtqProvider([QuantizationRule(weight_qtype="int8")]),
    ... )
    >>> abstract = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 4)))
    >>> params = hugging_face.load(file, mapping, abstract["params"])
    >>> params["kernel"].array.qvalue.shape, params["kernel"].array.scale.shape
    ((4, 2), (1, 2))
    """
    path = pathlib.Path(path)
    static_range.check_quant_stats(quant_stats)
    writing.finish(path if path.is_dir() else path.parent)
    tensors = quantized_tensors.joined(safetensors_files.open_checkpoint(path), path)
    tree = trees.to_tree(abstract_params)
    named = {tuple(map(str, p.path)): p for p in stored_arrays.params_of(tree)}
    # Ranges of activations, and what else stands beside params, are in no checkpoint.
    wanted = {n: p for n, p in named.items() if Leaf.parse(n, named) is None}
    found = places.assemblies(
        mapping,
        {names: param.shape for names, param in wanted.items()},
        {name: tensor.shape for name, tensor in tensors.items()},
        str(path),
    )
    reader = _Reader(tensors, {a.path: a for a in found})
    values = {names: stored_arrays.value_of(param) for names, param in wanted.items()}
    reader.check_dtypes(values)
    if not callable(shardings):
        paths = [param.path for param in named.values()]
        given_shardings.check(shardings, paths, "the model")

    def given(names: Path) -> Any:
        param = wanted[names]
        if callable(shardings):
            own = shardings("/".join(names))
            given_shardings.check(own, [], "the model", param.path)
        else:
            own = given_shardings.at(shardings, param.path)
        if own is not None:
            return own
        # Of a packed param it is packed codes that have the sharding of all codes.
        return param.arrays["packed"] if param.layout is not None else values[names]

    if not any(map(stored.is_quantized, values.values())):
        counted = tracked("reading params", wanted.items(), lambda x: "/".join(x[0]))
        read = {p.path: reader.array(n, values[n], given(n)) for n, p in counted}
        return traverse_util.unflatten_dict(read)

    def quantize_leaf(names: Path, param: Any, target: Any, scales: GivenScales) -> Any:
        del scales  # Checkpoints of others have none.
        if not stored.is_quantized(target):
            return reader.array(names, param, given(names))
        given_scales.check_learned(names, target.how)
        quantized = reader.quantized(names, param, target.how, given(names))
        return stored.packed_as(quantized, target)

    shapes = {
        wanted[names].path: jax.ShapeDtypeStruct(value.shape, value.dtype)
        for names, value in values.items()
    }
    return params.quantize_tree(
        traverse_util.unflatten_dict(shapes),
        abstract_params if isinstance(abstract_params, nnx.Module) else tree,
        quantize_leaf,
        lambda target: (quant_stats, {}),
    )


class _Reader:
    """Reads params from tensors.

    Attributes:
        tensors: The tensors, by name.
        assemblies: What each param is made of, by its path.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], assemblies: Mapping[Path, Assembly]
    ) -> None:
        self.tensors = tensors
        self.assemblies = assemblies
        self._verified: set[str] = set()

    def check_dtypes(self, values: Mapping[Path, Any]) -> None:
        """Complains of float tensors for integer params, and of the reverse.

        Raises:
            ValueError: There are such tensors. The message names them.
        """
        wrong = [
            f"{name} ({self.tensors[name].dtype}, and {'/'.join(path)} is "
            f"{values[path].dtype})"
            for path, assembly in self.assemblies.items()
            for name in assembly.names.values()
            if not _are_alike(self.tensors[name].dtype, values[path].dtype)
        ]
        if wrong:
            raise ValueError(
                f"Tensors of another kind than their params: {plan_table.some(wrong)}."
            )

    def array(self, names: Path, like: Any, given: Any) -> jax.Array:
        """A param in float.

        Args:
            names: Its path.
            like: Its shape and dtype.
            given: Its sharding, or what has one.
        """
        struct = jax.ShapeDtypeStruct(like.shape, like.dtype)
        shardings = _shardings(names, struct, given)
        slice_at = self._slices(names, struct, shardings.get("value"))
        parts = self._assembled(
            names, {"value": struct}, shardings, lambda at: {"value": slice_at(at)}
        )
        return parts["value"]

    def quantized(
        self, names: Path, like: Any, how: HowToQuantize, given: Any
    ) -> WithAux:
        """A param that is quantized when it is read.

        Args:
            names: Its path.
            like: The shape and dtype of the float param.
            how: How it is quantized.
            given: Its sharding, or what has one.
        """
        struct = jax.ShapeDtypeStruct(like.shape, like.dtype)
        with located(f"Param {'/'.join(names)!r}"):
            whole = stored.quantize_param(struct, how)
        if any(
            isinstance(self.tensors[name], QUANTIZED)
            for name in self.assemblies[names].names.values()
        ):
            return self._as_in_file(names, whole, given)
        slots = self.assemblies[names].axes.slots
        if not _has_bits_of_whole(how, slots, len(like.shape)):
            array = self.array(names, like, given)
            with located(f"Param {'/'.join(names)!r}"):
                return stored.quantize_param(array, how)
        shardings = _shardings(names, whole, given)
        slice_at = self._slices(names, struct, shardings.get("qvalue"))
        parts = self._assembled(
            names,
            stored.parts(whole.array),
            shardings,
            lambda at: stored.parts(_quantized_slice(slice_at(at), how, whole, slots)),
        )
        return WithAux(whole.array.replace(**parts), how)

    def _as_in_file(self, names: Path, whole: WithAux, given: Any) -> WithAux:
        """A param that is quantized in the file: its codes and scales.

        Args:
            names: Its path.
            whole: Its shapes, as the model has them.
            given: Its sharding, or what has one.
        """
        assembly, array, how = self.assemblies[names], whole.array, whole.how
        slots = assembly.axes.slots
        with located(f"Param {'/'.join(names)!r}"):
            tensors = {
                name: quantized_tensors.checked(name, self.tensors[name])
                for name in assembly.names.values()
            }
            if any(array.scale.shape[a] == 1 < array.shape[a] for a in slots):
                raise ValueError(
                    "its tensors have scales of their own, and the rule asks for one "
                    f"for all (scales of shape {array.scale.shape})"
                )
        scale = jax.ShapeDtypeStruct(
            array.scale.shape,
            jnp.result_type(*(t.scale_dtype for t in tensors.values())),
        )
        float_dtype = None if scale.dtype == array.dtype else array.dtype
        struct = array.replace(scale=scale, float_dtype=float_dtype)
        wanted = [1 if a in slots else n for a, n in enumerate(scale.shape)]
        shardings = _shardings(names, WithAux(struct, how), given)
        structs = stored.parts(struct)

        def read(position: Mapping[str, int]) -> dict[str, jax.Array]:
            name = assembly.name_at(position)
            self._verify(name)
            with located(f"Param {'/'.join(names)!r}, {name}"):
                found = assembly.axes.param_at(tensors[name].array(), assembly.sizes)
                found = quantized_tensors.as_planned(found, how, wanted)
            parts = stored.parts(found)
            return {key: placed(key, np.asarray(parts[key])) for key in structs}

        def placed(key: str, part: np.ndarray) -> jax.Array:
            if key not in shardings:
                return jax.device_put(part)
            whole = structs[key].shape
            sharding = stored_arrays.slice_sharding(shardings[key], whole, part.shape)
            return jax.make_array_from_callback(part.shape, sharding, part.__getitem__)

        return WithAux(
            struct.replace(**self._assembled(names, structs, shardings, read)), how
        )

    def _verify(self, name: str) -> None:
        # With several processes, each reads a part, and parts have no checksum.
        if name not in self._verified and jax.process_count() == 1:
            self.tensors[name].verify()
            self._verified.add(name)

    def _tensor(self, name: str, dtype: Any) -> np.ndarray:
        """A tensor, whose numbers the dtype of its param can hold."""
        self._verify(name)
        with located(name):
            tensor = self.tensors[name].mapped()
            safetensors_files.check_fits(tensor, dtype)
            return tensor

    def _slices(
        self, names: Path, struct: jax.ShapeDtypeStruct, base: Sharding | None
    ) -> Callable[[Mapping[str, int]], jax.Array]:
        """Gives the slice of a param at a position along the axes of its slots."""
        assembly = self.assemblies[names]
        slots = assembly.axes.slots
        piece = tuple(1 if a in slots else n for a, n in enumerate(struct.shape))

        def read(position: Mapping[str, int]) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                return assembly.axes.read(
                    lambda at: self._tensor(assembly.name_at(at), struct.dtype),
                    assembly.sizes,
                    position,
                    index,
                    struct.dtype,
                )

            if base is None:
                return jax.device_put(part([slice(None)] * len(piece)))
            sharding = stored_arrays.slice_sharding(base, struct.shape, piece)
            return jax.make_array_from_callback(piece, sharding, part)

        return read

    def _assembled(
        self,
        names: Path,
        structs: Mapping[str, jax.ShapeDtypeStruct],
        shardings: Mapping[str, Sharding],
        read: Callable[[Mapping[str, int]], Mapping[str, jax.Array]],
    ) -> dict[str, jax.Array]:
        """Puts the parts of slices of a param together, where they are to be.

        Args:
            names: The path of the param.
            structs: The shapes and dtypes of the whole parts.
            shardings: Their shardings; empty for where JAX puts new arrays.
            read: Gives the parts of a slice at a position.
        """
        found = self.assemblies[names].axes
        slots = {found.param[axis][0]: axis for axis in found.slots}
        sizes = self.assemblies[names].sizes
        if not slots:
            return dict(jax.block_until_ready(read({})))
        whole: dict[str, jax.Array] = {}
        for name, part in structs.items():
            sharding = shardings.get(name)
            devices = (sharding or jnp.zeros(()).sharding).device_set
            dtype = jnp.int8 if wants_bytes(part.dtype, devices) else part.dtype
            whole[name] = jnp.zeros(part.shape, dtype, device=sharding)
        for position in axes.positions({name: sizes[name] for name in slots}):
            for name, part in read(position).items():
                start = [0] * part.ndim
                for slot, axis in slots.items():
                    # A range that is fixed has one scale for all.
                    start[axis] = position[slot] % structs[name].shape[axis]
                sharding = shardings.get(name)
                whole[name] = _put(whole[name], part, tuple(start), sharding)
            jax.block_until_ready(whole)
            # JAX lets go of memory that it shares with NumPy when garbage is collected.
            gc.collect(0)
        for name, part in structs.items():
            if whole[name].dtype != part.dtype:
                whole[name] = of_bytes(whole[name], part.dtype)
        return whole


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(
    whole: jax.Array, part: jax.Array, start: tuple[int, ...], sharding: Any
) -> jax.Array:
    result = jax.lax.dynamic_update_slice(whole, part.astype(whole.dtype), start)
    return result if sharding is None else with_sharding(result, sharding)


def _quantized_slice(
    array: jax.Array, how: HowToQuantize, whole: WithAux, slots: Sequence[int]
) -> Any:
    """A slice of a param, quantized as it is within the whole.

    Args:
        array: The slice, with one entry along each of the slots.
        how: How the param is quantized.
        whole: The shapes of the whole.
        slots: The axes that are sliced.
    """
    alone = np.prod(how.scale_shape(array.shape)) == 1 < whole.array.scale.size
    if not alone:
        return stored.quantize_param(array, how).array
    # A single scale of an array is rounded in another way than one of several: see
    # `core.calibration`.
    axis = next(axis for axis in slots if whole.array.scale.shape[axis] > 1)
    twice = stored.quantize_param(jnp.concatenate([array, array], axis), how).array
    return jax.tree.map(lambda part: jax.lax.slice_in_dim(part, 0, 1, axis=axis), twice)


def _has_bits_of_whole(how: HowToQuantize, slots: Sequence[int], ndim: int) -> bool:
    """Whether slices along some axes are quantized to the bits of the whole."""
    method, _ = parse_calibration_method(how.calibration_method)
    channelwise = {tiling.normalize_axis(axis, ndim) for axis in how.channelwise_axes}
    own = method == "fixed" or channelwise.issuperset(slots)
    if numerics.format_of(how.qtype).scales is Scales.TWO_LEVELS:
        own = own and {*how.tensor_axes}.issuperset(slots)
    exact = how.noise_fn is None and how.rotation is None and method in _OF_SLICES
    return not slots or (own and exact)


def _shardings(names: Path, struct: Any, given: Any) -> dict[str, Sharding]:
    """The shardings of the parts of a param; none if nothing is given.

    Args:
        names: The path of the param.
        struct: The param, as shapes.
        given: A sharding, or a param that has some.
    """
    (param,) = stored_arrays.params_of(traverse_util.unflatten_dict({names: struct}))
    if not any(map(stored_arrays.concrete_sharding, jax.tree.leaves(given))):
        return {}
    return stored_arrays.shardings_of(param, given)


def _are_alike(dtype: Any, other: Any) -> bool:
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return any(
        jnp.issubdtype(dtype, kind) and jnp.issubdtype(other, kind) for kind in kinds
    )
