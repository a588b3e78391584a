"""What AWQ and SmoothQuant share here: a scale of the input beside each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from qwix_train.like_qwix.contrib import calibration
from qwix_train.like_qwix.providers import PtqProvider
from qwix_train.planning.leaves import Leaf, Path
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq.input_scaling import InputScaling
from qwix_train.values import stored


class ScaledInputs(PtqProvider):
    """A `PtqProvider` whose models have a place for the scales of inputs."""

    def __init__(self, rules: Sequence[QuantizationRule], *, disable_jit: bool = False):
        """Checks the rules.

        Args:
          rules: the rules, in order of precedence.
          disable_jit: has no effect.
        """
        super().__init__(rules, disable_jit=disable_jit)
        self.pre_quant_scale = True


class Quantizer:
    """Quantizes weights, and puts the scales of their inputs beside them."""

    def __init__(self, method: InputScaling):
        """Takes the method.

        Args:
          method: what finds the scale of each weight's channels.
        """
        self.method = method
        self.scales: dict[Path, jax.Array] = {}

    def scaled(
        self,
        found: calibration.CalibratedQuantContext,
        factors: jax.Array,
        **moments: jax.Array,
    ) -> Any:
        """The codes of a weight whose channels are multiplied by factors.

        Args:
          found: the weight.
          factors: shape (matrices, channels).
          **moments: what the method looks at.
        """
        weight, scale = found.with_moments(**moments), 1 / factors
        scale = scale.astype(weight.param.dtype)
        self.scales[found.path] = scale
        return self.method.rounded(weight.divided(scale), weight, scale)

    def beside(self, target: Mapping[Path, Any]) -> dict[Path, jax.Array]:
        """The scales, where the quantized model has them.

        Args:
          target: the params of the quantized model, by path.

        Raises:
          ValueError: if there is no place, or more than one, for one of them.
        """
        places = {}
        for path, scale in self.scales.items():
            module, name = path[:-1], "/".join(path)
            fitting = [
                at
                for at, value in target.items()
                if at[:-1] == module
                and (leaf := Leaf.parse(at)) is not None
                and leaf.part == "pre_quant_scale"
                and stored.shape_of(value).size == scale.size
            ]
            if len(fitting) != 1:
                problem = "several places" if fitting else "no place"
                raise ValueError(
                    f"The quantized model has {problem} for the scale of the input of "
                    f"{name!r}. Make its params with the same rules; where a module "
                    f"has several weights, use qwix_train.ptq.{self.method.title}."
                )
            shape = stored.shape_of(target[fitting[0]])
            places[fitting[0]] = scale.reshape(shape.shape).astype(shape.dtype)
        for at, value in target.items():
            leaf = Leaf.parse(at)
            if leaf is not None and leaf.part == "pre_quant_scale" and at not in places:
                shape = stored.shape_of(value)
                places[at] = jnp.ones(shape.shape, shape.dtype)
        return places
