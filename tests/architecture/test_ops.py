"""The names of operations stand in `qwix_train/ops`, and nowhere else."""

from qwix_train import ops
from tests.architecture import source

# Where else they may stand, and why.
OTHER_TABLES = {
    # What LiteRT has for each operation: rules for LiteRT are validated against it.
    "odml/ops.py",
}


def test_the_names_of_operations_stand_in_one_place():
    names = {name for kind in ops.KINDS for name in (kind.primitive, *kind.names)}
    assert {"dot_general", "einsum", "conv_general_dilated", "gather"} <= names
    found = {
        name: sorted(names & set(source.strings(tree)))
        for name, tree in source.library().items()
    }
    elsewhere = {
        name: strings
        for name, strings in found.items()
        if strings and not name.startswith("ops/") and name not in OTHER_TABLES
    }
    assert not elsewhere
