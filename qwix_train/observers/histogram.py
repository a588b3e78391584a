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
group of elements that has its own range, and ``bins`` is 2048 unless more are asked
for:

=============  =====================  =======  =====================================
name           shape                  dtype    content
=============  =====================  =======  =====================================
``min, max``   groups                 float32  the smallest and largest value, and 0
``counts``     (\*groups, 2, bins)    uint32   elements in each bin, modulo 2**31;
                                               the negative ones, then the others,
                                               ascending by magnitude
``carries``    (\*groups, 2, bins)    uint16   multiples of 2**31 beyond those
``positions``  (\*groups, 2, bins)    float32  only on demand: sums of where in their
                                               bins the elements lie, 0 at the end
                                               next to zero, 1 at the other
=============  =====================  =======  =====================================

That is 24 KiB for each group: 24 MiB for 1024 channels. An update takes two reductions
of the array and one scatter-add of as many ones as it has elements.

With ``positions`` the mean of each bin is known. Its elements then count as spread
evenly around that, as far as they may be without leaving the bin: a value that many
elements share (a padding, the end of a saturating activation) is where it is, or, if it
is close to the middle of its bin, within a quarter of the bin. Elements of the first
bin count as 0.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwix_train.observers import State

_OCTAVES = 16
_WORD_BITS = 31

_PER_BIN = ("counts", "carries", "positions")

MANTISSA_BITS = 7
"""Bits of the mantissa that a bin is chosen by, unless more are asked for."""

BINS = _OCTAVES * 2**MANTISSA_BITS
"""Bins for each sign, unless more are asked for."""


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


def init(
    groups: Sequence[int],
    mantissa_bits: int = MANTISSA_BITS,
    *,
    positions: bool = False,
) -> State:
    """Returns an empty histogram.

    Args:
        groups: The shape of the scale.
        mantissa_bits: An octave has two to the power of this many bins.
        positions: Whether to keep where in their bins the elements lie.
    """
    shape = (*groups, 2, _OCTAVES << mantissa_bits)
    state = {
        "min": jnp.zeros(tuple(groups), jnp.float32),
        "max": jnp.zeros(tuple(groups), jnp.float32),
        "counts": jnp.zeros(shape, jnp.uint32),
        "carries": jnp.zeros(shape, jnp.uint16),
    }
    return state | ({"positions": jnp.zeros(shape, jnp.float32)} if positions else {})


def update(
    state: Mapping[str, jax.Array], x: jax.Array, which: jax.Array | None = None
) -> State:
    """Adds the elements of an array.

    Args:
        state: A histogram.
        x: An array of floats, all finite, of the rank of the groups; along each axis,
            there is one group or one for each index. Below 2**31 elements. Computed
            with in float32.
        which: Which of its elements to add, all others being 0; None for all.

    Raises:
        ValueError: The groups do not fit the array.

    >>> hist = jax.jit(update)(init((1,)), jnp.array([1., -2., 1.5, 1.]))
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

    # Not placed by the state's extremes: of an array that several ops read, XLA then
    # sees that it needs one histogram only.
    shift = _shift(state)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    first = _first_key(low, high, shift)
    index = jnp.clip(_key(bits, shift) - first, 0, _bins(state) - 1)
    is_first = index == 0
    index = index + jnp.where(bits < 0, 0, _bins(state))
    group = jnp.arange(math.prod(groups), dtype=jnp.int32).reshape(groups)
    # Not as a vector: XLA would send all of an array that is sharded along inner axes.
    index = index + group * (2 * _bins(state))

    def added(key: str, what: jax.Array | int) -> jax.Array:
        flat = jnp.zeros(state[key].size, state[key].dtype)
        flat = flat.at[index].add(
            jnp.asarray(what, flat.dtype), mode="promise_in_bounds"
        )
        return flat.reshape(state[key].shape)

    batch = {
        "min": low,
        "max": high,
        "counts": added("counts", 1 if which is None else which),
        "carries": jnp.zeros_like(state["carries"]),
    }
    if "positions" in state:
        position = (bits & ((1 << shift) - 1)).astype(jnp.float32) * 2.0**-shift
        batch["positions"] = added("positions", jnp.where(is_first, 0, position))
    return merge(state, batch)


def merge(a: Mapping[str, jax.Array], b: Mapping[str, jax.Array]) -> State:
    """Returns the histogram of the elements of both.

    >>> x = jnp.array([1., -200., 1.5, 1.])
    >>> add = jax.jit(update)
    >>> one, two = (add(init((1,)), part) for part in (x[:2], x[2:]))
    >>> merged, whole = jax.jit(merge)(two, one), add(init((1,)), x)
    >>> all(bool((merged[key] == whole[key]).all()) for key in whole)
    True
    """
    low, high = jnp.minimum(a["min"], b["min"]), jnp.maximum(a["max"], b["max"])
    return _add(_moved(a, low, high), _moved(b, low, high))


def coarse(state: Mapping[str, jax.Array]) -> State:
    """Returns the histogram with bins of the usual width, without positions.

    It equals the one that the same data would have made, bit for bit.

    >>> x = jnp.array([1., -200., 1.5, 1.])
    >>> add = jax.jit(update)
    >>> got = jax.jit(coarse)(add(init((1,), 10, positions=True), x))
    >>> want = add(init((1,)), x)
    >>> all(bool((got[key] == want[key]).all()) for key in want | got)
    True
    """
    shape = (*state["counts"].shape[:-1], BINS, _bins(state) // BINS)
    counts, carry = _total(state["counts"].reshape(shape))
    carries = state["carries"].reshape(shape).sum(-1, dtype=jnp.uint16)
    return {
        "min": state["min"],
        "max": state["max"],
        "counts": counts[..., 0],
        "carries": carries + carry[..., 0].astype(jnp.uint16),
    }


def signed_bins(state: Mapping[str, jax.Array]) -> Bins:
    """Returns the distribution of the values."""
    edges, masses = _edges(state)[..., None, :], _masses(state)
    lower = jnp.broadcast_to(edges[..., :-1], masses.shape)
    upper = jnp.broadcast_to(edges[..., 1:], masses.shape)
    if "positions" in state:
        mean = state["positions"] / jnp.maximum(masses, 1)
        spread = jnp.minimum(mean, 1 - mean)
        width = upper - lower
        lower, upper = (lower + width * (mean + side * spread) for side in (-1, 1))
    extremes = jnp.stack([-state["min"], state["max"]], -1)[..., None]
    lower, upper = (jnp.minimum(end, extremes) for end in (lower, upper))
    return Bins(
        jnp.concatenate([masses[..., 0, ::-1], masses[..., 1, :]], -1),
        jnp.concatenate([-upper[..., 0, ::-1], lower[..., 1, :]], -1),
        jnp.concatenate([-lower[..., 0, ::-1], upper[..., 1, :]], -1),
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
    shift = _shift(state)
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    first = _first_key(state["min"], state["max"], shift)
    return jnp.clip(_key(bits, shift) - first[..., None], 0, _bins(state) - 1)


def _bins(state: Mapping[str, jax.Array]) -> int:
    return state["counts"].shape[-1]


def _shift(state: Mapping[str, jax.Array]) -> int:
    """Returns how many bits of the mantissa say where in its bin a value lies."""
    return 24 - (_bins(state) // _OCTAVES).bit_length()


def _key(bits: jax.Array, shift: int) -> jax.Array:
    """Returns the number of the bin among those of all float32 magnitudes."""
    return (bits & 0x7FFFFFFF) >> shift


def _first_key(low: jax.Array, high: jax.Array, shift: int) -> jax.Array:
    """Returns the number of the first bin of histograms with these extremes."""
    bits = jax.lax.bitcast_convert_type(jnp.maximum(-low, high), jnp.int32)
    # Exponents: that of infinity takes part only in batches that are then dropped.
    top = jnp.clip((bits & 0x7FFFFFFF) >> 23, _OCTAVES - 1, 254)
    return (top + 1 - _OCTAVES) << (23 - shift)


def _edges(state: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the borders of the bins of magnitudes, ``(*groups, bins + 1)``."""
    shift = _shift(state)
    first = _first_key(state["min"], state["max"], shift)[..., None]
    index = jnp.arange(_bins(state) + 1, dtype=jnp.int32)
    bits = (first + jnp.expand_dims(index, tuple(range(first.ndim - 1)))) << shift
    return jax.lax.bitcast_convert_type(bits, jnp.float32).at[..., 0].set(0)


