"""One module hands the operations of a traced call to what replaces them."""

import ast
import re

from tests.architecture import source


def runs(tree):
    """The calls that run a traced call with a handler; see `TracedCall.run`."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=owner, attr="run")):
                named = getattr(owner, "id", "") in ("call", "traced")
                if named or "handler" in ast.unparse(node):
                    yield ast.unparse(node)


def test_a_run_with_a_handler_is_found():
    code = "traced.run(ops, f, substitute)\nx.with_inputs(y).run(ops, handler, f)"
    assert len(list(runs(ast.parse(code)))) == 2
    assert not list(runs(ast.parse("run(traced, stages)\nself.run(body, inputs, ())")))


def test_modes_choose_stages_and_the_runner_applies_them():
    found = {file for file, tree in source.library().items() if list(runs(tree))}
    # The transposed product of quantized training is traced by itself.
    assert found == {"stages/run.py", "qat/backward_product.py"}


def modes():
    """The classes of modes, with the module that each stands in."""
    classes = [
        (file, node)
        for file, tree in source.library().items()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    ]
    found, last = {"QuantizationProvider"}, None
    while found != last:
        last = set(found)
        for _, node in classes:
            # Some are named with their module: `provider.QtProvider`.
            if found & {ast.unparse(base).split(".")[-1] for base in node.bases}:
                found.add(node.name)
    return [(file, node) for file, node in classes if node.name in found]


def public_methods(cls):
    return {
        node.name
        for node in cls.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def test_a_mode_has_eight_methods_to_know():
    classes = {cls.name: cls for _, cls in modes()}
    assert {"QtProvider", "PtqProvider", "LoraProvider", "Tagging"} <= classes.keys()
    assert len(public_methods(classes["QuantizationProvider"])) <= 8


def test_modes_know_no_framework_and_no_box():
    named = re.compile(r"flax\.(linen|nnx)|\bnnx\b|linen|box", re.IGNORECASE)
    for file, cls in modes():
        names = {ast.unparse(n) for n in ast.walk(cls) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(cls) if isinstance(n, ast.Attribute)}
        names |= {n.arg for n in ast.walk(cls) if isinstance(n, ast.arg)}
        names |= public_methods(cls)
        assert not [name for name in names if named.search(name)], (file, cls.name)


def test_stages_know_no_mode_and_no_plan():
    for file, tree in source.library().items():
        if file.startswith("stages/"):
            packages = {
                name.split(".")[1]
                for name in source.imports(tree)
                if "qwix_train." in name
            }
            assert packages <= {"core", "observers", "ops", "stages", "trace", "values"}
