"""LoRA+: a higher learning rate for the B matrices of adapters."""

import math
from typing import Any

import jax
import optax

from qwix_train.optim import _arguments, _paths
from qwix_train.planning.leaves import adapter_part


def lora_plus(
    tx: optax.GradientTransformation, ratio: float = 16.0
) -> optax.GradientTransformationExtraArgs:
    r"""Gives the B matrices of adapters a higher learning rate.

    For adapters :math:`W + s A B`, with :math:`A` drawn at random and :math:`B`
    initialized with zeros, the efficient learning rates in the limit of wide layers
    are :math:`\eta_B / \eta_A = \lambda \gg 1`. The updates :math:`u` of ``tx`` become

    .. math::
        u_A \leftarrow u_A, \qquad u_B \leftarrow \lambda u_B,

    which, for a ``tx`` that ends in a multiplication by the learning rate, is ``tx``
    with that learning rate for :math:`A` and :math:`\lambda` times as much for
    :math:`B`, decoupled weight decay included.

    B matrices are the params whose last name is ``lora_b`` or ends in ``_lora_b``, as
    in ``Dense_0/kernel_lora_b``. All others (A matrices, the magnitudes of DoRA, params
    that are not adapters) get the updates of ``tx`` as they are.

    Args:
        tx: The transformation, learning rate included, such as ``optax.adamw(1e-4)``.
        ratio: :math:`\lambda`; a positive number, or a traced one, as
            `optax.inject_hyperparams` gives it. The paper recommends 16.

    Returns:
        The transformation. Its state is that of ``optax.chain(tx, ...)``.

    Raises:
        TypeError: ``tx`` is not a transformation.
        ValueError: ``ratio`` is not positive; or, from ``init`` and ``update``, no
            param is a B matrix.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from qwix_train.optim import lora_plus
        >>> params = {'w_lora_a': jnp.ones((3, 2)), 'w_lora_b': jnp.zeros((2, 3))}
        >>> tx = lora_plus(optax.sgd(0.5), ratio=16.0)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> updates['w_lora_a'][0, 0].item(), updates['w_lora_b'][0, 0].item()
        (-0.5, -8.0)

    References:
        Hayou et al., `LoRA+: Efficient Low Rank Adaptation of Large Models
        <https://arxiv.org/abs/2402.12354>`_, 2024, section 4
    """
    _arguments.check_transformation("lora_plus", tx)
    if isinstance(ratio, int | float) and not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(f"lora_plus(ratio={ratio!r}): the ratio must be positive.")
    return optax.chain(tx, optax.masked(optax.scale(ratio), _is_lora_b))


def _is_lora_b(params: Any) -> Any:
    """Returns the tree with True at the B matrices."""
    paths = _paths.param_paths(params)
    mask = jax.tree.map(_names_lora_b, paths)
    if not any(jax.tree.leaves(mask)) and jax.tree.leaves(paths):
        raise ValueError(
            "lora_plus found no B matrix of an adapter, which is a param whose name "
            "is lora_b, or that of its param with lora_b behind it. The params are "
            f"{_paths.listed(jax.tree.leaves(paths))}. Give it the params of the "
            "adapters, or a model that has some."
        )
    return mask


def _names_lora_b(path: str) -> bool:
    *_, name = names = tuple(path.split("/"))
    return name == "lora_b" or adapter_part(names) == "b"
