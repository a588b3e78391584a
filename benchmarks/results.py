"""What a benchmark hands over: a JSON file. `pages` makes a page from it.

A file holds the machine, its load, the date and the versions; the options; what was
measured; and the tables of that, in Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qwix_train.files import json_text


def run_sections(
    options: argparse.Namespace,
    sections: Mapping[str, tuple[Callable[..., Any], Callable[..., str]]],
) -> None:
    """Measures the sections that are asked for, prints tables, and writes a file.

    Args:
        options: The options, with `sections` and `out`; what measures takes them.
        sections: For each, what measures, and what makes a table of that.
    """
    facts = machine()
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    found, tables = {}, {}
    for name in options.sections:
        bench, shown = sections[name]
        found[name] = bench(options)
        tables[name] = shown(found[name])
        print(f"\n{name}\n\n{tables[name]}", flush=True)
    write(options, facts, found, tables)


def write(
    options: argparse.Namespace,
    facts: Mapping[str, str],
    found: Mapping[str, Any],
    tables: Mapping[str, str],
) -> None:
    """Writes what a benchmark measured.

    Args:
        options: The options, with `out`.
        facts: What `machine` said before it began.
        found: What was measured.
        tables: That as tables in Markdown, by their titles.
    """
    whole = {**facts, "load at the end": load()}
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    report = {"machine": whole, "options": asked, **found, "tables": tables}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    json_text.write(options.out, report, overwrite=True, default=str)
    print(f"\nWritten to {options.out}")


def machine() -> dict[str, str]:
    """What runs the benchmark, when, and what else runs there."""
    device = jax.devices()[0]
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "CPU cores": str(os.cpu_count()),
        "load at the start": load(),
        "python": platform.python_version(),
    }
    for package in ("jax", "flax", "qwix"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed: its column is left out"
    return facts


def load() -> str:
    """How many processes ran or waited, over the last five minutes."""
    return f"{os.getloadavg()[1]:.1f}"
