"""Ranges that leave outliers outside, from a histogram of all the data.

Within a bin, the values count as spread evenly. What is computed, a group that shares a
scale at a time, for all groups at once, and compiled once for each shape:

- `percentile_range`: the range that holds a share of the values.
- `mse_range`: the range with the least mean squared quantization error.
- `entropy_range`: the range that keeps the most information (KL divergence).
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qwix_train.core import numerics
from qwix_train.core.calibration import compute_scale_zero_point
from qwix_train.observers import histogram

_COARSE = 2.0 ** (1 - np.arange(417) / 32)
"""Candidates, as multiples of the largest value: from 2 to 2**-12 of it, with 1.

Above 1, the top code may lie on the largest value; half a step beyond it is usual.
"""

_FINE = 2.0 ** (np.arange(-8, 9) / 256)
"""Candidates around the best coarse one, with 1."""

_ENTROPY = 2.0 ** (-np.arange(257) / 32)
"""Candidates for the entropy, which has no use for more than the largest value."""

_CELLS = 16
"""Cells that a level is divided in to compare the distributions before and after."""


@functools.partial(jax.jit, static_argnames=("percentile", "symmetric"))
def percentile_range(
    state: Mapping[str, jax.Array], percentile: float, *, symmetric: bool = True
) -> dict[str, jax.Array]:
    """Returns the range that holds a percentage of the values.

    As `numpy.percentile` does, it interpolates between the two values next to the rank;
    each is known to within its bin.

    Args:
        state: A histogram.
        percentile: From 0 to 100.
        symmetric: Whether to take the percentile of the magnitudes. Otherwise, the
            range is from the percentile ``100 - p`` to the percentile ``p`` of the
            values, widened to hold 0.

    >>> x = jnp.arange(1., 1001.)
    >>> state = jax.jit(histogram.update)(histogram.init((1,)), x)
    >>> 988 <= percentile_range(state, 99)['absmax'].item() <= 992  # One bin.
    True
    """
    tail = 1 - percentile / 100
    if symmetric:
        return {"absmax": _upper_quantile(histogram.magnitude_bins(state), tail)}
    bins = histogram.signed_bins(state)
    flipped = histogram.Bins(
        bins.masses[..., ::-1], -bins.upper[..., ::-1], -bins.lower[..., ::-1]
    )
    low, high = -_upper_quantile(flipped, tail), _upper_quantile(bins, tail)
    return {"min": jnp.minimum(low, 0), "max": jnp.maximum(high, 0)}


@functools.partial(jax.jit, static_argnames=("qtype", "symmetric"))
def mse_range(
    state: Mapping[str, jax.Array], qtype: numerics.QType, *, symmetric: bool = True
) -> dict[str, jax.Array]:
    """Returns the range for which quantization has the least mean squared error.

    It searches among ranges from 2 to 2**-12 times the largest value, 2% apart, and
    then around the best of them, 0.3% apart. Of a range with two ends, both are first
    scaled together, then the one and the other in turn, twice.

    Args:
        state: A histogram.
        qtype: The type.
        symmetric: Whether the range is centered at zero.

    Raises:
        ValueError: The range has two ends, and the type no zero points.

    References:
        Choukroun et al., "Low-bit quantization of neural networks for efficient
        inference", section 3, https://arxiv.org/abs/1902.06822

    >>> x = jax.random.normal(jax.random.key(0), (10_000,))
    >>> state = jax.jit(histogram.update)(histogram.init((1,)), x)
    >>> 2.4 < mse_range(state, 'int4')['absmax'].item() < 3.0
    True
    """
    bins = histogram.signed_bins(state)
    if symmetric:
        absmax = histogram.absmax(state)

        def error(factor: jax.Array) -> jax.Array:
            return squared_error(bins, {"absmax": absmax * factor}, qtype)

        factor = _best(error, _COARSE, jnp.ones_like(absmax))
        return {"absmax": absmax * _best(error, _FINE, factor)}

    def error_of(low: jax.Array, high: jax.Array) -> jax.Array:
        return squared_error(bins, {"min": low, "max": high}, qtype)

    ones = jnp.ones_like(state["min"])
    smallest, largest = state["min"], state["max"]
    both = _best(lambda f: error_of(smallest * f, largest * f), _COARSE, ones)
    low, high = smallest * both, largest * both
    for factors in (_COARSE, _COARSE, _FINE):
        # Coarse factors are of the extremes, so that each end is searched throughout.
        start = smallest if factors is _COARSE else low
        low = start * _best(lambda f: error_of(start * f, high), factors, ones)
        start = largest if factors is _COARSE else high
        high = start * _best(lambda f: error_of(low, start * f), factors, ones)
    return {"min": low, "max": high}


@functools.partial(jax.jit, static_argnames=("qtype",))
def entropy_range(
    state: Mapping[str, jax.Array], qtype: numerics.QType
) -> dict[str, jax.Array]:
    """Returns the symmetric range that keeps the most information.

    For a range up to ``t``, the magnitudes below ``t`` have a distribution ``P``, to
    the last cell of which all larger ones are added; and a distribution ``Q`` in which
    the values of each quantized level, without the larger ones, are spread over the
    cells of the level that are not empty. The range taken is the one with the least

        KL(P || Q) = sum(P * log(P / Q))

    A type of ``b`` bits has ``2**(b - 1)`` levels. Candidates are 2% apart, down to
    1/256 of the largest value. The source compares histograms of even bins, so smaller
    candidates have fewer cells in a level; here every candidate has 16, of a
    distribution that is even within a bin. On a million normal or Laplace values the
    two are within 2%; with a heavy tail, a spike at zero, or few values the source
    clips more.

    Args:
        state: A histogram.
        qtype: An integer type of 2 bits or more.

    Raises:
        ValueError: The type is another one.

    References:
        Migacz, "8-bit inference with TensorRT", GPU Technology Conference 2017,
        https://on-demand.gputechconf.com/gtc/2017/presentation/s7310-8-bit-inference-with-tensorrt.pdf

    >>> x = jax.random.laplace(jax.random.key(0), (10_000,))
    >>> state = jax.jit(histogram.update)(histogram.init((1,)), x)
    >>> bool(entropy_range(state, 'int4')['absmax'].item() < jnp.abs(x).max())
    True
    """
    check_entropy_qtype(qtype)
    levels = 2 ** (numerics.qtype_bits(qtype) - 1)
    absmax = histogram.absmax(state)
    masses, lower, upper = histogram.magnitude_bins(state)
    above = jnp.flip(jnp.cumsum(jnp.flip(masses, -1), -1), -1)  # From each bin up.
    total = above[..., :1]
    slopes = masses / jnp.where(upper > lower, upper - lower, 1)
    cells = np.arange(levels * _CELLS + 1, dtype=np.float32) / (levels * _CELLS)
    cells = np.expand_dims(cells, tuple(range(absmax.ndim)))

    def divergence(factor: jax.Array) -> jax.Array:
        borders = (absmax * factor)[..., None] * cells
        index = histogram.bin_of(state, borders)

        def take(values: jax.Array) -> jax.Array:
            return jnp.take_along_axis(values, index, -1)

        # How many are beyond each border: what is small is counted from above, where
        # rounding does not drown it.
        beyond = take(above) - (borders - take(lower)) * take(slopes)
        beyond = jnp.clip(beyond, 0, total)
        inside = jnp.maximum(beyond[..., :-1] - beyond[..., 1:], 0)
        p = inside.at[..., -1].add(beyond[..., -1])
        by_level = (*inside.shape[:-1], levels, _CELLS)
        occupied = (p > 0).reshape(by_level).astype(p.dtype)
        level = inside.reshape(by_level).sum(-1, keepdims=True)
        q = level / jnp.maximum(occupied.sum(-1, keepdims=True), 1) * occupied
        q = q.reshape(p.shape)
        p = p / p.sum(-1, keepdims=True)
        q = q / q.sum(-1, keepdims=True)
        ratio = jnp.where(p > 0, p / jnp.where(p > 0, q, 1), 1)
        return jnp.sum(p * jnp.log(ratio), -1)

    return {"absmax": absmax * _best(divergence, _ENTROPY, jnp.ones_like(absmax))}


def check_entropy_qtype(qtype: numerics.QType) -> None:
    """Raises a ValueError for types that have no evenly spaced levels."""
    if not numerics.is_integer_qtype(qtype) or numerics.qtype_bits(qtype) < 2:
        raise ValueError(
            f"The observer 'entropy' divides a range into even levels, which "
            f"{numerics.qtype_name(qtype)} does not have; take int2 to int8, or 'mse'."
        )


def squared_error(
    bins: histogram.Bins, calibration: Mapping[str, jax.Array], qtype: numerics.QType
) -> jax.Array:
    """Returns the sum of squared errors of quantization, for each group.

    With the scale ``s``, and ``y = x / s`` for a value ``x`` whose nearest level is
    ``l``, the error is ``s**2 * (y - l)**2``. Its integral over each bin is exact.

    Args:
        bins: `histogram.signed_bins`.
        calibration: The range, in the shape of the groups.
        qtype: The type.
    """
    scale, zero_point = compute_scale_zero_point(calibration, qtype)
    scale = scale[..., None]
    zero = None if zero_point is None else zero_point.astype(scale.dtype)[..., None]
    a, b = bins.lower / scale, bins.upper / scale
    (a_level, a_sum), (b_level, b_sum) = (_nearest(y, zero, qtype) for y in (a, b))
    width = b - a
    near = (a + b) / 2 - a_level
    within_level = near**2 + width**2 / 12
    integral = b_sum - a_sum + ((b - b_level) ** 3 - (a - a_level) ** 3) / 3
    across = jnp.maximum(integral, 0) / jnp.where(width > 0, width, 1)
    errors = jnp.where(a_level == b_level, within_level, across)
    # Empty bins may be infinitely large.
    errors = jnp.where(bins.masses > 0, errors, 0)
    return _weighted_sum(bins.masses, errors) * scale[..., 0] ** 2


def _weighted_sum(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Returns ``sum(weights * values)`` over the last axis.

    As a product of matrices: XLA for CPU would compute the values inside of the loop
    of a sum, one at a time, which takes 20 times as long on JAX 0.10.
    """
    return jnp.einsum(
        "...i,...i->...", weights, values, precision=jax.lax.Precision.HIGHEST
    )


