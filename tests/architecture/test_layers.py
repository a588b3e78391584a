"""What may know what: imports point down, and nothing private is borrowed."""

import ast
import graphlib

from tests.architecture import source

# From the ground up. A package imports those before it, and none behind it.
LAYERS = (
    "core",
    "files",
    "observers",
    "trace",
    "ops",
    "values",
    "stages",
    "planning",
    "frontends",
    "calib",
    "optim",
    "qat",
    "ptq",
    "odml",
    "lora",
    "saved",
    "hooks",
    "like_qwix",
)
# Modules that stand beside the packages: the doors to them.
MOST_DOORS = 8


def imports(tree):
    """The names that a file imports, also in functions, but for types alone."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def library_imports():
    """Each file, with the parts of what it imports of the library."""
    for file, tree in source.library().items():
        for name in imports(tree):
            if name.startswith("qwix_train."):
                yield file, name.split(".")[1:]


def test_each_package_has_a_layer():
    packages = {file.split("/")[0] for file in source.library() if "/" in file}
    assert packages == set(LAYERS)


def test_imports_point_down():
    for file, (package, *_) in library_imports():
        if "/" not in file:
            continue  # a door knows all
        mine = file.split("/")[0]
        assert package in LAYERS, f"{file} imports the door {package}"
        assert LAYERS.index(package) <= LAYERS.index(mine), f"{file}: {package}"


def test_nothing_private_is_borrowed_from_another_package():
    for file, parts in library_imports():
        if file.split("/")[0] != parts[0]:
            assert not any(part.startswith("_") for part in parts), (file, parts)


def test_modules_import_each_other_in_no_circle():
    modules = {
        file.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
        for file in source.library()
    }
    graph = {}
    for file, parts in library_imports():
        mine = file.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
        whole, outer = ".".join(parts), ".".join(parts[:-1])
        other = whole if whole in modules else outer
        if mine != "__init__" and other in modules and other != mine:
            graph.setdefault(mine, set()).add(other)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_there_are_few_doors():
    doors = [f for f in source.library() if "/" not in f and f != "__init__.py"]
    assert len(doors) <= MOST_DOORS
