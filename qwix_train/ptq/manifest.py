"""What a checkpoint says about itself: its params, its rules, its versions.

The manifest is JSON. Each param's record has a checksum, and the whole has one, too. So
damage is noticed, and if a record is damaged, its param is named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax
import jax

from qwix_train.core import numerics
from qwix_train.core.how import HowToQuantize
from qwix_train.core.packed_array import PackedLayout
from qwix_train.core.records import how_of_record, to_record
from qwix_train.files import json_text
from qwix_train.planning.rules import QuantizationRule

FORMAT = "qwix_train quantized params"
VERSION = 1

TreePath = tuple[str | int, ...]
"""The path of a param in a tree of `to_tree`, whose lists have integers for keys."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array of a checkpoint.

    Attributes:
      shape: its shape in memory.
      dtype: the name of its dtype in memory.
      packed_as: the type as which it is packed, or None if it is stored as it is.
      axis: the axis along which it is packed.
      checksum: the checksum of what is stored, eight hexadecimal digits.
    """

    shape: tuple[int, ...]
    dtype: str
    packed_as: str | None = None
    axis: int | None = None
    checksum: str = ""


@dataclasses.dataclass(frozen=True)
class StoredParam:
    """One param of a checkpoint.

    Attributes:
      path: its path in the tree.
      arrays: its arrays by name: `qvalue`, `scale` and perhaps `zero_point` if it is
        quantized, else `value`. In a manifest each is a `StoredArray`; elsewhere it is
        the array itself, concrete or abstract.
      qtype: the type of the codes, or None if the param is not quantized.
      how: how it was quantized, without any noise function; None if the tree holds
        the array without a `WithAux`.
      layout: how the codes are packed in memory; None if they are not. With a layout,
        the arrays are those of a `PackedQArray`.
      float_dtype: the name of the dtype of the dequantized param, if scales are codes,
        which do not say it.
    """

    path: TreePath
    arrays: Mapping[str, Any]
    qtype: str | None = None
    how: HowToQuantize | None = None
    layout: PackedLayout | None = None
    float_dtype: str | None = None

    @property
    def name(self) -> str:
        """The path as text."""
        return path_name(self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the param."""
        shape = list(self.arrays[self.codes].shape)
        if self.layout is not None:
            shape[self.layout.axis] = self.layout.length
        return tuple(shape)

    @property
    def codes(self) -> str:
        """The name of the array that has an entry, or a packed one, per element."""
        if self.layout is not None:
            return "packed"
        return "qvalue" if self.qtype else "value"

    @property
    def dtype(self) -> str:
        """The name of the dtype of the (dequantized) param."""
        if self.layout is not None:
            return self.layout.dtype.name
        if self.float_dtype is not None:
            return self.float_dtype
        return self.arrays["scale" if self.qtype else "value"].dtype


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
      params: the params, in the order of the tree.
      rules: the rules that the params were quantized by.
      plan: the records of the plan, see `Plan.records`; None if no plan was given.
      versions: the version of each package that wrote it.
      metadata: what the caller of `save` added.

    Example:
      >>> manifest = Manifest((), (QuantizationRule(weight_qtype="int4"),))
      >>> Manifest.from_json(manifest.to_json()) == manifest
      True
    """

    params: tuple[StoredParam, ...]
    rules: tuple[QuantizationRule, ...] = ()
    plan: Sequence[Mapping[str, Any]] | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: _versions())
    metadata: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The manifest as values that JSON can hold.

        Raises:
          TypeError: if `plan` or `metadata` holds anything else.
          ValueError: if they are nested too deeply.
        """
        record = {
            "format": FORMAT,
            "version": VERSION,
            "versions": dict(self.versions),
            "rules": [rule_to_json(rule) for rule in self.rules],
            "plan": self.plan,
            "metadata": self.metadata,
            "params": [_sealed(param_to_json(param)) for param in self.params],
        }
        # Tuples become lists here, as they do in the file.
        text = json_text.dump(record, "the manifest, with its plan and metadata")
        return _sealed(json.loads(text))

    @classmethod
    def from_json(cls, record: Any) -> Manifest:
        """Reads the result of `to_json`.

        Raises:
          ValueError: if the record is not a manifest, or was changed. The message says
            what was changed, and in which params.
        """
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError("it is not one of this package's")
        if record.get("version") != VERSION:
            raise ValueError(
                f"it has format version {record.get('version')!r}, and this release "
                f"reads version {VERSION}: use the release that wrote it"
            )
        entries = record.get("params")
        entries = entries if isinstance(entries, list) else []
        changed = [entry for entry in entries if not _is_sealed(entry)]
        if changed:
            names = ", ".join(map(_name_in, changed))
            raise ValueError(f"the records of these params were changed: {names}")
        if not _is_sealed(record):
            raise ValueError("it was changed, though not in the record of a param")
        with readable(record.get("versions")):
            return cls(
                params=tuple(_param_from_json(entry) for entry in entries),
                rules=tuple(map(rule_from_json, record["rules"])),
                plan=record["plan"],
                versions=record["versions"],
                metadata=record["metadata"],
            )


