"""The plan as text, as HTML, and as records."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from qwix_train.files.text_table import aligned
from qwix_train.planning.leaves import Leaf

if TYPE_CHECKING:
    from qwix_train.core.how import HowToQuantize
    from qwix_train.planning.plan import OpPlan, ParamPlan, Plan
    from qwix_train.planning.rule_use import RuleUse

_NOTE_WIDTH = 80
"""Longer notes stand below the table, so that its rows keep their width."""

_COLORS = {
    "int8": "rgba(60, 120, 216, 0.25)",
    "int16": "rgba(60, 120, 216, 0.12)",
    "int4": "rgba(56, 158, 74, 0.28)",
    "nf4": "rgba(0, 150, 160, 0.28)",
    "float8": "rgba(150, 90, 200, 0.25)",
    "fewer bits": "rgba(230, 130, 30, 0.30)",
}
"""Of the cells of a type, in HTML."""


def record(plan: OpPlan, params: Sequence[ParamPlan]) -> dict[str, Any]:
    """One op as a dictionary of plain values."""
    op = plan.op
    acts = [how for how in plan.activations if how is not None]
    whole = params[0] if params else None
    return {
        "module_path": op.module_path,
        "op": op.id,
        "shapes": tuple(operand.shape for operand in op.operands[:2]),
        "weights": tuple("/".join(path) for path in plan.weights),
        "weight_qtype": str(whole.how.qtype) if whole and whole.how else None,
        "weight_granularity": granularity(whole.how) if whole else None,
        "act_qtype": str(acts[0].qtype) if acts else None,
        "act_granularity": granularity(acts[0]) if acts else None,
        "act_static_scale": plan.static,
        "rule": plan.rule_index,
        "quantized": plan.quantized,
        "product": plan.product,
        "reason": plan.reason,
    }


def granularity(how: HowToQuantize | None) -> str:
    """Which axes have scales of their own."""
    if how is None:
        return "float"
    parts = []
    if how.channelwise_axes:
        parts.append("channel " + ",".join(map(str, how.channelwise_axes)))
    parts += [f"tile {axis}:{tile}" for axis, tile in how.tiled_axes.items()]
    return " ".join(parts) or "tensor"


def table(plan: Plan) -> str:
    """The plan as a table of ops, followed by its summary."""
    return "\n".join([of_records(plan.records()), "", *_summary(plan)])


def of_records(records: Sequence[Mapping[str, Any]]) -> str:
    """Records of ops as a table; long notes stand below it.

    Args:
      records: those of `Plan.records`, which may have been through JSON.
    """
    notes: dict[str, int] = {}
    header, *rows = _rows(records)
    rows = [[*row[:-1], _cited(row[-1], notes)] for row in rows]
    lines = aligned([header, *rows]).split("\n")
    width = max(map(len, lines))
    for note, number in notes.items():
        lines += ["", *textwrap.wrap(f"({number}) {note}", width)]
    return "\n".join(lines)


def html(plan: Plan) -> str:
    """The plan as an HTML table with a color for each type, and its summary."""
    header, *rows = _rows(plan.records())
    lines = ["<table>", f"<tr>{''.join(f'<th>{name}</th>' for name in header)}</tr>"]
    for row in rows:
        cells = [_cell(name, text) for name, text in zip(header, row, strict=True)]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    summary = "<br>".join(escape(line) for line in _summary(plan))
    return "\n".join([*lines, "</table>", f"<p>{summary}</p>"])


def _cell(column: str, text: str) -> str:
    color = _color(text.split(" ")[0]) if column in ("type", "act") else ""
    style = f' style="background: {color}"' if color else ""
    return f"<td{style}>{escape(text)}</td>"


def _color(qtype: str) -> str:
    """The color of a type; none for floats. It shows on light and dark pages."""
    if qtype == "float":
        return ""
    family = "float8" if qtype.startswith("float8") else qtype.removesuffix("_narrow")
    return _COLORS.get(family, _COLORS["fewer bits"])


def _rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of the table, its header first and the note last."""
    # LiteRT's plans have names of ranges, too, and those of PTQ forms of products.
    more = [key for key in ("range", "product") if any(x.get(key) for x in records)]
    rows = [["module", "op", "shapes", "weight", "type", "act", *more, "rule", "note"]]
    for entry in records:
        weight, act = entry["weight_qtype"], entry["act_qtype"]
        static = " static" if entry["act_static_scale"] else ""
        rows.append(
            [
                entry["module_path"] or "(root)",
                entry["op"],
                " x ".join(_shape(shape) for shape in entry["shapes"]),
                ", ".join(entry["weights"]) or "-",
                f"{weight} {entry['weight_granularity']}" if weight else "float",
                f"{act} {entry['act_granularity']}{static}" if act else "float",
                *(entry[key] or "-" for key in more),
                "-" if entry["rule"] is None else str(entry["rule"]),
                entry["reason"],
            ]
        )
    return rows


def _cited(note: str, notes: dict[str, int]) -> str:
    """A note that is short; the number of one that goes below the table."""
    if len(note) <= _NOTE_WIDTH:
        return note
    return f"({notes.setdefault(note, len(notes) + 1)})"


def _summary(plan: Plan) -> list[str]:
    before, after = plan.float_bytes, plan.quantized_bytes
    lines = [
        f"{len(plan.quantized_ops)} of {len(plan.ops)} ops quantized; params "
        f"{size(before)} -> {size(after)}"
        + (f" ({before / after:.2f}x smaller)" if after else "")
    ]
    # Biases and norm scales are expected to stay in float; matrices are not, and a
    # matrix that reaches its product as no weight (masked by an input, say) shows
    # in no row of the table. Leaves beside params, such as learned scales, are not the
    # model's.
    matrices = [
        "/".join(param.path)
        for param in plan.params.values()
        if param.how is None
        and param.is_matrix
        and Leaf.parse(param.path, plan.params) is None
    ]
    if matrices:
        lines.append(f"params of two axes or more that stay in float: {some(matrices)}")
    for path, primitives in plan.dequantized.items():
        lines.append(
            f"{path} is dequantized for what has no quantized form: "
            f"{', '.join(primitives)}"
        )
    for number, path, name, _ in plan.requests:
        rule = "no rule matches" if number is None else f"rule {number}"
        lines.append(f"a kernel in {path or '(root)'} asked for {name}: {rule}")
    unexpected = [i for i in plan.unused_rules if not plan.is_default(i)]
    return lines + [unused(plan, index) for index in unexpected]


def unused(plan: RuleUse, index: int) -> str:
    """Says why a rule decided for no op."""
    rule = plan.rules[index]
    said = f"rule {index} (module_path={rule.module_path!r}"
    if earlier := plan.shadowed_by(index):
        taken = " and ".join(f"rule {i}" for i in earlier)
        return f"{said}) has no effect: {taken} came first for all that it matches"
    if there := plan.at_module_paths(index):
        names = tuple(rule.op_names)
        return f"{said}, op_names={names}) matches no op; ops there: {some(there)}"
    near = plan.near_misses(index) or list(plan.module_paths[:5])
    exist = ", ".join(map(repr, near))
    return f"{said}) matches no op; module paths that exist: {exist}"


def some(names: Sequence[str], most: int = 8) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "(" + ",".join(map(str, shape)) + ")"


def size(count: float) -> str:
    """A number of bytes as text."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count = count / 1024
    return f"{count:.4g} GiB"
