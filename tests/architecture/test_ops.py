"""The names of operations stand in `qwix_train/ops`, and nowhere else."""

import ast
import pathlib

import qwix_train
from qwix_train import ops

LIBRARY = pathlib.Path(qwix_train.__file__).parent
# Where else they may stand, and why.
OTHER_TABLES = {
    # What LiteRT has for each operation: rules for LiteRT are validated against it.
    "odml/ops.py",
}


def strings_in(path: pathlib.Path) -> set[str]:
    """The string constants of a file that are not docstrings."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docs
    }


def test_the_names_of_operations_stand_in_one_place():
    names = {name for kind in ops.KINDS for name in (kind.primitive, *kind.names)}
    assert {"dot_general", "einsum", "conv_general_dilated", "gather"} <= names
    found = {
        path.relative_to(LIBRARY).as_posix(): sorted(strings_in(path) & names)
        for path in LIBRARY.rglob("*.py")
    }
    elsewhere = {
        name: strings
        for name, strings in found.items()
        if strings and not name.startswith("ops/") and name not in OTHER_TABLES
    }
    assert not elsewhere
