"""`import qwix_train.as_qwix`, and the table of what it has."""

import pathlib
import subprocess
import sys

import pytest

from tests.like_qwix import name_table

ROOT = pathlib.Path(__file__).parents[2]


def run(code):
    """Runs a program in a process of its own, which may import `qwix`."""
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )


def test_import_qwix():
    done = run(
        """
import qwix_train.as_qwix
import qwix, qwix.pallas as qpl
from qwix import flax_util
from qwix.contrib import awq, calibration, gptq, hadamard_rot, padded_ptq, smooth_quant
import qwix_train
assert issubclass(qwix.QtProvider, qwix_train.QtProvider)
assert qpl.get_current_rule is qwix_train.current_rule
assert qwix.contrib.gptq.GptqRule().act_batch_axes == (0,)
assert flax_util.QuantStat is qwix.QuantStat
# What MaxText imports of private modules.
from qwix._src import interception
from qwix._src.core import dot_general_qt, numerics, sparsity
from qwix._src.utils import flax_util as found
from qwix.contrib.sparsity import sparsity_module
assert found is flax_util
assert numerics.get_symmetric_bound("int8") == 127.5
assert interception.disable_interceptions is qwix_train.in_float
for what in (dot_general_qt.DotGeneralQtConfig, lambda: sparsity_module.SparsityModule):
    try:
        what()
    except (NotImplementedError, AttributeError) as error:
        assert "by the rules" in str(error) or "no structured" in str(error), error
    else:
        raise AssertionError
class Provider(qwix.QtProvider):
    def dot_general(self, *args, **kwargs): ...
try:
    import qwix.contrib.qep
except ModuleNotFoundError as error:
    assert "Nearest is qwix_train.ptq.Gptq" in str(error), error
else:
    raise AssertionError
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_qwix_that_was_imported_before_stays():
    done = run("import qwix, qwix_train.as_qwix")
    assert "ImportError: qwix was imported already, from" in done.stderr


@pytest.mark.slow
def test_the_document_has_every_name_of_qwix():
    theirs = name_table.of_qwix()
    document = (ROOT / "docs" / "as_qwix.md").read_text("utf-8")
    assert document.split("<!-- table -->\n")[1].strip() == name_table.table(theirs)
    # What differs is explained.
    assert set(name_table.NOTES) <= set(theirs)
    for name, entry in theirs.items():
        found = name_table.differences(entry, name)
        known = found is not None and set(found) <= {name_table.PATCHES}
        assert known or name in name_table.NOTES, (name, found)
