"""Tunix, on this library and on `qwix`."""

import json

import numpy as np
import pytest

from tests.clients import program

pytestmark = pytest.mark.clients
TOLERANCES = {"qlora nf4": 1e-5, "lora": 1e-5, "qat": 1e-5, "qat static": 1e-3}
"""The cases of training, and by how much losses may differ.

The largest values of a range that is seen lie on ties, which either library rounds as
it likes.
"""


first, *others = TOLERANCES
trained = pytest.mark.parametrize(
    "case", [first, *(pytest.param(case, marks=pytest.mark.slow) for case in others)]
)


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """What came out on either library, for the cases of the tests that run."""
    here = [item for item in request.session.items if item.path == request.path]
    asked = ",".join(dict.fromkeys(item.callspec.params["case"] for item in here))
    folder = tmp_path_factory.mktemp("tunix")

    def run(first, folder, *others):
        program.run("tunix", first, asked, folder, *others)
        return json.loads((folder / "results.json").read_text("utf-8"))

    theirs = run("import qwix", folder / "qwix")
    return run("import qwix_train.as_qwix", folder / "ours", folder / "qwix"), theirs


@trained
def test_variables_are_those_of_qwix(results, case):
    ours, theirs = (found[case]["shapes"] for found in results)
    assert ours == theirs
    adapters = sum("lora" in name for name in ours)
    assert adapters == (14 if "lora" in case else 0)
    assert any("sum_of_absmax" in name for name in ours) == (case == "qat static")


@trained
def test_losses_are_those_of_qwix(results, case):
    ours, theirs = (found[case]["losses"] for found in results)
    assert len(ours) == 6
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCES[case])
    assert np.ptp(ours) > 0.01


@trained
def test_training_goes_on_from_a_checkpoint_of_either(results, case):
    ours, theirs = (found[case] for found in results)
    np.testing.assert_allclose(ours["resumed"], ours["losses"][3:], rtol=1e-6)
    expected = theirs["losses"][3:]
    np.testing.assert_allclose(ours["from the other"], expected, rtol=TOLERANCES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sampled qlora", "sampled ptq"])
def test_the_sampler_draws_the_tokens_of_qwix(results, case):
    ours, theirs = (found[case] for found in results)
    for drawn in ("best", "drawn"):
        assert ours[drawn] == theirs[drawn]
        assert [len(tokens) for tokens in ours[drawn]] == [8, 8]
    name = "log probability"
    np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["grpo"])
def test_grpo_learns_what_it_learns_with_qwix(results, case):
    ours, theirs = (found[case] for found in results)
    assert len(ours["losses"]) == len(ours["completed"]) == 3
    assert ours["completed"] == theirs["completed"]
    # Advantages have a mean of 0, and so nearly have losses.
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-4, atol=1e-8)
    assert ours["completed"][0] != ours["completed"][2]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3"])
def test_a_model_that_casts_its_weights(results, case):
    losses = results[0][case]
    assert len(losses) == 3 and np.isfinite(losses).all()
