import jax
import pytest
from jax import numpy as jnp

from qwix_train.trace.scopes import module_path_of, module_scope


@pytest.mark.parametrize(
    "stack, path",
    [
        ("", ""),
        ("outer/inner", ""),
        ("@a|b@", "a/b"),
        ("jit(f)/@a@/x/@a|Dense_0@/bi,io->bo", "a/Dense_0"),
        ("vmap(@a@)/y", "a"),
        ("@a@/@@", ""),
        ("@a@nnx~/@@linen~/@Dense_0@linen~/x", "a/Dense_0"),
        ("@a@linen~/@a@linen~/@@nnx~/jit(f)/@b|c@nnx~batch_norm", "a/b/c"),
    ],
)
def test_module_path_of(stack, path):
    assert module_path_of(stack) == path


def test_marks_are_read_back():
    def fn(x):
        with module_scope("encoder"), jax.named_scope("x"), module_scope("encoder/b"):
            x = jnp.sin(x)
        with module_scope("decoder"):
            return jax.vmap(jnp.cos)(x)

    sin, cos = jax.make_jaxpr(fn)(jnp.ones(3)).jaxpr.eqns
    assert module_path_of(str(sin.source_info.name_stack)) == "encoder/b"
    assert module_path_of(str(cos.source_info.name_stack)) == "decoder"
