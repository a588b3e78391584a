"""The arrays of params as a tree that Orbax writes and reads."""

from __future__ import annotations

import dataclasses
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from flax import traverse_util
from jax.sharding import Sharding

from qwix_train.planning import table as plan_table
from qwix_train.ptq import stored_arrays
from qwix_train.ptq.checksum import checksum
from qwix_train.ptq.manifest import StoredParam, TreePath, path_name

ITEM = "arrays"
"""The name of the tree among the items of a checkpoint."""

_LONGEST = 50_000
"""How long a path may be; TensorStore takes keys of less than 2**16 bytes."""

ArrayKey = tuple[TreePath, str]
"""The path of a param, and the name of one of its arrays."""


def encode(
    params: Sequence[StoredParam],
) -> tuple[dict[str, Any], tuple[StoredParam, ...]]:
    """Packs params.

    Args:
        params: The params, with their arrays.

    Returns:
        The arrays to store, as nested dicts, and the records of the params.

    Raises:
        ValueError: A param cannot be stored; the message names it.
    """
    for param in params:
        if any(0 in array.shape for array in param.arrays.values()):
            raise ValueError(
                f"Param {param.name!r} has no elements, which Orbax does not "
                "store. Leave it out."
            )
        if len("".join(_keys((param.path, "")))) > _LONGEST:
            raise ValueError(
                f"Param {param.name[:40]!r}... has a path of more than "
                f"{_LONGEST} characters, which Orbax does not store."
            )
    encoded = [stored_arrays.encode(param) for param in params]
    sums = [{k: checksum(a) for k, a in arrays.items()} for arrays, _, _ in encoded]
    # One transfer for all, so that devices do not wait for the host in between.
    sums, sound = jax.device_get((sums, [ok for _, _, ok in encoded]))
    faults = {
        "Codes are outside of the range of their type": [codes for codes, _ in sound],
        "Scales are not finite, or negative,": [scales for _, scales in sound],
    }
    for fault, each in faults.items():
        bad = [param for param, ok in zip(params, each, strict=True) if not ok]
        if bad:
            names = [f"{param.name} ({param.qtype})" for param in bad]
            raise ValueError(f"{fault} in: {plan_table.some(names, 3)}.")
    tree, records = {}, []
    for (arrays, record, _), own in zip(encoded, sums, strict=True):
        tree |= {_keys((record.path, name)): array for name, array in arrays.items()}
        parts = {
            name: dataclasses.replace(part, checksum=_text(own[name]))
            for name, part in record.arrays.items()
        }
        records.append(dataclasses.replace(record, arrays=parts))
    return traverse_util.unflatten_dict(tree), tuple(records)


def read(
    path: epath.Path,
    params: Sequence[StoredParam],
    targets: Mapping[TreePath, Mapping[str, Sharding]],
) -> dict[ArrayKey, jax.Array]:
    """Reads the arrays of params and verifies their checksums.

    Args:
        path: The folder of the checkpoint.
        params: The records of the params.
        targets: How each array is to be sharded.

    Returns:
        The arrays as they are stored.

    Raises:
        ValueError: The message names the params that are damaged.
    """
    structs = {
        (param.path, name): stored_arrays.stored_struct(
            record, targets[param.path][name]
        )
        for param in params
        for name, record in param.arrays.items()
    }
    try:
        arrays = _read_arrays(path, structs)
    except Exception as error:
        # Orbax does not say which arrays it could not read.
        bad = [path_name(w[0]) for w in structs if not _reads(path, w, structs[w])]
        raise ValueError(_damaged(path, bad, "cannot be read")) from error
    sums = jax.device_get({where: checksum(array) for where, array in arrays.items()})
    bad = [
        param.name
        for param in params
        for name, record in param.arrays.items()
        if _text(sums[param.path, name]) != record.checksum
    ]
    if bad:
        raise ValueError(_damaged(path, bad, "have another checksum"))
    return arrays


def _text(checksum_value: Any) -> str:
    return f"{int(checksum_value):08x}"


def _keys(key: ArrayKey) -> tuple[str, ...]:
    """The keys of an array in the tree.

    Orbax joins them by dots, and they become parts of file names.
    """
    path, name = key
    quoted = (urllib.parse.quote(str(k), safe="").replace(".", "%2E") for k in path)
    return (*quoted, name)


def _read_arrays(
    path: epath.Path, structs: Mapping[ArrayKey, jax.ShapeDtypeStruct]
) -> dict[ArrayKey, jax.Array]:
    # Late, as the import takes long, and models in memory do not need it.
    import orbax.checkpoint as ocp

    item = {_keys(key): struct for key, struct in structs.items()}
    args = {
        where: ocp.ArrayRestoreArgs(sharding=s.sharding, dtype=s.dtype, shape=s.shape)
        for where, s in item.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(
            path / ITEM,
            args=ocp.args.PyTreeRestore(
                item=traverse_util.unflatten_dict(item),
                restore_args=traverse_util.unflatten_dict(args),
                partial_restore=True,
            ),
        )
    flat: Any = traverse_util.flatten_dict(tree)
    arrays = {where: flat[_keys(where)] for where in structs}
    # In place of an array that the checkpoint lacks Orbax leaves what was asked for.
    if not all(isinstance(array, jax.Array) for array in arrays.values()):
        raise ValueError("they are missing")
    return arrays


def _reads(path: epath.Path, where: ArrayKey, struct: Any) -> bool:
    try:
        _read_arrays(path, {where: struct})
    except Exception:
        return False
    return True


def _damaged(path: epath.Path, bad: Sequence[str], reason: str) -> str:
    names = plan_table.some(list(dict.fromkeys(bad)), 3) or "(one of them)"
    return f"The checkpoint at {path} is damaged: the arrays of {names} {reason}."
