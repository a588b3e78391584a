"""The tests that `tests/README.md` names exist."""

import pathlib
import re

TESTS = pathlib.Path(__file__).parents[1]


def test_each_named_test_is_there():
    found, file = [], ""
    for name in re.findall(r"`([\w/.]*::\w+)`", (TESTS / "README.md").read_text()):
        here, test = name.split("::")
        file = here or file
        found.append((file, test))
    assert len(found) > 60
    missing = [
        f"{file}::{test}"
        for file, test in found
        if f"def {test}(" not in (TESTS / file).read_text()
    ]
    assert not missing
