import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from qwix_train.core import numerics
from qwix_train.core.formats import levels as tables
from tests.core.reference import QTYPE_NAMES

INTEGERS = [f"int{bits}" for bits in range(1, 9)]
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 3e38], np.float32)


@pytest.mark.parametrize(
    "given, same",
    [
        ("int8", [jnp.int8, np.int8, np.dtype("int8"), "int8"]),
        ("int4", [jnp.int4, jnp.dtype("int4"), "int4"]),
        ("float8_e5m2", [jnp.float8_e5m2, "float8_e5m2"]),
        ("int3", ["int3"]),
        ("nf4", ["nf4"]),
    ],
)
def test_forms_of_a_type_are_one(given, same):
    canonical = numerics.canonical_qtype(given)
    for other in same:
        assert canonical == other
        assert numerics.canonical_qtype(other) == canonical
        assert hash(numerics.canonical_qtype(other)) == hash(canonical)
    assert numerics.canonical_qtype(canonical) == canonical
    assert canonical != "int7"


@pytest.mark.parametrize(
    "bad",
    ["uint8", jnp.uint8, "uint4", "int9", "int16", "float32", "INT8", None, int, 8]
    + [[1], "mxfp5", jnp.bfloat16],
)
def test_unknown_types_are_refused_by_name(bad):
    with pytest.raises(ValueError, match="Choose from int1.*nf4") as error:
        numerics.canonical_qtype(bad)
    assert repr(bad) in str(error.value)


@pytest.mark.parametrize("qtype", QTYPE_NAMES)
def test_codes_fit_their_storage(qtype):
    x = jnp.linspace(-70000, 70000, 4001)
    codes = numerics.round_to_qtype(x, qtype)
    assert codes.dtype == numerics.storage_dtype(qtype)
    levels = numerics.codes_to_float(codes, qtype, jnp.float32)
    assert np.isfinite(levels).all()
    assert (np.diff(levels) >= 0).all()
    if qtype in INTEGERS:
        assert (int(levels[0]), int(levels[-1])) == numerics.code_range(qtype)


@pytest.mark.parametrize("qtype", INTEGERS[1:])
def test_integers_round_half_to_even(qtype):
    low, high = numerics.code_range(qtype)
    x = np.arange(low - 2, high + 2, 0.25, np.float32)
    want = np.clip(np.round(x.astype(np.float64)), low, high)
    got = numerics.round_to_qtype(jax.device_put(x), qtype).astype(jnp.float32)
    np.testing.assert_array_equal(got, want)


def test_int1_is_the_sign():
    codes = numerics.round_to_qtype(jnp.array([-3.0, -1e-30, -0.0, 0.0, 2.0]), "int1")
    assert codes.tolist() == [-1, -1, 1, 1, 1]


def test_nf4_levels_are_the_paper_s_construction():
    # Appendix E: quantiles of the normal, each half with its own number of levels.
    from statistics import NormalDist

    offset = 0.5 * (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16))
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*positive, 0.0, *negative]))
    np.testing.assert_allclose(tables.NF4, levels / levels.max(), atol=2e-7)


def test_nf4_takes_the_nearest_level():
    x = np.random.default_rng(0).uniform(-1.2, 1.2, 20000).astype(np.float32)
    levels = np.array(tables.NF4)
    middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    x = np.concatenate(
        [x, middles, np.nextafter(middles, 2), np.nextafter(middles, -2)]
    )
    # As float32 computes the distances; `argmin` takes the lower level on a tie.
    want = np.argmin(np.abs(np.float32(tables.NF4) - x[:, None]), axis=1)
    np.testing.assert_array_equal(tables.encode(jax.device_put(x), tables.NF4), want)


def test_nf4_materializes_no_axis_of_levels():
    x = jnp.zeros((8, 32))
    encode = functools.partial(tables.encode, table=tables.NF4)
    decode = functools.partial(tables.decode, table=tables.NF4, dtype=jnp.float32)
    text = str(jax.make_jaxpr(encode)(x)) + str(jax.make_jaxpr(decode)(encode(x)))
    for word in ("16]", "16,", "gather", "while", "scan", "argmin"):
        assert word not in text


@pytest.mark.thinned(3)
@pytest.mark.parametrize("qtype", QTYPE_NAMES)
def test_special_values(qtype):
    x = jax.device_put(SPECIAL)
    eager = numerics.round_to_qtype(x, qtype)
    levels = numerics.codes_to_float(eager, qtype, jnp.float32)
    ends = numerics.codes_to_float(
        numerics.round_to_qtype(jnp.array([6e4, -6e4]), qtype), qtype, jnp.float32
    )
    zero = 1.0 if qtype == "int1" else 0.0
    nan = np.nan if qtype.startswith("float8") else zero
    want = [nan, ends[0], ends[1], zero, zero, zero, ends[0]]
    np.testing.assert_array_equal(levels, want)
    compiled = jax.jit(lambda x: numerics.round_to_qtype(x, qtype))(x)
    np.testing.assert_array_equal(
        compiled.astype(jnp.float32), eager.astype(jnp.float32)
    )


@pytest.mark.thinned(3)
@pytest.mark.parametrize("qtype", QTYPE_NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_level_is_what_the_code_stands_for(qtype, dtype):
    x = np.random.default_rng(1).normal(0, 3, 3000).astype(np.float32)
    x = jnp.concatenate([jax.device_put(x), jax.device_put(SPECIAL)])
    codes = numerics.round_to_qtype(x, qtype)
    want = numerics.codes_to_float(codes, qtype, dtype).astype(jnp.float32)
    want = jnp.where(jnp.isnan(x), x, want)
    got = numerics.round_to_level(x, qtype, dtype)
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_no_zero_points_for_float_types():
    for qtype in ("nf4", "float8_e4m3fn"):
        with pytest.raises(ValueError, match=f"{qtype} has no zero points"):
            numerics.asymmetric_bound(qtype)


@hypothesis.given(st.floats(width=32, allow_nan=False, max_value=6e4, min_value=-6e4))
@hypothesis.settings(max_examples=100)
def test_rounding_to_float16_by_hand(x):
    got = numerics.round_to_dtype(jnp.float32(x), jnp.float16)
    assert float(got) == float(np.float16(x)) or abs(x) < 1e-37


def test_true_divide_by_a_constant_is_a_division():
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    divisor = np.float32(0.013)
    got = jax.jit(lambda x: numerics.true_divide(x, divisor))(x)
    np.testing.assert_array_equal(got, x / divisor)
    assert (x / divisor != x * (np.float32(1) / divisor)).any()
