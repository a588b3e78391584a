"""Params of a quantized tree as the arrays that a checkpoint stores, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import FrozenDict
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

from qwix_train.core import numerics, packing
from qwix_train.core.packed_array import PackedQArray
from qwix_train.core.qarray import QArray, WithAux
from qwix_train.ptq.manifest import StoredArray, StoredParam, TreePath, path_name
from qwix_train.values import stored

# Sub-byte arrays that are no codes: the type of codes that has the same values.
_PACKED_AS = {"int2": "int2", "int4": "int4", "uint4": "nf4"}
# The parts of a quantized array that are finite and not negative.
_SCALES = ("scale", "scale_steps", "scale_mean")


def params_of(tree: Any) -> list[StoredParam]:
    """The params of a tree, with their arrays.

    Args:
        tree: Nested dicts of arrays, concrete or abstract, `QArray` and `WithAux`;
            metadata boxes such as `flax.linen.Partitioned` are looked through.

    Raises:
        TypeError: It is no such tree; the message names the param.

    >>> q = QArray(jnp.ones((4, 2), jnp.int8), jnp.ones((1, 2)))
    >>> [(p.path, list(p.arrays)) for p in params_of({'a': {'kernel': q}})]
    [(('a', 'kernel'), ['qvalue', 'scale'])]
    """
    if not isinstance(tree, dict | FrozenDict):
        raise TypeError(f"Expected a dict of params, got {type(tree).__name__}.")
    flat = traverse_util.flatten_dict(stored.unbox(tree))
    return [_param(path, value) for path, value in flat.items()]


def _param(path: TreePath, value: Any) -> StoredParam:
    how, qtype, layout = None, None, None
    if isinstance(value, WithAux):
        value, how = value.array, value.how
    arrays = {"value": value}
    if isinstance(value, stored.QUANTIZED_ARRAYS):
        arrays, qtype = stored.parts(value), numerics.qtype_name(value.qtype)
        layout = value.layout if isinstance(value, PackedQArray) else None
    for name, array in arrays.items():
        where = f"Param {path_name(path)!r}, {name}"
        if not isinstance(array, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(f"{where}: expected an array, got {type(array).__name__}.")
        _check_dtype(where, array.dtype)
    return StoredParam(path, arrays, qtype, how, layout)


def _check_dtype(where: str, dtype: Any) -> None:
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        raise TypeError(
            f"{where}: arrays of dtype {dtype} cannot be stored, but their "
            "jax.random.key_data can."
        )
    whole = jnp.issubdtype(dtype, jnp.integer)
    if whole or jnp.issubdtype(dtype, jnp.floating):
        bits = (jnp.iinfo if whole else jnp.finfo)(dtype).bits
        known = bits >= 8 or jnp.dtype(dtype).name in _PACKED_AS
    else:
        known = dtype == jnp.bool
    if not known:
        raise TypeError(f"{where}: arrays of dtype {dtype} cannot be stored.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            f"{where}: JAX holds no {dtype} unless jax_enable_x64 is set; set it, or "
            "convert the array."
        )


def described(param: StoredParam) -> StoredParam:
    """What a manifest says of a param, but for packing and checksums."""
    arrays = {
        name: StoredArray(tuple(array.shape), jnp.dtype(array.dtype).name)
        for name, array in param.arrays.items()
    }
    return dataclasses.replace(param, arrays=arrays)


def value_of(param: StoredParam) -> Any:
    """The value of a param in a tree."""
    if param.qtype is None:
        value = param.arrays["value"]
    elif param.layout is not None:
        value = PackedQArray(
            **{"zero_point": None, **param.arrays}, layout=param.layout
        )
    else:
        value = QArray(**param.arrays, qtype=param.qtype)
    return value if param.how is None else WithAux(value, param.how)


def encode(param: StoredParam) -> tuple[dict[str, Any], StoredParam, Any]:
    """Packs the arrays of a param.

    Returns:
        The arrays to store; what the manifest says of the param, without checksums; and
        whether the codes are those of their type, and whether the scales are finite
        and not negative, each as an array of one boolean.
    """
    encoded, records = {}, {}
    codes_sound, scales_sound = np.True_, np.True_
    for name, record in described(param).arrays.items():
        array = param.arrays[name]
        packed_as = _PACKED_AS.get(record.dtype)
        if name == "qvalue" and numerics.qtype_bits(param.qtype) < 8:
            packed_as = param.qtype
        if packed_as is not None:
            array, axis = _packable(array, packed_as)
            packed = packing.pack(array, packed_as, axis)
            if _PACKED_AS.get(record.dtype) != packed_as:
                # The dtype holds more than the type does: nothing may get lost.
                back = packing.unpack(packed, packed_as, array.shape[axis], axis)
                codes_sound = jnp.all(back.astype(array.dtype) == array)
            array = packed
            record = dataclasses.replace(record, packed_as=packed_as, axis=axis)
        elif param.qtype is not None and name in _SCALES:
            scales_sound = scales_sound & _are_scales(array)
        encoded[name], records[name] = array, record
    record = dataclasses.replace(param, arrays=records)
    return encoded, record, (codes_sound, scales_sound)


@jax.jit
def _are_scales(array: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(array) & (array >= 0))


def _packable(array: Any, packed_as: str) -> tuple[jax.Array, int]:
    """The codes with a rank of 1 or more, and the axis along which to pack them."""
    array = jnp.asarray(array)
    array = array.reshape(array.shape or (1,))
    axis = packing.packing_axis(array.shape, packed_as, array.sharding)
    if axis is None:
        # Every axis is cut into pieces that hold no whole groups: a small array.
        everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())  # pyright: ignore
        array = jax.device_put(array, everywhere)
        axis = packing.packing_axis(array.shape, packed_as)
    assert axis is not None
    return array, axis


def stored_struct(record: StoredArray, target: Sharding) -> jax.ShapeDtypeStruct:
    """The array as it is stored, sharded as the target says where packing allows it."""
    if record.packed_as is None:
        return jax.ShapeDtypeStruct(record.shape, record.dtype, sharding=target)
    shape, axis = record.shape or (1,), record.axis
    assert axis is not None
    packed = packing.packed_shape(shape, record.packed_as, axis)
    count = packing.group_size(record.packed_as)
    if isinstance(target, NamedSharding) and not packing.fits_shards(
        shape, count, axis, target
    ):
        spec = [*target.spec, *[None] * len(shape)][: len(shape)]
        spec[axis] = None
        target = _with_spec(target, spec)
    return jax.ShapeDtypeStruct(packed, jnp.uint8, sharding=target)


def decode(array: jax.Array, record: StoredArray, target: Sharding) -> jax.Array:
    """The array that is stored in such a form, sharded as the target says."""
    if record.packed_as is None:
        return array
    shape, axis = record.shape or (1,), record.axis
    assert axis is not None
    codes = packing.unpack(array, record.packed_as, shape[axis], axis)
    return jax.device_put(codes.reshape(record.shape).astype(record.dtype), target)


def shardings_of(param: StoredParam, given: Any) -> dict[str, Sharding]:
    """How the arrays of a param are to be sharded.

    Args:
        param: The param.
        given: A sharding for the param; a `QArray`, `PackedQArray` or `WithAux` of
            shardings or abstract arrays, or None for where JAX puts new arrays. Scales
            and zero points that have none of their own are sharded as the codes are,
            but not along axes where they have too few entries.

    Raises:
        ValueError: The sharding does not divide the param; the message names both.
    """
    given = stored.unbox(given)
    given = given.array if isinstance(given, WithAux) else given
    if isinstance(given, QArray | PackedQArray):
        own = {name: _concrete(getattr(given, name)) for name in param.arrays}
    else:
        own = dict.fromkeys(param.arrays)
    base = own[param.codes] or _concrete(given)
    if base is None:
        # The default device or, under `jax.set_mesh`, all of the mesh: JAX refuses to
        # compute there with arrays that are elsewhere.
        base = jnp.zeros(()).sharding
    try:
        shards = base.shard_shape(param.shape)
    except ValueError as error:
        raise ValueError(
            f"Param {param.name!r} of shape {param.shape} cannot be sharded as {base}: "
            f"{error}"
        ) from None
    pieces = [n // s if s else 1 for n, s in zip(param.shape, shards, strict=True)]
    named = {}
    if param.layout is not None:
        # They have the axes of layers alone, and one of their own.
        layers = len(param.arrays["scale_mean"].shape)
        named = {"scale_steps": layers, "scale_mean": layers}
    return {
        name: own[name]
        or _alike(base, array.shape, pieces, named.get(name, len(pieces)))
        for name, array in param.arrays.items()
    }


def _concrete(given: Any) -> Sharding | None:
    sharding = (
        given if isinstance(given, Sharding) else getattr(given, "sharding", None)
    )
    # Under `jax.set_mesh`, `eval_shape` gives meshes without devices.
    mesh = getattr(sharding, "mesh", None)
    return None if isinstance(mesh, AbstractMesh) else sharding


def _alike(
    base: Sharding, shape: tuple[int, ...], pieces: list[int], named: int
) -> Sharding:
    """The sharding of a part whose first axes are so many of those of the codes."""
    if not isinstance(base, NamedSharding):
        return base
    spec = [*base.spec, *[None] * len(shape)][:named]
    spec = [*spec, *[None] * (len(shape) - len(spec))]
    pieces = [*pieces[:named], *[1] * len(shape)][: len(shape)]
    return _with_spec(
        base,
        [
            None if n % count else entry
            for n, count, entry in zip(shape, pieces, spec, strict=True)
        ],
    )


def _with_spec(base: NamedSharding, spec: list[Any]) -> NamedSharding:
    return NamedSharding(base.mesh, PartitionSpec(*spec), memory_kind=base.memory_kind)
