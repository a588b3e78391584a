"""The table of operations, and the names that rules may give."""

import pathlib

import pytest

from qwix_train import QuantizationRule, odml
from qwix_train import ops as kinds
from qwix_train.odml import ops
from qwix_train.planning.rules import LITERT_OP_NAMES


def test_rules_know_the_names_of_the_table():
    named = {name for name in ops.OPS if name not in ops.LAYOUT}
    assert set(LITERT_OP_NAMES) == named - set(kinds.names())


@pytest.mark.parametrize("name", ["softmax", "relu6", "relu60", "add12", "log_softmax"])
def test_rules_take_names_and_ids(name):
    rule = QuantizationRule(op_names=[name], weight_qtype="int8", act_qtype="int8")
    assert rule.op_names == (name,)


def test_an_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match="'sinh' is not an op: write 'sin'"):
        QuantizationRule(op_names=["sinh"])


def test_the_documented_table_is_that_of_the_code():
    document = pathlib.Path(__file__).parents[2] / "docs" / "litert_ops.md"
    assert odml.table() in document.read_text()
