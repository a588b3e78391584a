"""What stands beside the codes of quantized arrays, as values that JSON can hold.

Checkpoints keep it, and so do files of `jax.export`, whose inputs and outputs may be
trees with quantized arrays: `QArray`, `PackedQArray` and `WithAux` are registered for
`jax.export.Exported.serialize` here.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import export

from qwix_train.core import numerics, rotations
from qwix_train.core.how import HowToQuantize
from qwix_train.core.packed_array import PackedLayout, PackedQArray
from qwix_train.core.qarray import QArray, WithAux


def to_record(value: Any, cls: Any = None) -> dict[str, Any]:
    """The fields of a dataclass by name, as its constructor takes them.

    Args:
        value: Such as a `HowToQuantize` or a `PackedLayout`.
        cls: The class whose fields they are; that of the value if None.

    >>> to_record(HowToQuantize(qtype='nf4', tiled_axes={0: 32}))['tiled_axes']
    [[0, 32]]
    """
    fields = dataclasses.fields(type(value) if cls is None else cls)
    record = {field.name: getattr(value, field.name) for field in fields}
    # It took part in rounding, not in what codes mean.
    record.pop("noise_fn", None)
    if "tiled_axes" in record:
        # JSON has string keys.
        record["tiled_axes"] = [list(item) for item in value.tiled_axes.items()]
    for name in ("tile_size", "act_tile_size"):
        if isinstance(record.get(name), Mapping):
            record[name] = [list(item) for item in record[name].items()]
    if isinstance(value, HowToQuantize):
        record["rotation"] = rotations.to_record(value.rotation)
    if isinstance(value, PackedLayout):
        record["dtype"] = value.dtype.name
    for name, field in record.items():
        if name.endswith("qtype") and field is not None:
            record[name] = numerics.qtype_name(field)
    return record


def how_of_record(record: Mapping[str, Any]) -> HowToQuantize:
    """Reads what `to_record` gave for a `HowToQuantize`.

    >>> how = HowToQuantize(qtype='int4', tiled_axes={0: 0.5})
    >>> how_of_record(to_record(how)) == how
    True
    """
    own = {
        "tiled_axes": dict(record["tiled_axes"]),
        # Older records have none.
        "rotation": rotations.of_record(record.get("rotation")),
    }
    return HowToQuantize(**{**record, **own})


def _register() -> None:
    """Tells `jax.export` of what the trees of quantized arrays hold beside arrays."""

    def of_how(how: HowToQuantize, learned_as: Any) -> dict[str, Any]:
        del learned_as
        if how.noise_fn is not None:
            raise ValueError(
                f"A param quantized with noise_fn={how.noise_fn} cannot be serialized "
                "as the input of an exported function. Give it a `how` without one: "
                "dataclasses.replace(param.how, noise_fn=None)."
            )
        return to_record(how)

    def of_qarray(qtype: Any, float_dtype: Any) -> list[str | None]:
        dtype = None if float_dtype is None else float_dtype.name
        return [numerics.qtype_name(qtype), dtype]

    def to_qarray(record: Any) -> tuple[Any, Any]:
        # Older records have the type alone.
        qtype, dtype = (record, None) if isinstance(record, str) else record
        return numerics.canonical_qtype(qtype), dtype and np.dtype(dtype)

    # What each holds beside its arrays, written and read.
    classes = {
        QArray: (of_qarray, to_qarray),
        PackedQArray: (to_record, lambda record: (PackedLayout(**record),)),
        WithAux: (of_how, lambda record: (how_of_record(record),)),
    }
    for cls, (write, read) in classes.items():
        export.register_pytree_node_serialization(
            cls,
            serialized_name=f"qwix_train.{cls.__name__}",
            serialize_auxdata=lambda aux, w=write: json.dumps(w(*aux)).encode(),
            deserialize_auxdata=lambda data, r=read: r(json.loads(data)),
        )


_register()
