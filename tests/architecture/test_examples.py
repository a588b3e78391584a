"""The examples of public docstrings can be pasted."""

from tests.architecture import examples


def test_each_example_imports_what_it_uses():
    found = {name: examples.missing(value) for name, value in examples.public()}
    assert len(found) > 80
    assert {name: sorted(names) for name, names in found.items() if names} == {}
