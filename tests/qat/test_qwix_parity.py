"""The same outputs and gradients as `qwix` 0.1.8, to float rounding."""

import numpy as np
import pytest

import qwix_train
from tests import reference_process
from tests.qat import parity


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What `qwix` computes, in a process that its patches cannot leave."""
    path = tmp_path_factory.mktemp("qwix") / "reference.npz"
    reference_process.run("tests.qat.parity", path)
    with np.load(path) as results:
        return dict(results)


@pytest.mark.slow
@pytest.mark.parametrize("name", parity.CASES)
def test_outputs_and_gradients(reference, name):
    ours = parity.run(qwix_train, parity.CASES[name])
    theirs = {
        key.split("|")[1]: value
        for key, value in reference.items()
        if key.split("|")[0] == name
    }
    assert ours.keys() == theirs.keys()
    tolerance = 2e-2 if name == "bfloat16" else 1e-5
    for key, value in ours.items():
        # With tiles, `qwix` takes the gradient at the unquantized operands. Ours is
        # that of the forward pass.
        if "tiles" in name and "grads" in key:
            continue
        scale = np.abs(theirs[key]).max()
        np.testing.assert_allclose(
            value, theirs[key], tolerance, tolerance * scale, err_msg=key
        )
