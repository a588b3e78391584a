"""The types that arrays are quantized to: one entry of a table for each.

A *code* is what is stored for a value. Dividing a value by its scale (and adding the
zero point) gives the *scaled value*, which is rounded to what the nearest code stands
for.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qwix_train.core.formats import levels
from qwix_train.core.formats.scales import Scales
from qwix_train.core.formats.small_floats import SmallFloat


class Integers(NamedTuple):
    """Codes that are whole numbers, from the lowest to the highest, so far apart."""

    low: int
    high: int
    step: int = 1


@dataclasses.dataclass(frozen=True)
class Format:
    """What the library knows of a type.

    Attributes:
        name: Its name.
        bits: The bits of a code where codes are packed.
        storage: The dtype of an array of codes.
        bound: The largest scaled magnitude of a range that is centered at zero.
        elements: What the codes stand for. `Integers`: the codes are the numbers. A
            `SmallFloat`: the codes are its values, or its bits if they are stored in an
            unsigned dtype. A table of levels: the codes are places in it.
        block: The elements that share a scale, where the type says how many.
        scales: How these are stored.
        method: What the calibration method ``absmax`` stands for.
        source: Where the type is defined.
        aliases: Other names.
    """

    name: str
    bits: int
    storage: np.dtype
    bound: float
    elements: Integers | SmallFloat | levels.Table
    block: int | None = None
    scales: Scales = Scales.PLAIN
    method: str = "absmax"
    source: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def integers(self) -> Integers | None:
        """The lowest and the highest code, if codes are whole numbers."""
        return self.elements if isinstance(self.elements, Integers) else None

    @property
    def table(self) -> levels.Table | None:
        """The levels, if codes are places in a table."""
        named = isinstance(self.elements, Integers | SmallFloat)
        return None if named else self.elements  # pyright: ignore

    @property
    def has_bits(self) -> bool:
        """Whether the codes are the bits of small floats."""
        is_float = isinstance(self.elements, SmallFloat)
        return is_float and jnp.issubdtype(self.storage, jnp.integer)

    @property
    def has_values(self) -> bool:
        """Whether codes are the numbers that they stand for, and can be multiplied."""
        return self.table is None and not self.has_bits

    @property
    def one(self) -> int | None:
        """The code that stands for 1; None if the type cannot hold 1."""
        if self.table is not None:
            return self.table.index(1) if 1 in self.table else None
        if isinstance(self.elements, SmallFloat) and self.has_bits:
            return (1 - self.elements.lowest) << self.elements.mantissa
        return 1

    @property
    def coded_scales(self) -> bool:
        """Whether scales are stored as codes."""
        return self.scales is not Scales.PLAIN

    @property
    def levels(self) -> np.ndarray:
        """All values that codes stand for, in order, float64."""
        if self.integers is not None:
            low, high, step = self.integers
            return np.arange(low, high + 1.0, step)
        if self.table is not None:
            return np.array(self.table)
        kind = self.elements
        assert isinstance(kind, SmallFloat)
        values = np.arange(2 ** (kind.mantissa + 1)) * 2.0 ** (
            kind.lowest - kind.mantissa
        )
        while values[-1] < kind.largest:
            binade = 2 * values[-(2**kind.mantissa) :]
            values = np.concatenate([values, binade])
        values = values[values <= kind.largest]
        return np.concatenate([-values[:0:-1], values])

    @property
    def bits_per_value(self) -> float:
        """The bits of a value with its share of the scale of a block.

        Scales of a whole tensor, and those that are floats, are not counted.
        """
        return self.bits + (8 / self.block if self.block else 0)


def _integer(bits: int) -> Format:
    high = 2 ** (bits - 1) - 1
    bound, codes = (high + 0.5, (-high - 1, high)) if bits > 1 else (2.0, (-1, 1, 2))
    storage = jnp.dtype(jnp.int4 if bits <= 4 else jnp.int8)
    return Format(f"int{bits}", bits, storage, bound, Integers(*codes))


def _narrow(bits: int, name: str, **fields: Any) -> Format:
    high = 2 ** (bits - 1) - 1
    storage = jnp.dtype(jnp.int4 if bits <= 4 else jnp.int8)
    return Format(name, bits, storage, float(high), Integers(-high, high), **fields)


def _float(name: str, source: str) -> Format:
    dtype = jnp.dtype(name)
    kind = SmallFloat.of_dtype(dtype)
    return Format(name, 8, dtype, kind.largest, kind, source=source)


_OCP = "OCP Microscaling Formats v1.0"


def _microscaling(name: str, *aliases: str, **fields: Any) -> list[Format]:
    """A type with blocks of 32, and its variant with scales that are rounded down."""
    up = Format(
        name=name,
        block=32,
        scales=Scales.POWER_UP,
        source=_OCP,
        aliases=aliases,
        **fields,
    )
    down = dataclasses.replace(
        up,
        name=f"{name}_floor",
        scales=Scales.POWER_DOWN,
        aliases=tuple(f"{alias}_floor" for alias in aliases),
    )
    return [up, down]


def _of_float(bits: int, kind: SmallFloat, storage: Any) -> dict[str, Any]:
    storage = jnp.dtype(storage)
    return dict(bits=bits, storage=storage, bound=kind.largest, elements=kind)


def of_table(name: str, table: levels.Table, source: str = "") -> Format:
    """Returns the type whose codes are places in a table.

    Args:
        name: Its name.
        table: The levels, in ascending order.
        source: Where they are from.
    """
    bound = max(abs(table[0]), abs(table[-1]))
    storage = levels.storage(table)
    return Format(name, levels.bits(table), storage, bound, table, source=source)


_IEEE = "ml_dtypes, IEEE 754 style"
_FNUZ = "arXiv 2206.02915"
_OFP8 = "OCP OFP8 v1.0"
# JAX has no arrays of floats of 6 bits on a CPU, and XLA reads and writes those of 4
# bits there one by one, where it compiles them at all. So arrays hold their bits.
_E2M1 = _of_float(4, SmallFloat.of_dtype(jnp.float4_e2m1fn), jnp.uint4)
_E2M3 = _of_float(6, SmallFloat(3, 0, largest=7.5, has_nan=False), jnp.uint8)
_E3M2 = _of_float(6, SmallFloat(2, -2, largest=28.0, has_nan=False), jnp.uint8)
_E4M3, _E5M2 = (
    _of_float(8, SmallFloat.of_dtype(dtype), dtype)
    for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)
)

_ENTRIES = [
    *(_integer(bits) for bits in range(1, 9)),
    Format(
        "ternary",
        bits=2,
        storage=jnp.dtype(jnp.int4),
        bound=1.0,
        elements=Integers(-1, 1),
        method="absmean",
        source="BitNet b1.58, arXiv 2402.17764",
    ),
    _float("float8_e4m3fn", _OFP8),
    _float("float8_e5m2", _OFP8),
    _float("float8_e3m4", _IEEE),
    _float("float8_e4m3", _IEEE),
    _float("float8_e4m3b11fnuz", "arXiv 1909.05271"),
    _float("float8_e4m3fnuz", _FNUZ),
    _float("float8_e5m2fnuz", _FNUZ),
    Format("float4_e2m1fn", source=_OCP, **_E2M1),
    of_table("nf4", levels.NF4, "QLoRA, arXiv 2305.14314"),
    *_microscaling("mxfp8", "mxfp8_e4m3", **_E4M3),
    *_microscaling("mxfp8_e5m2", **_E5M2),
    *_microscaling("mxfp6", "mxfp6_e2m3", **_E2M3),
    *_microscaling("mxfp6_e3m2", **_E3M2),
    *_microscaling("mxfp4", **_E2M1),
    *_microscaling(
        "mxint8",
        bits=8,
        storage=jnp.dtype(jnp.int8),
        bound=127.0,
        elements=Integers(-127, 127),
    ),
    Format(
        name="nvfp4",
        block=16,
        scales=Scales.TWO_LEVELS,
        source="arXiv 2509.25149",
        **_E2M1,
    ),
    # Those of LiteRT's weights: no rule asks for them.
    *(_narrow(bits, f"int{bits}_narrow", source="LiteRT") for bits in (4, 8)),
]
BUILT_IN = tuple(entry for entry in _ENTRIES if not entry.name.endswith("_narrow"))
"""The types that rules may ask for, but for tables that were registered."""

_FORMATS: dict[str, Format] = {}


def _add(entry: Format) -> None:
    for name in (entry.name, *entry.aliases):
        _FORMATS[name] = entry


for _entry in _ENTRIES:
    _add(_entry)


def find(name: str) -> Format | None:
    """Returns the type with a name or alias; None if no type has it."""
    return _FORMATS.get(name)


def entries() -> tuple[Format, ...]:
    """Returns all types that rules may ask for."""
    known = dict.fromkeys(_FORMATS.values())
    return tuple(entry for entry in known if not entry.name.endswith("_narrow"))


def register_table(name: str, values: Any) -> None:
    """Adds a type whose codes are places in a table of levels, as those of nf4 are.

    Arrays keep the name alone: a program that reads a checkpoint of such a type
    registers it first, with the same levels.

    Args:
        name: Its name, for rules.
        values: From 2 to 256 levels, in ascending order; one of them must be 0. The
            range of an array is mapped to the largest magnitude among them.

    Raises:
        ValueError: The levels are no such table, or the name is that of another type.

    >>> from qwix_train import dequantize, quantize
    >>> register_table('quarters', [-1., -.5, -.25, 0., .25, .5, 1.])
    >>> dequantize(quantize(jnp.array([4., 1.2, -3.3]), 'quarters')).tolist()
    [4.0, 1.0, -4.0]
    """
    table = tuple(float(value) for value in np.asarray(values, np.float32))
    in_order = all(a < b for a, b in zip(table[:-1], table[1:], strict=True))
    if not (2 <= len(table) <= 256 and in_order and 0.0 in table):
        raise ValueError(
            f"The levels of {name!r} are {values!r}: give from 2 to 256 finite numbers "
            "in ascending order, and one of them must be 0."
        )
    if not np.isfinite(table).all():
        raise ValueError(f"The levels of {name!r} are not finite: {values!r}.")
    entry = of_table(name, table)
    if _FORMATS.get(name, entry) != entry:
        raise ValueError(f"There is another type {name!r}. Choose another name.")
    _add(entry)
