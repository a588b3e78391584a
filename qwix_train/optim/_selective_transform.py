"""Training of some params, chosen by the patterns of their paths."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from qwix_train.optim import _arguments, _paths


def selective_transform(
    tx: optax.GradientTransformation,
    *,
    freeze: str | Sequence[str] | None = None,
    train: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains some params and freezes the others, by the patterns of their paths.

    This is Optax's function of the same name, with patterns instead of a mask. Frozen
    params get updates of zero, and ``tx`` sees the others alone. So ``tx`` has no state
    for frozen params, and their gradients are not part of a global norm.

    A pattern is a regular expression for the whole path of a param: the names from the
    root joined by ``/``, as in ``Dense_0/kernel``. A quantized array is one param.

    Args:
        tx: The transformation for the params that are trained.
        freeze: Pattern or patterns of the params that are frozen; the others are
            trained.
        train: Instead of ``freeze``: pattern or patterns of the params that are
            trained; the others are frozen.

    Returns:
        The transformation. Its state is that of `optax.partition` with the labels
        ``'train'`` and ``'freeze'``.

    Raises:
        TypeError: ``tx`` is not a transformation, or a pattern is not a string.
        ValueError: Not exactly one of ``freeze`` and ``train`` is given, there is no
            pattern, or one is not a regular expression; or, from ``init`` and
            ``update``, a pattern matches no param.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from qwix_train.optim import selective_transform
        >>> params = {'embed': {'table': jnp.ones(3)}, 'head': {'kernel': jnp.ones(2)}}
        >>> tx = selective_transform(optax.sgd(1.0), freeze='embed/.*')
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> updates['embed']['table'].tolist(), updates['head']['kernel'].tolist()
        ([0.0, 0.0, 0.0], [-1.0, -1.0])

        Adapters alone: ``selective_transform(tx, train='.*_lora_(a|b|magnitude)')``.
    """
    _arguments.check_transformation("selective_transform", tx)
    if (freeze is None) == (train is None):
        raise ValueError(
            "selective_transform takes either freeze=, the patterns of the params that "
            "are frozen, or train=, those of the params that are trained."
        )
    if train is None:
        labels = _labels("freeze", freeze, matched="freeze", others="train")
    else:
        labels = _labels("train", train, matched="train", others="freeze")
    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)


def _labels(
    argument: str, patterns: str | Sequence[str] | None, matched: str, others: str
) -> Callable[[Any], Any]:
    """Returns the function that gives each param one of two labels."""
    patterns = _checked_patterns(argument, patterns)

    def label(path: str) -> str:
        return matched if any(re.fullmatch(p, path) for p in patterns) else others

    def labels(params: Any) -> Any:
        paths = _paths.param_paths(params)
        names = jax.tree.leaves(paths)
        for pattern in patterns if names else ():
            if not any(re.fullmatch(pattern, name) for name in names):
                raise ValueError(
                    f"selective_transform: the pattern {pattern!r} of {argument}= "
                    "matches the whole path of no param. The params are "
                    f"{_paths.listed(names)}."
                )
        return jax.tree.map(label, paths)

    return labels


def _checked_patterns(argument: str, patterns: Any) -> tuple[str, ...]:
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not patterns:
        raise ValueError(f"selective_transform({argument}=...): there is no pattern.")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"selective_transform({argument}=...): a pattern is a string, not "
                f"{pattern!r}."
            )
        _paths.check_pattern(f"selective_transform({argument}=...)", pattern)
    return patterns
