"""One module makes and reads the names of leaves: `qwix_train.leaves`.

A name is made of its owner's, `_` and a part, or of an op's, `_` and a side. So what is
searched for in all other files is a string with such an ending, such as `"_scale"`,
`"dot_general0_lhs"` or the second half of `f"{name}_scale"`, if it is not a sentence;
the name of a part where a name is asked for its end, as in `name.endswith("scale")`;
and a `"_"` between two values, as in `f"{name}_{part}"`, `name.rpartition("_")`,
`name + "_" + part` and `"_".join([name, part])`.
"""

import ast
import dataclasses
import re
from typing import get_args

import pytest

from qwix_train.core.qarray import QArray
from qwix_train.planning import leaves, rules
from tests.architecture import source

PARTS = {*get_args(leaves.ParamPart), *get_args(leaves.OperandPart)}
ENDINGS = sorted({*PARTS, *leaves.SIDES})
ENDING = re.compile(rf"_(?:\(\?:)?({'|'.join(ENDINGS)})(?![A-Za-z0-9_])")

# Fields of rules, which dictionaries and tables of a plan have as keys; and of arrays.
FIELDS = {
    field.name
    for cls in (rules.QuantizationRule, QArray)
    for field in dataclasses.fields(cls)
}

# Names that belong to files of other projects, and strings that do not name a leaf.
OTHERS = {
    # The tensors of a layer in the format compressed-tensors: `weight_scale`.
    "ptq/compressed_blocks.py": {
        "weight_scale",
        "weight_global_scale",
        "weight_zero_point",
    },
    "ptq/compressed_layers.py": {
        "weight_scale",
        "weight_global_scale",
        "weight_zero_point",
    },
    "ptq/compressed_tensors.py": {"weight_scale", "input_global_scale"},
    # Keys of PEFT's adapter_config.json.
    "lora/peft_config.py": {"lora_alpha"},
    # A number behind a name that two arguments of a LiteRT model share.
    "odml/calls.py": {"f'{name}_{index}'"},
    # Statistics of the calibration providers of `qwix`.
    "like_qwix/contrib/awq.py": {"act_scale"},
    "like_qwix/contrib/smooth_quant.py": {"sq_scale", "inv_sq_scale"},
    # A parameter of `jax.lax.ragged_dot_general`.
    "ops/ragged_dot.py": {"group_offset"},
}


def names_of_leaves(tree):
    """The strings of a file that make or read the name of a leaf."""
    for text in source.strings(tree):
        if ENDING.search(text) and not re.search(r"\s", text):
            if text not in FIELDS | PARTS:
                yield text
    for node in ast.walk(tree):
        if _takes_two(node) or _asks_for_end(node):
            yield ast.unparse(node)


def _takes_two(node):
    """Whether an expression joins two names by `_`, or takes two apart."""
    match node:
        case ast.JoinedStr(values=[_, ast.Constant(value="_"), _]):
            return True
        case ast.BinOp(op=ast.Add(), right=ast.Constant(value="_")):
            return True
        case ast.Call(func=ast.Attribute(attr=name), args=[ast.Constant("_"), *_]):
            return name in ("partition", "rpartition", "split", "rsplit")
        case ast.Call(
            func=ast.Attribute(value=ast.Constant("_"), attr="join"),
            args=[ast.Tuple(elts=[_, last]) | ast.List(elts=[_, last])],
        ):
            return not isinstance(last, ast.Starred)
    return False


def _asks_for_end(node):
    """Whether an expression looks for the name of a part at the end of a name."""
    match node:
        case ast.Call(func=ast.Attribute(attr="endswith" | "removesuffix")):
            return bool(PARTS & {getattr(x, "value", None) for x in ast.walk(node)})
    return False


@pytest.mark.parametrize(
    "code",
    [
        'name = f"{owner}_scale"',
        'name = f"{owner}_{part}"',
        'name = owner + "_" + part',
        'name = "_".join([owner, part])',
        'owner = name.removesuffix("_zero_point")',
        'is_left = name.endswith(("_lhs", "_rhs"))',
        'pattern = re.compile(r"(.*)_(?:scale|offset)")',
        'name = "dot_general0_lhs"',
        'name = "kernel_lora_a"',
        'op, _, side = name.rpartition("_")',
        'is_scale = path[-1].endswith("scale")',
    ],
)
def test_names_are_found(code):
    assert list(names_of_leaves(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        'def scale():\n  """Gives `kernel_scale`."""',
        'raise ValueError("There is no kernel_scale beside it.")',
        'table["act_static_scale"] = 1',
        'x = qarray.zero_point if name == "zero_point" else qarray.scale',
        'y = f"sum_of_{end}"',
        'leaf = Leaf(owner, "pre_quant_scale")',
        'public = not name.startswith("_")',
        'name = "_".join([key, *path])',
    ],
)
def test_other_strings_are_not(code):
    assert not list(names_of_leaves(ast.parse(code)))


def test_one_module_makes_and_reads_the_names_of_leaves():
    files = source.library()
    found = {
        file: names
        for file, tree in files.items()
        if file != "planning/leaves.py"
        and (names := set(names_of_leaves(tree)) - OTHERS.get(file, set()))
    }
    assert not found


def test_each_exception_is_needed():
    for file, names in OTHERS.items():
        assert names <= set(names_of_leaves(source.library()[file])), file


def test_the_grammar_knows_no_other_module():
    names = list(source.imports(source.library()["planning/leaves.py"]))
    assert names and not any(name.startswith("qwix_train") for name in names)
