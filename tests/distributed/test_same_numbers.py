"""A step in several processes gives the numbers that it gives in one."""

import numpy as np
import pytest

from tests.distributed import cases, several

# A sum over processes has an order of its own.
ROUNDING = {"rtol": 2e-5, "atol": 2e-6}


def assert_same_numbers(names, shape):
    count = shape[0] * shape[1]
    found = several.run(cases.run, count, names, shape)
    wanted = cases.run(names, shape)
    for name in names:
        for process in found:
            assert process[name].keys() == wanted[name].keys()
            for path, want in wanted[name].items():
                got = process[name][path]
                assert got.dtype == want.dtype, (name, path)
                message = f"{name} {path}"
                if np.issubdtype(want.dtype, np.integer):
                    np.testing.assert_array_equal(got, want, message)
                else:
                    as_floats = [x.astype(np.float32) for x in (got, want)]
                    np.testing.assert_allclose(*as_floats, err_msg=message, **ROUNDING)


def test_training_in_two_processes():
    assert_same_numbers(cases.FEW, (2, 1))


# Those that run along both axes of a mesh, in four processes.
ALONG_BOTH = ("nnx_static_ranges", "gptq", "experts")


@pytest.mark.slow
def test_other_modes_in_two_processes():
    names = [name for name in cases.CASES if name not in (*cases.FEW, *ALONG_BOTH)]
    assert_same_numbers(names, (1, 2))


@pytest.mark.slow
def test_four_processes():
    assert_same_numbers((*ALONG_BOTH, "quantized_training"), (2, 2))
