"""One module hands the operations of a traced call to what replaces them."""

import ast

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


def test_stages_know_no_mode_and_no_plan():
    for file, tree in source.library().items():
        if file.startswith("stages/"):
            packages = {
                name.split(".")[1]
                for name in source.imports(tree)
                if "qwix_train." in name
            }
            assert packages <= {"core", "observers", "ops", "stages", "trace", "values"}
