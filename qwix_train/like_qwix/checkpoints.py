"""Params that were quantized by another library, for models of this one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx, traverse_util
from jax import numpy as jnp

from qwix_train.core.errors import located
from qwix_train.core.qarray import QArray, WithAux, dequantize, validate_qarray
from qwix_train.planning.rules import QuantizationRule
from qwix_train.values import stored

_PARTS = ("qvalue", "scale", "zero_point")
_OF_WEIGHTS = object()


def process_prequantized_params(
    checkpoint_params: Mapping[str, Any],
    template_params: Any,
    *,
    allow_extra_params: bool = False,
    use_checkpoint_sharding: bool = False,
) -> Any:
    """Params of a checkpoint, quantized or not, as an NNX model holds them.

    Args:
      checkpoint_params: a nested dictionary with the paths of the model. Its leaves are
        arrays, or dictionaries of `qvalue`, `scale` and, with a range that is not
        around zero, `zero_point`; `array` may stand around those.
      template_params: the quantized NNX model, which may be abstract. Where it holds a
        param in float, codes are dequantized.
      allow_extra_params: whether params that the model does not have are left out.
      use_checkpoint_sharding: whether arrays stay on the devices on which the
        checkpoint has them; else they go to those of the model.

    Returns:
      A nested dictionary of arrays that `nnx.update(model, ...)` takes.

    Raises:
      TypeError: if the template is not an NNX model.
      ValueError: if a param does not fit the one of the model.
    """
    if not isinstance(template_params, nnx.Module):
        raise TypeError(
            "process_prequantized_params takes NNX models, got "
            f"{type(template_params).__name__}. For a Linen model, put WithAux and "
            "QArray into the tree, or use qwix_train.ptq.restore."
        )
    processed = {}
    for path, given in _leaves(checkpoint_params).items():
        where = "/".join(map(str, path))
        boxed = path[-1] == "array" and isinstance(given, Mapping)
        owner = path[:-1] if boxed else path
        target = _at(template_params, owner)
        if target is None:
            if allow_extra_params:
                continue
            raise ValueError(
                f"The model has no param {where!r}. Leave it out of the checkpoint, or "
                "pass allow_extra_params=True."
            )
        keeps = use_checkpoint_sharding
        if isinstance(target, WithAux):
            array = stored.unbox(target.array)
            if not isinstance(given, Mapping):
                raise ValueError(
                    f"{where} is quantized in the model, and an array of "
                    f"{given.dtype} in the checkpoint. Quantize it: quantize_params."
                )
            placed = _fitting(where, given, array, keeps)
            parts = {name: x for name, x in placed.items() if x is not None}
            processed[(*owner, "array")] = parts
        else:
            value = given
            if isinstance(given, Mapping):
                value = dequantize(_qarray(where, given))
            processed[owner] = _placed(where, value, stored.unbox(target), keeps)
    return traverse_util.unflatten_dict(processed)


def restore_quantization_rules(
    checkpoint_params: Mapping[str, Any],
    rule_type: type[QuantizationRule],
    *,
    tile_size: int,
    act_qtype: Any = _OF_WEIGHTS,
    **kwargs: Any,
) -> list[QuantizationRule]:
    """The rules that params of a checkpoint were quantized by, one for each module.

    Args:
      checkpoint_params: see `process_prequantized_params`.
      rule_type: the type of the rules.
      tile_size: their tile size.
      act_qtype: the type of activations; by default, that of the weight.
      **kwargs: other fields of the rules.

    Warns:
      UserWarning: if the weights of a module have different types: the last one counts.
    """
    rules: dict[str, QuantizationRule] = {}
    for path, given in _leaves(checkpoint_params).items():
        if not isinstance(given, Mapping):
            continue
        module = path[:-2] if path[-1] == "array" else path[:-1]
        # Layers of a list are alike.
        parts = ("[^/]+" if isinstance(part, int) else str(part) for part in module)
        pattern = "/".join(parts)
        weight_qtype = given["qvalue"].dtype
        symmetric = given.get("zero_point") is None
        rule = rule_type(
            module_path=pattern,
            weight_qtype=weight_qtype,
            act_qtype=weight_qtype if act_qtype is _OF_WEIGHTS else act_qtype,
            weight_calibration_method="absmax" if symmetric else "minmax",
            tile_size=tile_size,
            **kwargs,
        )
        if rules.get(pattern, rule) != rule:
            warnings.warn(
                f"Weights of {pattern!r} were quantized by different rules: {rule} "
                f"takes the place of {rules[pattern]}.",
                stacklevel=2,
            )
        rules[pattern] = rule
    return list(rules.values())


def _leaves(params: Mapping[str, Any]) -> dict[tuple[Any, ...], Any]:
    """The arrays of a checkpoint, and its quantized ones as dictionaries."""
    return traverse_util.flatten_dict(
        dict(params), is_leaf=lambda _, x: isinstance(x, Mapping) and "qvalue" in x
    )


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    """What a model holds at a path; None if there is nothing."""
    for key in path:
        if isinstance(node, Mapping):
            node = node.get(key)
        elif isinstance(key, int):
            node = node[key] if 0 <= key < len(node) else None
        else:
            node = getattr(node, key, None)
        if node is None:
            return None
    return node


def _qarray(where: str, given: Mapping[str, Any]) -> QArray:
    unknown, missing = set(given) - set(_PARTS), {"qvalue", "scale"} - set(given)
    if unknown or missing:
        raise ValueError(
            f"{where} has {', '.join(sorted(given))}; a quantized param has qvalue, "
            "scale and, if its range is not around zero, zero_point."
        )
    zero_point = given.get("zero_point")
    array = QArray(
        jnp.asarray(given["qvalue"]),
        jnp.asarray(given["scale"]),
        None if zero_point is None else jnp.asarray(zero_point),
    )
    with located(where):
        validate_qarray(array)
    return array


def _fitting(
    where: str, given: Mapping[str, Any], target: QArray, keeps: bool
) -> dict[str, Any]:
    """The parts of a quantized param, as the model has them."""
    source = _qarray(where, given)
    for name, had, has, remedy in (
        ("codes", source.qvalue.dtype, target.qvalue.dtype, "weight_qtype"),
        (
            "a zero_point",
            source.zero_point is not None,
            target.zero_point is not None,
            "weight_calibration_method ('minmax' has a zero_point, 'absmax' none)",
        ),
    ):
        if had != has:
            raise ValueError(
                f"{where} in the checkpoint and in the model, {name}: {had} and {has}. "
                f"Set the rule's {remedy}; see restore_quantization_rules."
            )
    parts = {}
    for name in _PARTS:
        value, wanted = getattr(source, name), getattr(target, name)
        if value is not None and name != "qvalue":
            value = _spread(where, value, wanted.shape)
        parts[name] = None if value is None else _placed(where, value, wanted, keeps)
    return parts


def _spread(where: str, value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Scales of larger tiles, repeated for the smaller ones of the model."""
    for axis, (have, want) in enumerate(zip(value.shape, shape, strict=True)):
        if have != want and want % max(have, 1) == 0:
            value = jnp.repeat(value, want // have, axis)
    if value.shape != shape:
        raise ValueError(f"{where} has scales of shape {value.shape}, not {shape}.")
    return value


def _placed(where: str, value: Any, target: Any, keeps: bool) -> jax.Array:
    """An array with the shape, the dtype and the devices of the model's."""
    if tuple(value.shape) != tuple(target.shape):
        raise ValueError(
            f"{where} has shape {tuple(value.shape)}, and {tuple(target.shape)} in the "
            "model."
        )
    sharding = getattr(value if keeps else target, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding) and isinstance(
        sharding.mesh, jax.sharding.AbstractMesh
    ):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(
                f"{where} is sharded over a mesh that is not known here: call "
                "process_prequantized_params within jax.set_mesh(mesh)."
            )
        sharding = jax.sharding.NamedSharding(mesh, sharding.spec)
    value = jnp.asarray(value) if sharding is None else jax.device_put(value, sharding)
    return value.astype(target.dtype)
