"""The tutorials run as the notebooks that the site offers, and show what they say."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest

pytestmark = pytest.mark.documentation
DOCS = pathlib.Path(__file__).parent.parent / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


def notebook_of(page):
    spec = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.notebook(page.read_text())


@pytest.mark.parametrize("page", TUTORIALS, ids=[page.stem for page in TUTORIALS])
def test_a_tutorial_runs_as_a_notebook(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = notebook_of(page)["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.M)
    assert [block.strip() for block in blocks] == code
    names = {}
    for cell in code:
        exec(cell, names)
    CHECKS[page.stem](names)


def check_image_classifier(names):
    # Training with rounded weights finds weights that rounding harms less.
    assert names["float_accuracy"] > 0.94
    assert names["trained_accuracy"] > names["rounded_accuracy"] + 0.01
    assert names["trained_accuracy"] > names["float_accuracy"] - 0.02


def check_language_model(names):
    assert names["float_loss"] < 2.8  # of 5.5
    assert abs(names["dynamic_loss"] - names["float_loss"]) < 0.01
    assert abs(names["static_loss"] - names["float_loss"]) < 0.02
    assert names["trained_loss"] < names["static_loss"]


def check_qlora(names):
    assert np.mean(names["losses"][-10:]) < np.mean(names["losses"][:3]) - 0.15
    assert np.isfinite(names["logits"]).all()


def check_phone(names):
    assert names["litert"].is_full_integer
    assert names["phone_accuracy"] > 0.94


CHECKS = {
    "image_classifier": check_image_classifier,
    "language_model": check_language_model,
    "qlora": check_qlora,
    "phone": check_phone,
}
