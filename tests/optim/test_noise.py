"""Bits from a hash: uniform, and independent of place and of key."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qwix_train.optim import _noise


@pytest.mark.slow
def test_bits_are_uniform_and_independent():
    keys = jax.random.split(jax.random.key(0), 6)
    data = [jax.random.key_data(jax.random.fold_in(key, 3)) for key in keys]
    fields = [np.asarray(_noise.bits(d, (500, 400))) for d in data]
    count = fields[0].size
    # Of the upper and of the lower half of each word, as rounding uses the upper ones.
    for field in fields:
        for part in field >> 24, field & 0xFF:
            found = np.bincount(part.ravel().astype(int), minlength=256)
            chi_square = ((found - count / 256) ** 2 / (count / 256)).sum()
            # 255 degrees of freedom, five standard deviations.
            assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)
    parts = np.stack([f.ravel() for f in fields]) / 2.0**32 - 0.5
    parts = np.concatenate([parts, np.roll(parts, 1, 1), np.roll(parts, 400, 1)])
    correlations = np.corrcoef(parts) - np.eye(len(parts))
    assert np.abs(correlations).max() < 5 / np.sqrt(count)


@pytest.mark.slow
def test_shapes():
    key = jnp.array([1, 2], jnp.uint32)
    assert _noise.bits(key, ()).shape == ()
    assert _noise.bits(key, (0, 3)).shape == (0, 3)
    np.testing.assert_array_equal(
        _noise.bits(key, (6,)), _noise.bits(key, (2, 3)).reshape(6)
    )