def _nearest(
    y: jax.Array, zero: jax.Array | None, qtype: numerics.QType
) -> tuple[jax.Array, jax.Array]:
    """Returns the level nearest to each scaled value, and an integral.

    The integral is that of the squared error from a fixed point to the value, less
    ``(y - level)**3 / 3``: a sum over the levels that are passed.
    """
    code = y if zero is None else y + zero
    zero = jnp.zeros((), y.dtype) if zero is None else zero
    name = numerics.qtype_name(qtype)
    if numerics.is_integer_qtype(name) and name != "int1":
        level = jnp.clip(jnp.round(code), *numerics.code_range(name)) - zero
        return level, level / 12
    levels, thresholds, sums = _codebook(name)
    index = jnp.searchsorted(thresholds, code)
    return jnp.asarray(levels)[index] - zero, jnp.asarray(sums)[index]


@functools.cache
def _codebook(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the levels of a type, the thresholds between them, and integrals."""
    levels = numerics.format_of(name).levels
    thresholds = (levels[:-1] + levels[1:]) / 2
    passed = ((thresholds - levels[:-1]) ** 3 - (thresholds - levels[1:]) ** 3) / 3
    sums = np.concatenate([[0], np.cumsum(passed)])
    # Counted from zero, where the intervals are small.
    sums -= sums[np.argmin(np.abs(levels))]
    levels, thresholds = levels.astype(np.float32), thresholds.astype(np.float32)
    return levels, thresholds, sums.astype(np.float32)


def _best(
    score: Callable[[jax.Array], jax.Array], factors: np.ndarray, start: jax.Array
) -> jax.Array:
    """Returns, for each group, the factor times the start with the lowest score."""
    choices = jnp.asarray(factors, start.dtype)
    scores = jax.lax.map(lambda factor: score(start * factor), choices)
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    return start * choices[jnp.argmin(scores, 0)]


def _upper_quantile(bins: histogram.Bins, tail: float) -> jax.Array:
    """Returns the value above which a share of the values lies, for each group."""
    masses, lower, upper = bins
    from_top = jnp.flip(jnp.cumsum(jnp.flip(masses, -1), -1), -1)
    rank = jnp.maximum(from_top[..., :1] - 1, 0) * tail
    whole = jnp.floor(rank)

    def ranked(rank: jax.Array) -> jax.Array:
        index = jnp.sum(from_top > rank, -1, keepdims=True) - 1
        index = jnp.maximum(index, 0)
        mass, low, high, above = (
            jnp.take_along_axis(values, index, -1)
            for values in (masses, lower, upper, from_top - masses)
        )
        share = jnp.clip((rank - above + 0.5) / jnp.maximum(mass, 1), 0, 1)
        # The first is the end of its bin, which is cut to it.
        return jnp.where(rank == 0, high, high - share * (high - low))

    value = ranked(whole)
    # Not to interpolate with a rank that does not exist.
    other = jnp.where(rank > whole, ranked(whole + 1), value)
    return (value + (other - value) * (rank - whole))[..., 0]
