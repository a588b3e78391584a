"""Random keys among the arguments of public functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp


def checked(rngs: Any, name: str = "rngs") -> Any:
    """A random key, or keys by the names of their streams, as they were given.

    Args:
      rngs: the key or keys. Shapes of keys will do.
      name: the name of the argument.

    Raises:
      TypeError: if one is not a key, such as the int that keys are made from.

    Example:
      >>> checked(0)
      Traceback (most recent call last):
      ...
      TypeError: rngs=0 is not a random key. Make one of it: jax.random.key(0).
    """
    if isinstance(rngs, Mapping):
        for stream, key in rngs.items():
            checked(key, f"{name}[{stream!r}]")
    elif not _is_key(rngs):
        is_seed = isinstance(rngs, int | np.integer) and not isinstance(rngs, bool)
        made, key = ("Make one of it", rngs) if is_seed else ("Pass one", 0)
        advice = f"{made}: jax.random.key({key})."
        raise TypeError(f"{name}={rngs!r} is not a random key. {advice}")
    return rngs


def by_stream(rngs: Any) -> dict[str, Any]:
    """Random keys by the names of their streams, among them one for params.

    Args:
      rngs: a key, which is that of params; keys by the names of their streams; or None.

    Raises:
      TypeError: if one is not a key.
    """
    keys = {} if rngs is None else checked(rngs)
    keys = keys if isinstance(keys, Mapping) else {"params": keys}
    return {"params": jax.random.key(0), **keys}


def _is_key(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return False
    is_typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return is_typed or (dtype == jnp.uint32 and np.ndim(value) > 0)
