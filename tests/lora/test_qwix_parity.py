"""The same params, outputs and gradients as `qwix` 0.1.8, to float rounding."""

import pickle

import numpy as np
import pytest

import qwix_train
from tests import reference_process
from tests.lora import parity

BY_DEFAULT = ("dense nf4", "general", "nnx einsum int8")


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory):
    """What `qwix` computes, in a process that its patches cannot leave."""
    path = tmp_path_factory.mktemp("qwix") / "reference.pickle"
    names = reference_process.selected(request)
    reference_process.run("tests.lora.parity", path, *names)
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize("name", reference_process.cases(parity.CASES, BY_DEFAULT))
def test_params_outputs_and_gradients(reference, name):
    theirs = reference[name]
    ours = parity.run(qwix_train, parity.CASES[name])
    assert ours.pop("shapes") == theirs.pop("shapes")
    assert ours.keys() == theirs.keys()
    tolerance = 3e-2 if "bfloat16" in name else 1e-5
    for key, value in ours.items():
        scale = np.abs(theirs[key]).max()
        assert scale > 0
        np.testing.assert_allclose(
            value, theirs[key], tolerance, tolerance * scale, err_msg=key
        )
