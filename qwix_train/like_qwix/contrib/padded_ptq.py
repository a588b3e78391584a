"""Tiles that do not divide an axis, as `qwix.contrib.padded_ptq` has them.

Here a tile may be shorter than the others (`pad_tiles`): an ordinary `QArray`, that
stores no padding, and every product takes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from qwix_train.core.dot_general import dot_general as dot_general
from qwix_train.core.einsum import einsum as einsum
from qwix_train.core.how import HowToQuantize as HowToQuantize
from qwix_train.core.qarray import QArray as PaddedQArray
from qwix_train.core.qarray import calibrate as calibrate
from qwix_train.core.qarray import dequantize as dequantize
from qwix_train.core.qarray import quantize_array
from qwix_train.like_qwix.model import quantize_params as quantize_params
from qwix_train.like_qwix.providers import PtqProvider
from qwix_train.planning.rules import QuantizationRule

__all__ = [
    "PaddedPtqProvider",
    "PaddedQArray",
]


class PaddedPtqProvider(PtqProvider):
    """A `PtqProvider` whose rules all have `pad_tiles=True`."""

    def __init__(self, rules: Sequence[QuantizationRule], **kwargs: Any):
        """Checks the rules.

        Args:
          rules: the rules, in order of precedence.
          **kwargs: see `PtqProvider`.
        """
        padded = [dataclasses.replace(rule, pad_tiles=True) for rule in rules]
        super().__init__(padded, **kwargs)


def quantize(array: jax.Array, how: HowToQuantize) -> PaddedQArray:
    """Quantizes an array, with a shorter last tile where one does not fit.

    Args:
      array: the array.
      how: how.
    """
    return quantize_array(array, dataclasses.replace(how, pad_tiles=True))
