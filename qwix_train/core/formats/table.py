"""The table of types, as `docs/formats.md` has it."""

from qwix_train.core.formats.format import BUILT_IN, Format
from qwix_train.core.formats.scales import Scales
from qwix_train.core.formats.small_floats import SmallFloat

_HEADER = (
    "type",
    "values",
    "stored as",
    "block",
    "scales",
    "bits a value",
    "zero points, trained scales",
    "static ranges",
    "two in a byte",
    "source",
)


def table() -> str:
    """Returns the types that rules may ask for, as a table in Markdown.

    Variants whose scales are rounded down, and tables that were registered, are left
    out.
    """
    known = [entry for entry in BUILT_IN if entry.scales is not Scales.POWER_DOWN]
    rows = [_HEADER, ["---"] * len(_HEADER), *map(_row, known)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(entry: Format) -> list[str]:
    names = ", ".join(f"`{name}`" for name in (entry.name, *entry.aliases))
    plain = entry.scales is Scales.PLAIN

    def yes(holds: bool) -> str:
        return "yes" if holds else ""

    return [
        names,
        _values(entry),
        str(entry.storage),
        str(entry.block or ""),
        entry.scales.value.partition(",")[0],
        f"{entry.bits_per_value:g}",
        yes(plain and entry.integers is not None),
        yes(plain),
        yes(entry.bits == 4),
        entry.source,
    ]


def _values(entry: Format) -> str:
    if entry.integers is not None:
        low, high, step = entry.integers
        return f"{low} to {high}" if step == 1 else f"{low}, {high}"
    if entry.table is not None:
        return f"{len(entry.table)} levels"
    kind = entry.elements
    assert isinstance(kind, SmallFloat)
    exponent = entry.bits - 1 - kind.mantissa
    return f"E{exponent}M{kind.mantissa}, to {kind.largest:g}"
