r"""A histogram of fixed size for a stream of arrays of any magnitude.

Values are binned by the top bits of their float32 representation: by sign, exponent,
and the first 7 bits of the mantissa. So each octave ``[2**e, 2**(e + 1))`` is cut into
128 bins of equal width, and a bin is at most 1/128 as wide as its values are large,
however long the tail of the distribution is; bins of one width for all values would
leave a handful below a clip range at a hundredth of the largest value. Histograms of
bounded relative error are those of DDSketch (Masson, Rim and Lee, "DDSketch: a fast and
fully-mergeable quantile sketch with relative-error guarantees",
https://arxiv.org/abs/1908.10693); cutting octaves evenly makes the index a shift of
bits, without a logarithm.

There are 16 octaves for each sign, the highest of which holds the largest magnitude so
far. When a larger one comes, the octaves move, by a power of two; what falls out at the
lower end joins the first bin, which holds all magnitudes down to 0. The borders of the
bins do not depend on the data, so the histogram of all data is the same in whatever
order batches are added and histograms merged, bit for bit.

The state is a flat dict; ``groups`` is the shape of a scale, one entry for each
group of elements that has its own range:

=============  =====================  =======  =====================================
name           shape                  dtype    content
=============  =====================  =======  =====================================
``min, max``   groups                 float32  the smallest and largest value, and 0
``counts``     (\*groups, 2, 2048)    uint32   elements in each bin, modulo 2**31;
                                               the negative ones, then the others,
                                               ascending by magnitude
``carries``    (\*groups, 2, 2048)    uint16   multiples of 2**31 beyond those
=============  =====================  =======  =====================================

That is 24 KiB for each group: 24 MiB for 1024 channels. An update takes two reductions
of the array and one scatter-add of as many ones as it has elements.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

_MANTISSA_BITS = 7
_OCTAVE = 2**_MANTISSA_BITS
_OCTAVES = 16
_SHIFT = 23 - _MANTISSA_BITS
_WORD_BITS = 31

BINS = _OCTAVE * _OCTAVES
"""Bins for each sign."""

State: TypeAlias = dict[str, jax.Array]


class Bins(NamedTuple):
    """A distribution, as bins in ascending order.

    Attributes:
        masses: Elements in each bin, ``(*groups, bins)``, float32.
        lower: Lower ends of the bins, in the same shape.
        upper: Upper ends; cut to the largest value, as the lower ends are to the
            smallest. A bin with one value only is 0 wide.
    """

    masses: jax.Array
    lower: jax.Array
    upper: jax.Array


def init(groups: Sequence[int]) -> State:
    """Returns an empty histogram.

    Args:
        groups: The shape of the scale.
    """
    shape = (*groups, 2, BINS)
    return {
        "min": jnp.zeros(tuple(groups), jnp.float32),
        "max": jnp.zeros(tuple(groups), jnp.float32),
        "counts": jnp.zeros(shape, jnp.uint32),
        "carries": jnp.zeros(shape, jnp.uint16),
    }


def update(state: Mapping[str, jax.Array], x: jax.Array) -> State:
    """Adds the elements of an array.

    Args:
        state: A histogram.
        x: An array of floats, all finite, of the rank of the groups; along each axis,
            there is one group or one for each index. Below 2**31 elements. Computed
            with in float32.

    Raises:
        ValueError: The groups do not fit the array.

    >>> hist = update(init((1,)), jnp.array([1., -2., 1.5, 1.]))
    >>> masses, lower, _ = signed_bins(hist)
    >>> lower[masses > 0].tolist(), masses[masses > 0].tolist()
    ([-2.0, 1.0, 1.5], [1.0, 2.0, 1.0])
    """
    groups = state["min"].shape
    sizes = zip(x.shape, groups, strict=False)
    if x.ndim != len(groups) or any(g not in (1, n) for n, g in sizes):
        raise ValueError(
            f"A histogram for groups of shape {groups} takes no array of shape "
            f"{x.shape}: the size of a channelwise axis changed."
        )
    x = x.astype(jnp.float32)
    axes = tuple(a for a, g in enumerate(groups) if g == 1)
    low = jnp.min(x, axis=axes, keepdims=True, initial=0)
    high = jnp.max(x, axis=axes, keepdims=True, initial=0)
    low, high = jnp.minimum(state["min"], low), jnp.maximum(state["max"], high)

    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    index = jnp.clip(_key(bits) - _first_key(low, high), 0, BINS - 1)
    index = index + jnp.where(bits < 0, 0, BINS)
    group = jnp.arange(math.prod(groups), dtype=jnp.int32).reshape(groups)
    index = (index + group * (2 * BINS)).reshape(-1)
    counts = jnp.zeros(state["counts"].size, jnp.uint32).at[index].add(1)
    counts = counts.reshape(state["counts"].shape)
    batch = {"counts": counts, "carries": jnp.zeros_like(state["carries"])}
    return _add(_move(state, low, high), batch)


def merge(a: Mapping[str, jax.Array], b: Mapping[str, jax.Array]) -> State:
    """Returns the histogram of the elements of both.

    >>> x = jnp.array([1., -200., 1.5, 1.])
    >>> one, two = (update(init((1,)), part) for part in (x[:2], x[2:]))
    >>> merged, whole = merge(two, one), update(init((1,)), x)
    >>> all(bool((merged[key] == whole[key]).all()) for key in whole)
    True
    """
    low, high = jnp.minimum(a["min"], b["min"]), jnp.maximum(a["max"], b["max"])
    return _add(_move(a, low, high), _move(b, low, high))


def signed_bins(state: Mapping[str, jax.Array]) -> Bins:
    """Returns the distribution of the values."""
    edges, masses = _edges(state), _masses(state)
    below = jnp.minimum(edges, -state["min"][..., None])
    above = jnp.minimum(edges, state["max"][..., None])
    return Bins(
        jnp.concatenate([masses[..., 0, ::-1], masses[..., 1, :]], -1),
        jnp.concatenate([-below[..., :0:-1], above[..., :-1]], -1),
        jnp.concatenate([-below[..., -2::-1], above[..., 1:]], -1),
    )


def magnitude_bins(state: Mapping[str, jax.Array]) -> Bins:
    """Returns the distribution of the magnitudes of the values."""
    edges = jnp.minimum(_edges(state), absmax(state)[..., None])
    return Bins(_masses(state).sum(-2), edges[..., :-1], edges[..., 1:])


def absmax(state: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the largest magnitude of each group."""
    return jnp.maximum(-state["min"], state["max"])