@contextlib.contextmanager
def readable(versions: Any) -> Iterator[None]:
    """Says which release wrote a record whose entries this one does not know.

    Args:
      versions: the versions that the record has.

    Raises:
      ValueError: if an entry is missing, unknown, or of another type.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wrote = versions.get("qwix_train") if isinstance(versions, dict) else None
        raise ValueError(
            f"an entry of it is not as this release writes it "
            f"({type(error).__name__}: {error}); qwix_train {wrote} wrote it"
        ) from error


def path_name(path: TreePath) -> str:
    """The path of a param as text.

    Example:
      >>> path_name(("layers", 0, "kernel"))
      'layers/0/kernel'
    """
    return "/".join(map(str, path))


def rule_to_json(
    rule: QuantizationRule, cls: type[QuantizationRule] = QuantizationRule
) -> dict[str, Any]:
    """The fields of a class of rules, with the values that a rule has in them.

    Example:
      >>> rule = QuantizationRule(weight_qtype="int4")
      >>> rule_from_json(rule_to_json(rule)) == rule
      True
    """
    record = to_record(rule, cls)
    record.pop("schedule", None)  # It matters only in training.
    return record


def rule_from_json(
    record: Mapping[str, Any], cls: type[QuantizationRule] = QuantizationRule
) -> QuantizationRule:
    """Reads the result of `rule_to_json` for the fields of a class of rules."""
    # As dtypes, they equal both the names and the scalar types that a rule may have.
    qtypes = {
        name: numerics.canonical_qtype(value)
        for name, value in record.items()
        if name.endswith("qtype") and value is not None
    }
    tiles = {
        name: dict(record[name])
        for name in ("tile_size", "act_tile_size")
        if isinstance(record.get(name), list)
    }
    return cls(**{**record, **qtypes, **tiles})


def _versions() -> dict[str, str]:
    # Late, as elsewhere here: only files need it, and the import takes long.
    import orbax.checkpoint as ocp

    from_modules = {
        "jax": jax.__version__,
        "flax": flax.__version__,
        "orbax-checkpoint": ocp.__version__,
    }
    try:
        own = importlib.metadata.version("qwix_train")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"  # Imported from a checkout.
    return {"qwix_train": own, **from_modules}


def param_to_json(param: StoredParam) -> dict[str, Any]:
    """What a manifest says of a param, as values that JSON can hold."""
    return {
        "path": param.path,
        "shape": param.shape,
        "dtype": param.dtype,
        "qtype": param.qtype,
        "how": to_record(param.how) if param.how else None,
        "layout": to_record(param.layout) if param.layout else None,
        "float_dtype": param.float_dtype,
        "arrays": {k: dataclasses.asdict(a) for k, a in param.arrays.items()},
    }


def _param_from_json(record: Mapping[str, Any]) -> StoredParam:
    how = record["how"] and how_of_record(record["how"])
    layout = record["layout"] and PackedLayout(**record["layout"])
    arrays = {
        name: StoredArray(**{**fields, "shape": tuple(fields["shape"])})
        for name, fields in record["arrays"].items()
    }
    return StoredParam(
        tuple(record["path"]),
        arrays,
        record["qtype"],
        how,
        layout,
        record.get("float_dtype"),  # Older records have none.
    )


def _name_in(record: Any) -> str:
    path = record.get("path") if isinstance(record, dict) else None
    return path_name(tuple(path)) if isinstance(path, list) else "(one without path)"


def _seal(record: Mapping[str, Any]) -> str:
    body = {key: value for key, value in record.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "sha256": _seal(record)}


def _is_sealed(record: Any) -> bool:
    return isinstance(record, dict) and record.get("sha256") == _seal(record)
