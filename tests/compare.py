"""What two trees of arrays have in common."""

from typing import Any

import jax
import numpy as np
from jax import numpy as jnp


def assert_same(got: Any, want: Any) -> None:
    """The same tree of arrays: structure, shapes, dtypes, and every bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, x, y in _leaves(got, want):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), path
        if x.tobytes() != y.tobytes():
            # Says where; what is left then differs by a NaN or the sign of a zero.
            np.testing.assert_array_equal(x, y, path)
            raise AssertionError(f"{path} differs in its bits.")


def assert_close(
    got: Any,
    want: Any,
    tolerance: float = 1e-5,
    *,
    atol: float | None = None,
    of_largest: bool = False,
) -> None:
    """Leaves of equal shapes, in float64, to a tolerance.

    Args:
        got: A tree of arrays.
        want: A tree with as many leaves.
        tolerance: How far an element may be off, as a part of it.
        atol: How far it may be off in any case; the tolerance by default.
        of_largest: Whether the tolerance is a part of the largest magnitude of the
            leaf instead, as for sums whose terms cancel.
    """
    for path, x, y in _leaves(got, want):
        assert x.shape == y.shape, path
        x, y = (v.astype(np.float64) for v in (x, y))
        if of_largest:
            limits = {"rtol": 0, "atol": tolerance * np.abs(y).max(initial=0)}
        else:
            limits = {"rtol": tolerance, "atol": tolerance if atol is None else atol}
        np.testing.assert_allclose(x, y, **limits, err_msg=path)


def assert_differ(a: Any, b: Any) -> None:
    """At least one leaf has an element that the other has not."""
    assert any(not np.array_equal(x, y) for _, x, y in _leaves(a, b))


def _leaves(got, want):
    """Yields the path, and both arrays, of each leaf."""
    left, right = jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
    for (path, x), y in zip(left, right, strict=True):
        yield jax.tree_util.keystr(path), as_numpy(x), as_numpy(y)


def as_numpy(x):
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)
