"""What `import qwix_train` imports, and what it leaves for its first use."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qwix_train

HEAVY = (
    "ai_edge_litert clu grain litert_converter matplotlib ml_collections "
    "orbax safetensors scipy.optimize scipy.sparse tensorflow tensorstore"
).split()


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has imported after some code."""
    printed = "import json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{printed}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout))


@pytest.fixture(scope="module")
def imported() -> set[str]:
    return modules_after("import qwix_train")


@pytest.mark.parametrize("module", HEAVY)
def test_import_leaves_heavy_modules(imported, module):
    assert module not in imported


@pytest.mark.parametrize("package", ["hooks", "lora", "odml", "optim", "ptq", "saved"])
def test_import_leaves_packages(imported, package):
    assert not [name for name in imported if name.startswith(f"qwix_train.{package}")]


@pytest.mark.slow
def test_packages_leave_orbax_and_litert():
    found = modules_after("from qwix_train import hooks, lora, odml, ptq, qat")
    assert {"qwix_train.ptq.checkpoint", "qwix_train.odml.convert"} <= found
    assert not found & set(HEAVY)


def test_every_late_name_is_listed_and_imported():
    late = "LoraProvider OdmlQatProvider PtqProvider apply_lora_to_model lora odml ptq"
    assert set(late.split()) <= set(dir(qwix_train))
    for package in (qwix_train, qwix_train.calib, qwix_train.qat):
        for name in dir(package):
            assert getattr(package, name) is not None or name == "__spec__"
    assert qwix_train.PtqProvider is qwix_train.ptq.PtqProvider
    # Once imported, it is an ordinary attribute.
    assert "PtqProvider" in vars(qwix_train)


def test_star_import_has_late_names():
    names = {}
    exec("from qwix_train import *", names)
    assert names["PtqProvider"] is qwix_train.PtqProvider
    assert names["lora"] is qwix_train.lora
    assert "_late_names" not in names


def test_unknown_name():
    with pytest.raises(AttributeError, match="'qwix_train' has no attribute 'Ptq'"):
        _ = qwix_train.Ptq  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'Ptq'"):
        exec("from qwix_train import Ptq")


@pytest.mark.parametrize(
    "package", ["", *"calib hooks lora odml optim ptq qat saved".split()]
)
def test_the_docstring_of_a_package_has_its_public_names(package):
    """`help` of a package does not show what it has from its modules."""
    file = Path(qwix_train.__file__).parent / package / "__init__.py"
    tree = ast.parse(file.read_text())
    public = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for name in node.names
        if name.asname == name.name and not name.name.endswith("State")
    }
    text = ast.get_docstring(tree) or ""
    assert not {name for name in public if not re.search(rf"\b{name}\b", text)}
