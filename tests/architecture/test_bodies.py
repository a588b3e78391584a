"""Which equations have bodies is decided in one module."""

import ast

import pytest

from tests.architecture import source

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


def test_a_string_is_found_wherever_it_stands():
    code = (
        '"""scan"""\nif name in {"while"}:\n    match name:\n        case "cond": x()'
    )
    assert sorted(source.strings(ast.parse(code))) == ["cond", "while"]


@pytest.mark.parametrize("names", [PRIMITIVES, PARAMETERS], ids=["names", "params"])
def test_higher_order_primitives_are_named_in_one_module(names):
    found = {
        file: named
        for file, tree in source.library().items()
        if file not in ALLOWED and (named := names & set(source.strings(tree)))
    }
    assert not found


def test_the_module_that_names_them_is_where_it_is_said_to_be():
    named = {
        text for file in ALLOWED for text in source.strings(source.library()[file])
    }
    assert {"scan", "while", "cond", "shard_map"} <= named
