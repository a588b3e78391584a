"""Rules for adapters: which weights get one, and how their base is kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax import numpy as jnp
from jax.nn import initializers

from qwix_train.core import numerics
from qwix_train.planning.rules import QuantizationRule

INITIALIZATIONS = ("pissa", "loftq", "loftq,STEPS")
"""How adapters may start, other than from their initializers."""

_LOFTQ_STEPS = 5


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoraRule(QuantizationRule):
    r"""Selects ops whose weights get low-rank adapters.

    A weight ``W`` becomes ``W + scaling * A @ B``, with ``scaling = alpha / rank``
    (arXiv 2106.09685, section 4.1). The fields of `QuantizationRule` say how the base
    ``W`` is quantized; without `weight_qtype` it stays in float. Rules of both kinds
    may stand in one list. Lookups in tables of embeddings get adapters where
    `op_names` has `"gather"`.

    Attributes:
      rank: the number of columns of ``A`` and rows of ``B``.
      alpha: the numerator of the scaling.
      dropout: the probability with which an element of the input of ``A`` is set to
        zero in training; the others are divided by ``1 - dropout``. The input of the
        base is not changed.
      mapped_axes: axes of the weights that a `vmap` goes over, such as that of an
        ensemble in a plain function. Each index has an adapter of its own, stacked
        along that axis. You need not name axes of a scan, of `nnx.vmap` or of
        `nn.vmap`: they are found, unless two neighbors have the same size.
      param_dtype: the dtype in which adapters are kept and trained. Products compute
        in the model's dtype. If None, that of the weight, but at least float32: in
        bfloat16, rounding loses most steps of a usual learning rate.
      lora_a_initializer: gives ``A`` from a key, a shape and a dtype.
      lora_b_initializer: the same for ``B``.
      rank_stabilized: whether the scaling is ``alpha / sqrt(rank)`` (rsLoRA, arXiv
        2312.03732, theorem 3.2).
      dora: whether each output channel has a trained magnitude ``m``. The weight is
        then ``m * (W + scaling * A @ B) / norm``, where ``norm`` is that of each
        channel of ``W + scaling * A @ B``, and counts as a constant (DoRA, arXiv
        2402.09353, section 4).
      init: how adapters start. `"pissa"`: ``A @ B`` is the principal part of ``W``, of
        its `rank` largest singular values, and the base is the rest (arXiv 2404.02948,
        equations 2 to 4). `"loftq"` or `"loftq,5"`: base and adapters are fitted in
        turns, 1 or 5 times, so that together they are close to ``W`` (arXiv 2310.08659,
        algorithm 1). None: the initializers, with which the model computes what it did.
      double_quant: whether the codes of the frozen base are packed two to a byte, and
        its scales are quantized to 8 bits in blocks of 256 (QLoRA, arXiv 2305.14314,
        section 3). Scales that are codes already stay. For types of 4 bits.
      qat: whether the base stays in float, and the forward fake-quantizes the weight
        with its adapter merged in, as merging and exporting it will. Needs a
        `weight_qtype`.

    Raises:
      ValueError: if a field is wrong.

    Example:
      >>> from qwix_train import LoraRule
      >>> LoraRule(rank=8, alpha=16.0, weight_qtype="nf4", tile_size=64).scaling
      2.0
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    mapped_axes: Collection[int] = ()
    param_dtype: Any = None
    lora_a_initializer: Callable[..., jax.Array] = initializers.he_uniform()
    lora_b_initializer: Callable[..., jax.Array] = initializers.zeros
    rank_stabilized: bool = False
    dora: bool = False
    init: str | None = None
    double_quant: bool = False
    qat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise self._error("rank", "it must be a positive int")
        if not math.isfinite(self.alpha) or self.alpha == 0:
            problem = "it must be a finite number other than 0, which trains nothing"
            raise self._error("alpha", problem)
        if not 0 <= self.dropout <= 1:
            raise self._error("dropout", "it must be at least 0 and below 1")
        if self.dropout == 1:
            reason = (
                "it must be at least 0 and below 1, which leaves nothing to learn from"
            )
            self.refuse("dropout", reason)
        if self.param_dtype is not None:
            self._check("param_dtype", _check_float, self.param_dtype)
        for field in ("lora_a_initializer", "lora_b_initializer"):
            if not callable(getattr(self, field)):
                raise self._error(field, "it must be a function(key, shape, dtype)")
        if self.init is not None:
            self._check("init", _parsed_init, self.init)
        if self.init is not None and self.alpha <= 0:
            raise self._error("alpha", f"init={self.init!r} needs a positive one")
        if self.init is not None and self.dora:
            raise self._error(
                "init", "it cannot be combined with dora=True: set one of them"
            )
        if self.loftq_steps and self.weight_qtype is None:
            raise self._error("init", "LoftQ needs a weight_qtype, such as 'nf4'")
        if self.loftq_steps and self.rotation is not None:
            raise self._error(
                "init", "LoftQ fits weights in their own basis: leave rotation out"
            )
        if self.double_quant:
            qtype = self.weight_qtype
            if qtype is None or numerics.qtype_bits(qtype) != 4:
                raise self._error(
                    "double_quant", "it needs a weight_qtype of 4 bits, such as 'nf4'"
                )
            if self.qat:
                raise self._error(
                    "double_quant", "with qat=True the base is in float: leave it out"
                )
        if self.qat and self.weight_qtype is None:
            raise self._error("qat", "it needs a weight_qtype")
        if self.schedule is not None:
            raise self._error(
                "schedule", "schedules are for wrap_train_step: leave it out"
            )
        if self.qat and self.dropout:
            raise self._error(
                "dropout", "with qat=True there is one merged product: set it to 0"
            )

    @property
    def adds_adapters(self) -> bool:
        """See `QuantizationRule.adds_adapters`."""
        return True

    @property
    def scaling(self) -> float:
        """What ``A @ B`` is multiplied by."""
        divisor = math.sqrt(self.rank) if self.rank_stabilized else self.rank
        return self.alpha / divisor

    @property
    def loftq_steps(self) -> int:
        """How often LoftQ chooses base and adapters; 0 if it does not."""
        name, steps = _parsed_init(self.init) if self.init else ("", 0)
        return steps if name == "loftq" else 0


def _check_float(dtype: Any) -> None:
    try:
        is_float = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise ValueError("it must be a float dtype, such as jnp.float32")


def _parsed_init(text: Any) -> tuple[str, int]:
    name, *rest = str(text).split(",")
    if name == "pissa" and not rest:
        return name, 0
    if name == "loftq" and len(rest) <= 1:
        steps = rest[0].strip() if rest else str(_LOFTQ_STEPS)
        if steps.isdigit() and int(steps) > 0:
            return name, int(steps)
    raise ValueError(f"choose from {', '.join(INITIALIZATIONS)}")
