"""Tunix, on this library and on `qwix`."""

import json

import numpy as np
import pytest

from tests.clients import program

pytestmark = pytest.mark.clients
CASES = ["lora", "qlora nf4"]


def run(first, *folders):
    program.run("tunix", first, *folders)
    return json.loads((folders[0] / "results.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came out on either library."""
    folder = tmp_path_factory.mktemp("tunix")
    theirs = run("import qwix", folder / "qwix")
    ours = run("import qwix_train.as_qwix", folder / "ours", folder / "qwix")
    return ours, theirs


@pytest.mark.parametrize("case", CASES)
def test_variables_are_those_of_qwix(results, case):
    ours, theirs = (found[case]["shapes"] for found in results)
    assert ours == theirs
    assert sum("lora" in name for name in ours) == 14


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_qwix(results, case):
    ours, theirs = (found[case]["losses"] for found in results)
    assert len(ours) == 6
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert np.ptp(ours) > 0.01


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_from_a_checkpoint_of_either(results, case):
    ours, theirs = (found[case] for found in results)
    np.testing.assert_allclose(ours["resumed"], ours["losses"][3:], rtol=1e-6)
    np.testing.assert_allclose(ours["from the other"], theirs["losses"][3:], rtol=1e-5)


def test_a_model_that_casts_its_weights(results):
    losses = results[0]["qwen3"]["losses"]
    assert len(losses) == 3 and np.isfinite(losses).all()
