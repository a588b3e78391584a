"""What the build of the site does to docstrings before it renders them as Markdown."""

import re
import textwrap
from typing import Any

import griffe
from latex2mathml import converter

_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
# An example that has no heading: paragraphs that begin with a prompt, at the margin.
_BARE = re.compile(r"(?:^>>> .*(?:\n.+)*(?:\n\n|\n?\Z))+", re.MULTILINE)
_FORMULA = re.compile(r"^( *)\.\. math::((?:.*\n?(?:\1 +\S.*(?:\n|$))*))", re.MULTILINE)
_INLINE = re.compile(r":math:`([^`]*)`")


class Docstrings(griffe.Extension):
    """Makes sections of examples, and MathML, which browsers show without a script."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of an object when it is collected."""
        if obj.docstring:
            text = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            text = _BARE.sub(_section, text)
            text = _FORMULA.sub(_block, text)
            obj.docstring.value = _INLINE.sub(_inline, text)


def _section(match: re.Match[str]) -> str:
    return f"Examples:\n{textwrap.indent(match[0].rstrip(), '    ')}\n\n"


def _block(match: re.Match[str]) -> str:
    indent, lines = match.groups()
    formula = textwrap.dedent(lines).strip()
    if r"\begin" not in formula and r"\\" in formula:
        formula = rf"\begin{{align}}{formula}\end{{align}}"
    return f"{indent}{_one_line(formula, 'block')}\n\n"


def _inline(match: re.Match[str]) -> str:
    return _one_line(match[1], "inline")


def _one_line(formula: str, display: str) -> str:
    formula = " ".join(formula.split())
    return converter.convert(formula, display=display).replace("\n", " ")
