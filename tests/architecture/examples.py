"""The examples of public docstrings, and what they need to be pasted."""

import ast
import builtins
import doctest
import importlib
import inspect

PACKAGES = (
    "",
    ".qat",
    ".calib",
    ".ptq",
    ".lora",
    ".odml",
    ".optim",
    ".hooks",
    ".saved",
)


def public():
    """What users call: its name, and the object."""
    for package in PACKAGES:
        module = importlib.import_module(f"qwix_train{package}")
        for name in getattr(module, "__all__", dir(module)):
            found = getattr(module, name)
            own = getattr(found, "__module__", "").startswith("qwix_train")
            if not name.startswith("_") and callable(found) and own:
                yield f"{module.__name__}.{name}", found


def missing(value):
    """The names that the examples of an object use and do not make."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")
    nodes = list(ast.walk(ast.parse("".join(example.source for example in examples))))
    made = set(dir(builtins))
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            made.add(node.id)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
    return {node.id for node in nodes if isinstance(node, ast.Name)} - made
