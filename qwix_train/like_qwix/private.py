"""The private names of `qwix` that MaxText 0.2.5 imports.

This module stands for all the private modules that have them.
"""

from __future__ import annotations

from typing import Any, NoReturn

from qwix_train.core.numerics import symmetric_bound
from qwix_train.frontends.step_models import in_float

get_symmetric_bound = symmetric_bound
"""The largest scaled magnitude of a type."""

disable_interceptions = in_float
"""A function whose operations stay in float."""


class DotGeneralQtConfig:
    """The settings of one product, which come from a rule here."""

    def __init__(self, **settings: Any):
        """Refuses them.

        Args:
          **settings: the settings.

        Raises:
          NotImplementedError: always.
        """
        raise NotImplementedError(
            f"DotGeneralQtConfig({', '.join(settings)}): products are quantized by the "
            "rules of a QtProvider, not one by one. In MaxText, set "
            "use_qwix_quantization=true and use_batch_split_schedule=false."
        )


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"qwix_train.as_qwix has no {name!r}: of the private modules of qwix it has "
        "what MaxText cannot do without. There is no structured sparsity."
    )
