"""Pages of the documentation, made of what benchmarks wrote.

    python -m benchmarks.pages benchmarks/out/formats.json    # takes a run, makes pages
    python -m benchmarks.pages                                # makes all pages anew
    python -m benchmarks.pages --check                        # fails where one is old

What is taken lies in `docs/benchmarks/results/`; for each file there is a page of the
same name, and pictures, for light and for dark. A test compares pages with results.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwix_train.files import json_text

PAGES = pathlib.Path(__file__).parents[1] / "docs" / "benchmarks"
RESULTS = PAGES / "results"
# For each scheme of the site the colors of text, grid and bars.
SCHEMES = {
    "light": ("#1f2328", "#d0d7de", ("#4051b5", "#e8710a", "#1b9e77", "#a6329b")),
    "dark": ("#e6edf3", "#3d444d", ("#8c9eff", "#ffb74d", "#66d9b8", "#e38ad9")),
}
_MILLISECONDS = {"us": 1e-3, "s": 1e3}
_NUMBER = re.compile(r"-?[\d,]*\.?\d+")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of some columns of a table: a group of bars for each row.

    Attributes:
        columns: The columns.
        label: What their numbers are.
        rows: A regular expression for the rows that are shown.
        names: How many columns at the left name a row.
    """

    columns: tuple[str, ...]
    label: str
    rows: str = ".*"
    names: int = 1


_THREE = ("float32", "qwix_train", "qwix")
_STEPS = Picture(("float", "qwix_train", "qwix"), "ms", "cold trace|warm trace|step")
# For each benchmark the tables that are looked at rather than read, by title.
PICTURES: dict[str, dict[str, Picture]] = {
    "qat_step": {
        "transformer, 4 layers, d=256, 8x128 tokens, float32": _STEPS,
        "ResNet, 15 convolutions, width 32, 32 images of 32x32, float32": _STEPS,
    },
    "ptq": {
        "layers": Picture(_THREE, "ms for a product (layer, rows)", ".*4096, .*", 2),
        "model": Picture(_THREE, "ms for a forward (type, tokens)", names=2),
    },
    "decode": {
        "loop": Picture(_THREE, "ms for a token (type, rows)", names=2),
    },
    "formats": {
        "error": Picture(("qwix_train, 1", "qwix, 1"), "error of normal numbers in %"),
        "encode": Picture(("qwix_train", "qwix"), "ms to quantize a matrix"),
        "model": Picture(("PTQ", "GPTQ", "QAT"), "loss, bits a byte"),
    },
}


def page(name: str, report: Mapping[str, Any]) -> str:
    """The page of a benchmark.

    Args:
        name: The name of its module.
        report: What it wrote.
    """
    module = importlib.import_module(f"benchmarks.{name}")
    said = (module.__doc__ or "").strip()
    title, _, about = said.partition("\n\n")
    options = report["options"]
    # Code and options of the docstring stand in the source.
    prose = [
        p for p in about.split("\n\n") if p and not p.startswith(("    ", "python"))
    ]
    facts = "; ".join(f"{key}: {value}" for key, value in report["machine"].items())
    given = "; ".join(
        f"{option.replace('_', '-')}: {value}" for option, value in options.items()
    )
    quick = " --quick" if options.get("quick") else ""
    lines = [
        "<!-- Made by `python -m benchmarks.pages`; do not edit. -->",
        f"# {title.rstrip('.')}",
        *prose,
        f"`python -m benchmarks.{name}{quick}` ran on this machine ({facts}). A load "
        "above the number of cores means that other work ran beside it. Then compare "
        "the columns of a line, and no times of two runs.",
        f"Its options: {given}.",
    ]
    if quick:
        lines.append(
            "This is the quick run, of small models and few rounds. It shows that the "
            "benchmark works, and the order of the numbers."
        )
    for title, table in report["tables"].items():
        lines.append(f"## {title[0].upper()}{title[1:]}")
        if title in PICTURES.get(name, {}):
            files = [picture_file(name, title, scheme) for scheme in SCHEMES]
            lines.append(
                "\n".join(
                    f"![{title}: {PICTURES[name][title].label}]({file}#only-{scheme})"
                    for scheme, file in zip(SCHEMES, files, strict=True)
                )
            )
        lines.append(table)
    return "\n\n".join(lines) + "\n"


def picture_file(name: str, title: str, scheme: str) -> str:
    """The file of a picture, beside its page."""
    return f"{name}_{re.sub(r'[^a-z0-9]+', '_', title.lower())}_{scheme}.svg"


def cells(table: str) -> list[list[str]]:
    r"""The cells of a table in Markdown, its head first.

    >>> cells("| a | b |\n| - | -: |\n| x | 1.5 ms |")
    [['a', 'b'], ['x', '1.5 ms']]
    """
    head, _, *body = table.strip().split("\n")
    return [[x.strip() for x in line.strip("|").split("|")] for line in (head, *body)]


def draw(table: str, picture: Picture, scheme: str) -> Any:
    """The figure of a table."""
    from matplotlib import figure as figures

    text, grid, colors = SCHEMES[scheme]
    head, *body = cells(table)
    named = [(", ".join(row[: picture.names]), row) for row in body]
    named = [(name, row) for name, row in named if re.fullmatch(picture.rows, name)]
    names, rows = [name for name, _ in named], [row for _, row in named]
    columns = [column for column in picture.columns if column in head]
    size = (7, 1.2 + 0.13 * len(rows) * (len(columns) + 1))
    figure = figures.Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(columns)
    for index, column in enumerate(columns):
        values = [_number(row[head.index(column)]) for row in rows]
        places = [
            y + height * (index - (len(columns) - 1) / 2) for y in range(len(rows))
        ]
        axes.barh(places, values, height, label=column, color=colors[index])
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlabel(picture.label, color=text)
    axes.tick_params(colors=text)
    axes.grid(axis="x", color=grid)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, labelcolor=text)
    return figure


def _number(cell: str) -> float:
    """The number in a cell. Times are in ms, and a cell without a number is 0."""
    found = _NUMBER.search(cell)
    if found is None:
        return 0.0
    unit = cell[found.end() :].strip()
    return float(found[0].replace(",", "")) * _MILLISECONDS.get(unit, 1)


def reports() -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each benchmark that has results, and what it wrote."""
    for file in sorted(RESULTS.glob("*.json")):
        yield file.stem, json_text.read(file)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=pathlib.Path, help="what to take")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for run in options.runs:
        shutil.copy(run, RESULTS / run.name)
    old = [
        name
        for name, report in reports()
        if not (file := PAGES / f"{name}.md").exists()
        or file.read_text("utf-8") != page(name, report)
    ]
    if options.check:
        print("\n".join(f"docs/benchmarks/{name}.md is old" for name in old))
        return 1 if old else 0
    import matplotlib

    # The same picture has the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": "qwix_train", "svg.fonttype": "none"})
    for name, report in reports():
        (PAGES / f"{name}.md").write_text(page(name, report), "utf-8")
        for title, picture in PICTURES.get(name, {}).items():
            for scheme in SCHEMES if title in report["tables"] else ():
                figure = draw(report["tables"][title], picture, scheme)
                figure.savefig(
                    PAGES / picture_file(name, title, scheme),
                    transparent=True,
                    metadata={"Date": None},
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
