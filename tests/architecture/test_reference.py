"""The reference of the documentation has every public name, and every page a place."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ["", *"calib hooks lora odml ops optim ptq qat saved".split()]


def documented():
    """What the pages of the reference show: the name, or that of their headings."""
    names = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        text = page.read_text()
        found = re.findall(r"^::: (\S+)", text, re.MULTILINE)
        # A module that is public has its names there.
        names |= {*found, *(name.rpartition(".")[0] for name in found)}
        names |= set(re.findall(r"^ +heading: (\S+)", text, re.MULTILINE))
    return names


def public(package):
    """The names that a package has from its modules, late ones among them."""
    file = ROOT / "qwix_train" / package / "__init__.py"
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.asname == alias.name and alias.name not in PACKAGES:
                    yield alias.name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package):
    # What two packages have stands under one of them.
    places = ["", package] if package else PACKAGES
    prefixes = [".".join(filter(None, ("qwix_train", place))) for place in places]
    shown = documented()
    assert not {
        name
        for name in public(package)
        if not shown & {f"{prefix}.{name}" for prefix in prefixes}
    }


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^ +- ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    docs = ROOT / "docs"
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(f.relative_to(docs)) for f in docs.rglob("*.md")}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