def _masses(state: Mapping[str, jax.Array]) -> jax.Array:
    counts, carries = state["counts"], state["carries"]
    return counts.astype(jnp.float32) + carries.astype(jnp.float32) * 2.0**_WORD_BITS


def _moved(state: Mapping[str, jax.Array], low: jax.Array, high: jax.Array) -> State:
    """Returns a histogram with the bins of one with wider extremes."""
    shift = _shift(state)
    by = _first_key(low, high, shift) - _first_key(state["min"], state["max"], shift)
    bins = {key: state[key] for key in _PER_BIN if key in state}
    # Most batches move nothing, and then it need not take any time.
    bins = jax.lax.cond(jnp.any(by > 0), _move, lambda bins, by: bins, bins, by)
    return {"min": low, "max": high, **bins}


def _move(bins: State, by: jax.Array) -> State:
    """Returns bins with the lowest ones, as many as given, joined into the first."""
    counts = bins["counts"]
    by = by[..., None, None]
    index = jnp.arange(counts.shape[-1], dtype=jnp.int32)
    index = jnp.expand_dims(index, tuple(range(by.ndim - 1)))
    source = jnp.broadcast_to(
        jnp.minimum(index + by, counts.shape[-1] - 1), counts.shape
    )
    is_first, stays = index <= by, index + by < counts.shape[-1]
    count, carry = _total(jnp.where(is_first, counts, 0))
    carry += jnp.sum(
        jnp.where(is_first, bins["carries"], 0), -1, keepdims=True, dtype=carry.dtype
    )
    # Elements of the first bin are at position 0.
    first = {"counts": count, "carries": carry, "positions": jnp.zeros_like(count)}

    def moved(key: str, old: jax.Array) -> jax.Array:
        new = jnp.where(stays, jnp.take_along_axis(old, source, -1), 0)
        return jnp.where(index == 0, first[key].astype(old.dtype), new)

    return {key: moved(key, old) for key, old in bins.items()}


def _total(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of counts modulo 2**31, and the carries, as half words give."""
    lower = jnp.sum(counts & 0xFFFF, -1, keepdims=True, dtype=jnp.uint32)
    upper = jnp.sum(counts >> 16, -1, keepdims=True, dtype=jnp.uint32) + (lower >> 16)
    half = _WORD_BITS - 16
    return (lower & 0xFFFF) | ((upper & (2**half - 1)) << 16), upper >> half


def _add(a: State, b: Mapping[str, jax.Array]) -> State:
    """Adds counts to a histogram with the same bins."""
    counts = a["counts"] + b["counts"]
    carries = a["carries"] + b["carries"] + (counts >> _WORD_BITS).astype(jnp.uint16)
    sums = {**a, "counts": counts & (2**_WORD_BITS - 1), "carries": carries}
    if "positions" in a:
        sums["positions"] = a["positions"] + b["positions"]
    return sums
