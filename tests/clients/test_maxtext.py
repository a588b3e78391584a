"""MaxText, on this library and on `qwix`."""

import json

import numpy as np
import pytest

from tests.clients import program

pytestmark = pytest.mark.clients
CASES = "int8 scanned", "fp8_full", "lora scanned", "qlora scanned"


def run(first, folder):
    program.run("maxtext", first, folder)
    return json.loads((folder / "results.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came out on either library."""
    folder = tmp_path_factory.mktemp("maxtext")
    theirs = run("import qwix", folder / "qwix")
    return run("import qwix_train.as_qwix", folder / "ours"), theirs


@pytest.mark.parametrize("case", CASES)
def test_losses_and_variables_are_those_of_qwix(results, case):
    ours, theirs = (found[case] for found in results)
    assert ours["shapes"] == theirs["shapes"]
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-6)
    assert len(ours["losses"]) == 4 and (np.diff(ours["losses"]) < 0).all()
