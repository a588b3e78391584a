"""A Gemma 3 of the `gemma` package, on this library and on `qwix`."""

import json

import numpy as np
import pytest

from tests.clients import program
from tests.compare import assert_close

pytestmark = pytest.mark.clients


def run(first, folder):
    program.run("gemma", first, folder)
    results = json.loads((folder / "results.json").read_text("utf-8"))
    with np.load(folder / "arrays.npz") as arrays:
        return results, dict(arrays)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    return run("import qwix_train.as_qwix", folder)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return run("import qwix", tmp_path_factory.mktemp("qwix"))


def test_rounded_weights_are_those_of_qwix(ours, theirs):
    (results, _), (expected, _) = ours, theirs
    assert results["float"] == expected["float"]
    assert abs(results["weights"] - results["float"]) > 1e-3
    assert_close(results["weights"], expected["weights"], 1e-6)


def test_activations_are_quantized_as_those_of_qwix_but_for_ties(ours, theirs):
    (results, _), (expected, _) = ours, theirs
    assert_close(results["qat"], expected["qat"], 5e-3)


def test_what_is_served_is_what_was_trained(ours, theirs):
    results, arrays = ours
    assert_close(results["ptq"], results["qat"], 1e-6)
    assert results["quantized"] == theirs[0]["quantized"] == 10
    # Values are quantized over all positions, of which a cache holds fewer.
    assert_close(arrays["decoded"], arrays["whole"], 5e-3, of_largest=True)


def test_adapters_train(ours):
    results, _ = ours
    assert set(results["adapters"]) == {
        f"layer_{i}/attn/q_einsum/w_lora_{part}" for i in (0, 1) for part in "ab"
    }
    assert_close(results["lora"][0], results["float"], 1e-6)
    assert (np.diff(results["lora"]) < 0).all()
