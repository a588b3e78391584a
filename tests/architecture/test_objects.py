"""What objects are is said by their classes, and not changed from outside."""

import ast

from tests.architecture import source

# Flax builds a class for each module that is rewritten.
MAY_CHANGE_CLASSES = "frontends/"


def changes(tree):
    """Where a file changes the class of an object, or all attributes of another."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Attribute(attr="__class__")]):
                yield ast.unparse(node)
            case ast.Call(func=ast.Attribute(value=ast.Call(), attr="update")):
                if ast.unparse(node.func.value).startswith("vars("):
                    yield ast.unparse(node)
            case ast.Call(args=[_, ast.Constant(value="__class__"), *_]):
                yield ast.unparse(node)


def test_what_changes_an_object_is_found():
    code = "a.__class__ = B\nvars(a).update(vars(b))\nset_(a, '__class__', B)"
    assert len(list(changes(ast.parse(code)))) == 3


def test_no_object_is_made_another():
    for file, tree in source.library().items():
        if not file.startswith(MAY_CHANGE_CLASSES):
            assert not list(changes(tree)), file
