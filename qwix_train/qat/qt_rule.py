"""Rules for quantized training: how the products of the backward pass are quantized."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qwix_train.core import how, numerics, rotations
from qwix_train.core.stochastic_rounding import NOISE_NAMES
from qwix_train.observers.averaging import parse_averaging
from qwix_train.observers.statistics import Statistics, make_statistics
from qwix_train.planning.rules import QuantizationRule


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class QtRule(QuantizationRule):
    r"""Selects ops, and says how they are computed in quantized training.

    Without `bwd_qtype` it is a `QuantizationRule`. With it, the three products of an
    op are computed from codes. With ``Q`` for the codes and ``s`` for the scales, and
    ``y = x @ w``,

        y  = s_x s_w (Q_x @ Q_w)
        dx = s_g (Q(g s_w) @ Q_w^T)
        dw = s_g (Q_x^T @ Q(g s_x))

    So 8-bit types meet 8-bit types. The scales of the forward go into the gradient
    ``g``, before ``g`` is quantized for the product. The gradient has a scale for each
    index along the axes that the product keeps, unless the rule sets
    `disable_channelwise_axes`. ``y`` is the same as without `bwd_qtype`, to float
    rounding. Forward-mode and second derivatives are refused, as for every
    `jax.custom_vjp`.

    Some operands have no codes to multiply: one that stays in float, has small tiles or
    a zero point, is nf4, or reaches the op through arithmetic. Then its values are
    multiplied.

    Scales of the forward are constant along the axis that the forward sums over. In
    published recipes, scales are constant along the axis that each product sums over.
    For these, `bwd_residuals` quantizes the operands once more for the backward pass,

        dx = Q(g) @ Q(w)^T
        dw = Q(x)^T @ Q(g)

    with ``Q(w)`` in groups along the outputs, and ``Q(x)`` in groups along the rows.
    Where tiles are a mapping by axis, or there is one scale for the whole array, these
    are the codes of the forward. `docs/quantized_training.md` has the recipes.

    Attributes:
      bwd_qtype: the type of the gradients that enter the two backward products:
        `"int8"`, `"float8_e5m2"` or any other that `weight_qtype` takes. They stay in
        float if None.
      bwd_calibration_method: how the range of a gradient is found: `"absmax"`,
        `"absmax,0.9"`, `"minmax"`, `"rms,4"` or `"fixed,-1,1"`.
      bwd_tile_size: for the incoming gradient, the number of elements that share a
        scale along the last axis that a backward product contracts, as `tile_size`:
        along the outputs for the gradient of an activation. All of them if None.
      bwd_weight_grad_tile_size: the same for the product that gives the gradient of a
        weight; `bwd_tile_size` if None. This product contracts axes of the activation,
        such as that of the sequence. A larger tile spans sequences.
      bwd_residuals: what the incoming gradient is multiplied by. `"quantized"`: the
        codes of the forward. `"original"`: the operand as it was, quantized by the
        fields of the forward, in groups along the axis that the backward product
        contracts. It is kept in float for that. `"requantized"`: the same, made from
        the values of the codes, so only codes are kept. Activations with static ranges
        always have the codes of the forward.
      bwd_weight_grad_rotation: a rotation for the product that gives the gradient of a
        weight. Both operands are rotated along the last axis that it contracts, before
        they are quantized. Written like `rotation`. If activations are quantized, it
        needs another `bwd_residuals` than `"quantized"`.
      bwd_averaging: delayed scaling of gradients, as `act_averaging` for activations.
        `"amax_history,16"` quantizes a gradient by the largest magnitude of the 16
        steps before it, with one scale. It is measured in the backward pass, and kept
        in the state of the step: see `attach` and `wrap_train_step`. If None, the range
        is that of the gradient itself. A factor of the calibration method is the
        margin: `"absmax,2"` leaves one bit of it.
      bwd_axis_names: for gradients what `act_axis_names` is for activations. A
        gradient has one scale then: set `disable_channelwise_axes`, or `bwd_averaging`.
      bwd_stochastic_rounding: `"uniform"` or `"low_bit_uniform"` noise for stochastic
        rounding of gradients, of every type; to nearest if None. It makes the backward
        products unbiased, if the range covers the gradient, as that of `"absmax"` does.
        For integers that range is half a step wider than for rounding to nearest, so
        that no code is clipped.
      channelwise_noise_axes: the axes of a gradient along which each index has noise
        of its own. Negative ones count from the last, and axes that it does not have do
        not count. Along the other axes elements share their noise, which is faster. For
        independent errors, name all axes: `(0, 1)` for a matrix.
      additional_qt_config: settings of `qwix`. Only `{"use_original_residuals": False}`
        has a meaning: backward products take what the forward has quantized. That is
        the default here, so it becomes None. So do settings that are None themselves,
        such as `{"sparsity_rule": None}`.

    Delayed scaling means that the range of a batch is that of the batches before it.
    For gradients set `bwd_averaging`, and for activations `act_static_scale=True` with
    `act_averaging="amax_history,16"`. Values above all that were seen before are
    clipped. Weights have their own range, which is known before any product.

    The noise has no state. Its key is made from the op, the gradient, and a key of the
    stream `"stochastic_rounding"`, if the model has one. So steps, layers,
    micro-batches and ops have noise of their own. A step that runs again after a
    restart has the same noise.

    Raises:
      ValueError: if a field is wrong, or `bwd_qtype` is missing where another field
        needs it.

    Example:
      >>> from qwix_train import QtRule
      >>> rule = QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8")
      >>> rule.bwd_calibration_method
      'absmax'

    References:
      Gupta et al., Deep Learning with Limited Numerical Precision,
      https://arxiv.org/abs/1502.02551, section 3; Micikevicius et al., FP8 Formats for
      Deep Learning, https://arxiv.org/abs/2209.05433, section 3.
    """

    bwd_qtype: Any = None
    bwd_calibration_method: str = "absmax"
    bwd_tile_size: int | float | None = None
    bwd_weight_grad_tile_size: int | float | None = None
    bwd_residuals: str = "quantized"
    bwd_weight_grad_rotation: str | None = None
    bwd_averaging: str | None = None
    bwd_axis_names: Collection[str] = ()
    bwd_stochastic_rounding: str | None = None
    channelwise_noise_axes: Collection[int] = (0,)
    additional_qt_config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        method = self.bwd_calibration_method
        self._check("bwd_calibration_method", how.parse_calibration_method, method)
        if how.is_learned(method):
            reason = "no scale of a gradient is trained; choose 'absmax'"
            raise self._error("bwd_calibration_method", reason)
        if self.bwd_stochastic_rounding not in (None, *NOISE_NAMES):
            reason = f"choose from {', '.join(NOISE_NAMES)}"
            raise self._error("bwd_stochastic_rounding", reason)
        if self.bwd_residuals not in RESIDUALS:
            reason = f"choose from {', '.join(RESIDUALS)}"
            raise self._error("bwd_residuals", reason)
        if self.bwd_qtype is None:
            for field in _OF_GRADIENTS:
                if getattr(self, field) not in (None, (), "quantized"):
                    self.refuse(field, "it needs a bwd_qtype")
        else:
            self._check("bwd_qtype", numerics.canonical_qtype, self.bwd_qtype)
            if self.weight_qtype is None:
                self.refuse("bwd_qtype", "it needs a weight_qtype")
            if self.learns_scales:
                raise self._error(
                    "bwd_qtype",
                    "products of codes have no gradients for scales that are trained; "
                    "leave it out, or choose another weight_calibration_method and "
                    "act_calibration_method, such as 'absmax'",
                )
            # Not every type has the zero point that a method may need.
            of_method = functools.partial(_how, self.bwd_qtype)
            self._check("bwd_calibration_method", of_method, method)
        for field in ("bwd_tile_size", "bwd_weight_grad_tile_size"):
            self._check_tile_size(field)
            self._check_blocks(field, self.bwd_qtype)
        self._check_rotation()
        self._check_averaging()
        self._check_names_of_axes()
        self._check_additional_config()

    @property
    def note(self) -> str:
        """See `QuantizationRule.note`."""
        if self.bwd_qtype is None:
            return ""
        return f"gradients {numerics.qtype_name(self.bwd_qtype)}"

    @property
    def gradient_statistics(self) -> Statistics | None:
        """See `QuantizationRule.gradient_statistics`: of the largest magnitude."""
        if self.bwd_averaging is None:
            return None
        how = _how(self.bwd_qtype, self.bwd_calibration_method)
        how = dataclasses.replace(how, axis_names=self.bwd_axis_names)
        return make_statistics(self.bwd_calibration_method, self.bwd_averaging, how=how)

    def _check_averaging(self):
        field = "bwd_averaging"
        if self.bwd_averaging is None or self.bwd_qtype is None:
            return
        self._check(field, parse_averaging, self.bwd_averaging)
        if numerics.format_of(self.bwd_qtype).coded_scales:
            reason = f"the scales of {self.bwd_qtype} are those of blocks of one array"
            raise self._error(field, reason)
        method = _how(self.bwd_qtype, self.bwd_calibration_method).calibration_method
        if how.parse_calibration_method(method)[0] != "absmax":
            reason = "it needs bwd_calibration_method='absmax', or with a factor"
            raise self._error(field, reason)
        for other in (
            "bwd_tile_size",
            "bwd_weight_grad_tile_size",
            "bwd_weight_grad_rotation",
        ):
            if getattr(self, other) is not None:
                reason = f"a gradient has one scale then: leave out {other}"
                raise self._error(field, reason)

    def _check_names_of_axes(self):
        """Complains of ranges on the way back that belong to one shard each."""
        if self.bwd_axis_names:
            field = "bwd_axis_names"
            if not (self.disable_channelwise_axes or self.bwd_averaging):
                reason = (
                    "one of the two backward products keeps the axis of a gradient "
                    "that a mesh cuts: set disable_channelwise_axes=True, or "
                    "bwd_averaging"
                )
                raise self._error(field, reason)
            block = numerics.format_of(self.bwd_qtype).block
            for tiles in (self.bwd_tile_size, self.bwd_weight_grad_tile_size, block):
                self._check_tiles_in_shards(field, self.bwd_qtype, tiles)
        if self.act_axis_names and self.bwd_qtype is not None:
            takes_codes = self.bwd_residuals == "quantized" or self.static_act_ranges
            if not (takes_codes or self.disable_channelwise_axes):
                reason = (
                    f"bwd_residuals={self.bwd_residuals!r} quantizes activations "
                    "again, with a scale for each index of an axis that a mesh may "
                    "cut: set disable_channelwise_axes=True, or "
                    "bwd_residuals='quantized'"
                )
                raise self._error("act_axis_names", reason)

    def _check_rotation(self):
        field = "bwd_weight_grad_rotation"
        if self.bwd_weight_grad_rotation is None:
            return
        self._check(field, rotations.parse, self.bwd_weight_grad_rotation)
        if self.act_qtype is None:
            return
        if self.bwd_residuals == "quantized":
            reason = (
                "codes of the forward are not rotated: set bwd_residuals='original', "
                "or 'requantized'"
            )
            raise self._error(field, reason)
        if self.static_act_ranges:
            reason = (
                "a static range is that of an activation as it is, not rotated: leave "
                "it out, or act_static_scale"
            )
            raise self._error(field, reason)

    def _check_additional_config(self):
        field = "additional_qt_config"
        config = self.additional_qt_config
        if config is None:
            return
        for name, value in config.items():
            if value is None:  # such as `sparsity_rule`: nothing is asked for
                continue
            if name != "use_original_residuals":
                reason = f"{name!r} has no counterpart here; use the fields of QtRule"
                self.refuse(field, reason)
            elif value is not False:
                self.refuse(
                    field,
                    "use_original_residuals can only be False; bwd_residuals says "
                    "what backward products read",
                )
        object.__setattr__(self, field, None)


RESIDUALS = ("quantized", "requantized", "original")
"""What the incoming gradient may be multiplied with; see `QtRule.bwd_residuals`."""

_OF_GRADIENTS = (
    "bwd_tile_size",
    "bwd_weight_grad_tile_size",
    "bwd_residuals",
    "bwd_weight_grad_rotation",
    "bwd_averaging",
    "bwd_axis_names",
    "bwd_stochastic_rounding",
)


def refuse_backward(rules: Sequence[QuantizationRule], provider: str) -> None:
    """Complains of rules for the backward pass, where it is not quantized.

    Args:
      rules: the rules.
      provider: the name of the provider.

    Raises:
      ValueError: if a rule sets `bwd_qtype`.
    """
    for index, rule in enumerate(rules):
        if isinstance(rule, QtRule) and rule.bwd_qtype is not None:
            raise ValueError(
                f"Rule {index} (bwd_qtype={rule.bwd_qtype!r}): {provider} does not "
                "quantize the backward pass; QtProvider does. Leave bwd_qtype out."
            )


def _how(qtype: Any, method: str) -> how.HowToQuantize:
    return how.HowToQuantize(qtype=qtype, calibration_method=method)
