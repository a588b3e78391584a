import jax.numpy as jnp
import pytest

from qwix_train.core import operands as ops
from qwix_train.core.qarray import quantize

X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    "qtype, method, largest",
    [("int8", "absmax", 128), ("int8", "minmax", 255), ("int4", "absmax", 8)]
    + [("int1", "absmax", 1), ("int1", "minmax", 2)],
)
def test_magnitude_of_a_qarray(qtype, method, largest):
    q = quantize(X, qtype, calibration_method=method)
    assert ops.magnitude(q) == largest
    assert ops.max_terms(q, q) * largest**2 <= 2**31 - 1


def test_magnitude_of_an_array():
    assert ops.magnitude(X.astype(jnp.uint8)) == 255
    assert ops.magnitude(X.astype(jnp.bool_)) == 1


def test_common_codes():
    q = {t: quantize(X, t) for t in ("int4", "int8", "float8_e4m3fn", "float8_e5m2")}

    def dtypes(a, b):
        return tuple(c.dtype.name for c in ops.common_codes(a, b))

    assert dtypes(q["int4"], q["int8"]) == ("int8", "int8")
    e4m3, e5m2 = q["float8_e4m3fn"], q["float8_e5m2"]
    assert dtypes(e4m3, e4m3) == ("float8_e4m3fn",) * 2
    assert dtypes(e4m3, e5m2) == dtypes(e5m2, q["int4"]) == ("bfloat16",) * 2
    assert dtypes(X.astype(jnp.uint8), q["int8"]) == ("int16", "int8")


def test_result_dtype():
    q = quantize(X, "int8")
    assert ops.result_dtype(q, q.astype(jnp.bfloat16)) == jnp.float32
    assert ops.result_dtype(q, preferred=jnp.float16) == jnp.float16
    assert ops.result_dtype(q.qvalue, q.qvalue) == jnp.int32
    assert ops.result_dtype(X.astype(jnp.float8_e5m2), q) == jnp.float32
