"""Trees of quantized params for the runtime of `qwix`, and from it.

The two libraries lay a quantized param out alike: ``WithAux(array=QArray(...), how)``,
or ``{'array': {'qvalue', 'scale'}}`` in the pure dict of an NNX model. They differ in
this:

- `qwix` stores a param in the shape in which an op reads it, and this package in the
  shape that the model declares. They differ if the model reshapes a param before use.
- `qwix` has no usable ``int1`` (every code is 0). The codes -1 and +1 become ``int2``,
  a type that holds them, with the same scale.
- `qwix` has no tiles of unequal length, and its models look up no quantized table.
- Scales of ``mxfp8``, ``mxfp4`` and ``nvfp4`` are floats in `qwix`, with the same
  values. Its ``nvfp4`` has no scale of the tensor; params from `qwix` get 1.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from qwix_train.core import formats, numerics, tiling
from qwix_train.core.errors import imported, located
from qwix_train.core.formats import Scales
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import QArray, WithAux, dequantize
from qwix_train.ptq.trees import plain, to_tree
from qwix_train.values import stored


def to_qwix(params: Any, like: Any = None) -> Any:
    """Converts quantized params to those that `qwix.PtqProvider` models consume.

    Args:
        params: Nested mappings of arrays and `WithAux`, a whole tree or a part of it;
            an NNX model, or its pure dict.
        like: The params of the `qwix` model, which may be abstract:
            ``jax.eval_shape(qwix_model.init, key, x)['params']``, or the NNX model.
            With it, params take the shapes in which `qwix` stores them, and params that
            it keeps in float are dequantized. It can be left out where the model
            reads every quantized param in the shape that it declares.

    Returns:
        A nested dict with the classes of `qwix`; a pure dict, for `nnx.update`, if
        ``like`` is an NNX model.

    Raises:
        ImportError: `qwix` is not installed.
        ValueError: A param cannot be represented, is not in ``like``, or does not fit
            there; the message has its path.

    >>> import jax.numpy as jnp
    >>> from qwix_train import HowToQuantize, WithAux, quantize
    >>> from qwix_train.ptq import to_qwix
    >>> kernel = quantize(jnp.ones((4, 2)), 'int8', channelwise_axes=(1,))
    >>> how = HowToQuantize(qtype='int8', channelwise_axes=(1,))
    >>> theirs = to_qwix({'Dense_0': {'kernel': WithAux(kernel, how)}})
    >>> type(theirs['Dense_0']['kernel']).__module__.split('.')[0]
    'qwix'
    """
    classes = _qwix_classes()
    pure = isinstance(like, nnx.Module)

    def convert(where: str, leaf: Any, target: Any) -> Any:
        with located(f"{where} has no counterpart in qwix", "."):
            stored.check_own_basis(leaf)
        quantized = isinstance(leaf, WithAux) or _is_pure(leaf)
        if target is not None and _is_with_aux(target) != quantized:
            if not quantized:
                raise ValueError(
                    f"{where} is not quantized, but the qwix model expects it to be. "
                    "Quantize it, or take it out of the rules of the qwix model."
                )
            array = getattr(leaf, "array", None)
            if not isinstance(array, QArray):
                raise ValueError(
                    f"{where} is quantized, but the qwix model keeps it in float, and "
                    "it has no type to dequantize it with."
                )
            return dequantize(array)
        if _is_pure(leaf):
            return _reshape_pure(where, leaf, target)
        if not isinstance(leaf, WithAux):
            return leaf
        array = leaf.array
        if isinstance(array, QArray):
            _check_tiles(where, array)
            array = _with_float_scale(_reshape(where, array, target))
            if pure:
                return plain(WithAux(array, leaf.how))
            parts = array.qvalue, array.scale, array.zero_point
            array = classes["QArray"](*parts, _qtype_to_qwix(array.qtype))
        elif pure:
            return plain(leaf)
        if target is not None:
            return classes["WithAux"](array, target.how)
        qtype = _qtype_to_qwix(leaf.how.qtype)
        how = _converted(leaf.how, classes["HowToQuantize"], qtype)
        return classes["WithAux"](array, how)

    return _map_leaves(convert, to_tree(params), like, "the qwix model")


def from_qwix(params: Any, like: Any = None) -> Any:
    """Converts quantized params of `qwix` to those of this package.

    The classes of `qwix` are known by their names; it need not be installed.

    Args:
        params: What `qwix.quantize_params` or the ``init`` of a `qwix` model returned,
            whole or in part, abstract or not. Boxes such as `nn.Partitioned` are
            removed. Of an NNX model, the pure dict that `qwix.quantize_params`
            returned, the state, or the model itself.
        like: The params of the model of this package, which may be abstract, or that
            NNX model. With it, params take the shapes that the model declares. It can
            be left out where the model reads every quantized param in that shape.

    Returns:
        A nested dict. From an NNX model or its state, and from a pure dict, a pure
        dict, which does not say types.

    Raises:
        ValueError: A param has a type that this package does not have, is not in
            ``like``, or does not fit there; the message has its path.

    >>> from qwix_train.ptq import from_qwix
    >>> from_qwix({'Dense_0': {'bias': 0.5}})
    {'Dense_0': {'bias': 0.5}}
    """
    if isinstance(params, nnx.Module):
        params = nnx.state(params, nnx.Param)
    if isinstance(params, nnx.State):
        params = nnx.to_pure_dict(params)

    def convert(where: str, leaf: Any, target: Any) -> Any:
        if target is not None and not _is_with_aux(target):
            if _is_with_aux(leaf) or _is_pure(leaf):
                raise ValueError(
                    f"{where} is quantized, but the model keeps it in float. Add it to "
                    "the rules of the model."
                )
        if _is_pure(leaf):
            return _reshape_pure(where, leaf, target)
        if not _is_with_aux(leaf):
            return leaf
        array, how = leaf.array, _how_from_qwix(where, leaf.how)
        if hasattr(array, "qvalue"):
            dtype = numerics.storage_dtype(how.qtype)
            zero = array.zero_point
            array = QArray(
                _codes_from_qwix(array.qvalue, how.qtype),
                array.scale,
                None if zero is None else _cast(zero, dtype),
                how.qtype,
            )
            array = _with_coded_scale(_reshape(where, array, target))
        return WithAux(array, how if target is None else target.how)

    return _map_leaves(convert, stored.unbox(params), like, "the model")


def _qwix_classes() -> dict[str, Any]:
    qwix = imported(
        "qwix",
        "to_qwix builds objects of qwix, which is not installed: pip install qwix",
    )
    # Two of the classes have no public name. They are defined beside two that have.
    ptq = importlib.import_module(qwix.PtqProvider.__module__)
    arrays = importlib.import_module(qwix.QArray.__module__)
    return {
        "QArray": qwix.QArray,
        "WithAux": ptq.WithAux,
        "HowToQuantize": arrays.HowToQuantize,
    }


def _map_leaves(
    convert: Callable[[str, Any, Any], Any],
    tree: Any,
    like: Any,
    owner: str,
    path: tuple[Any, ...] = (),
) -> Any:
    """Rebuilds nested mappings as dicts, with each leaf converted.

    Args:
        convert: Called with the path of a leaf, the leaf, and its namesake in ``like``.
        tree: The mappings.
        like: Mappings or an NNX module; or None, then there are no namesakes.
        owner: What ``like`` belongs to, for messages.
        path: The path of ``tree``.
    """
    if not isinstance(tree, Mapping) or _is_pure(tree):
        return convert("/".join(map(str, path)), tree, like)
    result = {}
    for key, value in tree.items():
        child = None if like is None else _child(like, key)
        if like is not None and child is None:
            where = "/".join(map(str, (*path, key)))
            raise ValueError(f"There is no {where} in {owner}.")
        result[key] = _map_leaves(convert, value, child, owner, (*path, key))
    return result


def _child(node: Any, key: Any) -> Any:
    """A branch of mappings, lists or NNX modules; None if there is none."""
    if isinstance(node, Mapping):
        return node.get(key)
    if isinstance(key, int):
        return node[key] if key < len(node) else None
    return getattr(node, key, None)


def _is_with_aux(leaf: Any) -> bool:
    """Whether a leaf is a `WithAux`, of either library."""
    return hasattr(leaf, "array") and hasattr(leaf, "how")


def _is_pure(leaf: Any) -> bool:
    """Whether a leaf is a quantized param as the pure dict of an NNX model has it."""
    if not isinstance(leaf, Mapping) or set(leaf) != {"array"}:
        return False
    parts = leaf["array"]
    return isinstance(parts, Mapping) and {"qvalue", "scale"} <= set(parts)


def _reshape_pure(where: str, leaf: Any, target: Any) -> Any:
    parts = leaf["array"]
    # Which type the codes are of does not matter to their shape.
    dtype = parts["qvalue"].dtype
    qtype = "nf4" if dtype == "uint4" else dtype
    array = QArray(parts["qvalue"], parts["scale"], parts.get("zero_point"), qtype)
    how = HowToQuantize(qtype=qtype)
    return plain(WithAux(_reshape(where, array, target), how))


def _reshape(where: str, array: QArray, target: Any) -> QArray:
    shape = array.shape if target is None else _shape(target)
    if shape == array.shape:
        return array
    has = f"{where} of shape {array.shape}"
    with located(f"{has} does not fit the model, where it has shape {shape}"):
        return array.reshape(shape)


def _shape(target: Any) -> tuple[int, ...]:
    # The shape property of qwix's WithAux warns with newer versions of Flax.
    array = stored.unbox(target.array)
    return tuple(getattr(array, "qvalue", array).shape)


def _check_tiles(where: str, array: QArray) -> None:
    for part in (array.scale, array.zero_point):
        if part is not None and tiling.padded_axes(array.shape, part.shape):
            raise ValueError(
                f"{where} of shape {array.shape} has tiles of unequal length (scales "
                f"of shape {part.shape}), which qwix does not have. Choose a tile size "
                "that divides the axis."
            )


def _converted(how: Any, cls: Any, qtype: Any) -> Any:
    """How a param is quantized, as the other library says it."""
    return cls(
        qtype=qtype,
        channelwise_axes=tuple(how.channelwise_axes),
        tiled_axes=dict(how.tiled_axes),
        calibration_method=how.calibration_method,
        noise_fn=how.noise_fn,
    )


def _with_float_scale(array: QArray) -> QArray:
    """The same with codes and scales that are floats, as `qwix` has them."""
    entry = numerics.format_of(array.qtype)
    _qtype_to_qwix(entry.name)  # Complains of a type that it does not have.

    def change(array):
        codes, scale = array.qvalue, array.scale
        if entry.has_bits:
            codes = numerics.codes_to_float(codes, entry.name, jnp.float32)
            codes = codes.astype(jnp.float4_e2m1fn)
        if formats.is_coded(scale):
            scale = array.float_scale.astype(array.dtype)
        return codes, scale

    codes, scale = stored.result_of(change, array)
    return dataclasses.replace(
        array, qvalue=codes, scale=scale, tensor_scale=None, float_dtype=None
    )


def _with_coded_scale(array: QArray) -> QArray:
    """The same with scales as the type has them; for those of blocks `qwix` has 1."""
    entry = numerics.format_of(array.qtype)
    if not entry.coded_scales:
        return array
    two_levels = entry.scales is Scales.TWO_LEVELS
    scale: Any = _cast(array.scale, formats.E4M3 if two_levels else formats.E8M0)
    tensor: Any = jnp.ones((1,) * array.ndim, jnp.float32) if two_levels else None
    if two_levels and isinstance(array.scale, jax.ShapeDtypeStruct):
        tensor = jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
    return QArray(
        array.qvalue, scale, None, array.qtype, tensor, float_dtype=array.dtype
    )


def _codes_from_qwix(codes: Any, qtype: Any) -> Any:
    entry = numerics.format_of(qtype)
    if not entry.has_bits:
        return _cast(codes, entry.storage)

    def change(codes):
        return numerics.round_to_qtype(codes.astype(jnp.float32), entry.name)

    return stored.result_of(change, codes)


def _qtype_to_qwix(qtype: Any) -> str:
    entry = numerics.format_of(qtype)
    of_qwix = ("nf4", "mxfp8", "mxfp4", "nvfp4")
    if entry.name == "ternary" or (
        (entry.table is not None or entry.block) and entry.name not in of_qwix
    ):
        raise ValueError(
            f"qwix has no type {entry.name}. Quantize the float params to one that it "
            "has, such as 'int4'."
        )
    return "int2" if entry.name == "int1" else entry.name


def _how_from_qwix(where: str, how: Any) -> HowToQuantize:
    with located(f"{where} cannot be converted"):
        converted = _converted(how, HowToQuantize, how.qtype)
    if numerics.qtype_name(converted.qtype) == "int1":
        raise ValueError(
            f"{where} is int1, for which the codes of qwix are all 0. Quantize the "
            "float params with this package."
        )
    return converted


def _cast(x: Any, dtype: Any) -> Any:
    if x.dtype == dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype)
    return x.astype(dtype)