def bin_of(state: Mapping[str, jax.Array], magnitude: jax.Array) -> jax.Array:
    """Returns the index in `magnitude_bins` of each magnitude, ``(*groups, n)``."""
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    first = _first_key(state["min"], state["max"])
    return jnp.clip(_key(bits) - first[..., None], 0, BINS - 1)


def _key(bits: jax.Array) -> jax.Array:
    """Returns the number of the bin among those of all float32 magnitudes."""
    return (bits & 0x7FFFFFFF) >> _SHIFT


def _first_key(low: jax.Array, high: jax.Array) -> jax.Array:
    """Returns the number of the first bin of histograms with these extremes."""
    bits = jax.lax.bitcast_convert_type(jnp.maximum(-low, high), jnp.int32)
    # Exponents: that of infinity takes part only in batches that are then dropped.
    top = jnp.clip((bits & 0x7FFFFFFF) >> 23, _OCTAVES - 1, 254)
    return (top + 1 - _OCTAVES) * _OCTAVE


def _edges(state: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the borders of the bins of magnitudes, ``(*groups, BINS + 1)``."""
    first = _first_key(state["min"], state["max"])[..., None]
    bits = (first + jnp.arange(BINS + 1, dtype=jnp.int32)) << _SHIFT
    return jax.lax.bitcast_convert_type(bits, jnp.float32).at[..., 0].set(0)


def _masses(state: Mapping[str, jax.Array]) -> jax.Array:
    counts, carries = state["counts"], state["carries"]
    return counts.astype(jnp.float32) + carries.astype(jnp.float32) * 2.0**_WORD_BITS


def _move(state: Mapping[str, jax.Array], low: jax.Array, high: jax.Array) -> State:
    """Returns a histogram with the bins of one with wider extremes."""
    counts, carries = state["counts"], state["carries"]
    by = _first_key(low, high) - _first_key(state["min"], state["max"])
    by = by[..., None, None]
    index = jnp.arange(BINS, dtype=jnp.int32)
    source = jnp.broadcast_to(jnp.minimum(index + by, BINS - 1), counts.shape)
    is_first, stays = index <= by, index + by < BINS

    def moved(old: jax.Array, first: jax.Array) -> jax.Array:
        new = jnp.where(stays, jnp.take_along_axis(old, source, -1), 0)
        return jnp.where(index == 0, first, new).astype(old.dtype)

    # The sum of what joins the first bin, with carries, in two half words.
    joining = jnp.where(is_first, counts, 0)
    lower = jnp.sum(joining & 0xFFFF, -1, keepdims=True, dtype=jnp.uint32)
    upper = jnp.sum(joining >> 16, -1, keepdims=True, dtype=jnp.uint32) + (lower >> 16)
    half = _WORD_BITS - 16
    first = (lower & 0xFFFF) | ((upper & (2**half - 1)) << 16)
    carry = jnp.sum(jnp.where(is_first, carries, 0), -1, keepdims=True)
    return {
        "min": low,
        "max": high,
        "counts": moved(counts, first),
        "carries": moved(carries, carry + (upper >> half)),
    }


def _add(a: State, b: Mapping[str, jax.Array]) -> State:
    """Adds counts to a histogram with the same bins."""
    counts = a["counts"] + b["counts"]
    carries = a["carries"] + b["carries"] + (counts >> _WORD_BITS).astype(jnp.uint16)
    return {**a, "counts": counts & (2**_WORD_BITS - 1), "carries": carries}
