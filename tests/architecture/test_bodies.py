"""Which equations have bodies is decided in one module."""

import ast
import pathlib

import pytest

import qwix_train

LIBRARY = pathlib.Path(qwix_train.__file__).parent
ALLOWED = ("trace/bodies.py", "trace/jax_versions.py")
PRIMITIVES = frozenset(
    """checkpoint closed_call cond core_call custom_jvp_call custom_vjp_call
    custom_vjp_call_jaxpr eval_jaxpr jit pjit remat remat2 scan shard_map
    while""".split()
)
# How the parameters of such equations are named.
PARAMETERS = frozenset(
    """body_jaxpr body_nconsts branches call_jaxpr cond_jaxpr cond_nconsts ft_in jaxpr
    num_carry num_consts""".split()
)
MODULES = sorted(LIBRARY.rglob("*.py"))


def strings(source):
    """The string constants of a module, with their lines."""
    return [
        (node.value, node.lineno)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_a_string_is_found_wherever_it_stands():
    source = (
        '"""scan"""\nif name in {"while"}:\n    match name:\n        case "cond": x()'
    )
    assert sorted(strings(source)) == [("cond", 4), ("scan", 1), ("while", 2)]


@pytest.mark.parametrize("names", [PRIMITIVES, PARAMETERS], ids=["names", "params"])
def test_higher_order_primitives_are_named_in_one_module(names):
    found = [
        f"{path.relative_to(LIBRARY)}:{line}: {text!r}"
        for path in MODULES
        if str(path.relative_to(LIBRARY)) not in ALLOWED
        for text, line in strings(path.read_text())
        if text in names
    ]
    assert not found


def test_the_module_that_names_them_is_where_it_is_said_to_be():
    named = set()
    for path in ALLOWED:
        named |= {text for text, _ in strings((LIBRARY / path).read_text())}
    assert {"scan", "while", "cond", "shard_map"} <= named
