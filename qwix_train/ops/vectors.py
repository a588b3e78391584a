"""The input of an operation as vectors of channels, for methods that look at it."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax
from jax import lax
from jax import numpy as jnp


class Vectors(abc.ABC):
    """How an input is seen as vectors of channels: what a matrix is multiplied by.

    Attributes:
      unscaled: why the channels cannot have scales that the weight is divided by; empty
        if they can.
    """

    unscaled: ClassVar[str] = ""

    @abc.abstractmethod
    def samples(self, x: jax.Array) -> jax.Array:
        """The vectors, shape (groups, samples, channels)."""

    def members(self, x: jax.Array) -> jax.Array | None:
        """Which vectors belong to which group, shape (groups, samples), booleans.

        None if each group has vectors of its own. Otherwise `samples` gives a single
        group, and the others, for which a vector counts as zeros, share its vectors.
        """
        del x
        return None


@dataclasses.dataclass(frozen=True)
class Channels(Vectors):
    """The input of a product as vectors of channels.

    Attributes:
      contracting: the axes of the input that are contracted, in the order in which
        they make up the channels.
      groups: the axes along which it meets another matrix of the weight each.
    """

    contracting: tuple[int, ...]
    groups: tuple[int, ...] = ()

    def samples(self, x: jax.Array) -> jax.Array:
        """See `Vectors.samples`."""
        first = len(self.groups)
        rest = [
            axis
            for axis in range(x.ndim)
            if axis not in (*self.groups, *self.contracting)
        ]
        x = x.transpose((*self.groups, *rest, *self.contracting))
        cuts = (x.shape[:first], x.shape[first : first + len(rest)])
        channels = x.shape[first + len(rest) :]
        return x.reshape([math.prod(sizes) for sizes in (*cuts, channels)])


@dataclasses.dataclass(frozen=True)
class Patches(Vectors):
    """The input of a convolution as vectors: what the kernel sees at each place.

    Attributes:
      kernel: the shape of the kernel.
      order: its axes of inputs and of places, which are all but the first of what the
        dimension numbers list, in the order in which they make up the channels.
      params: the parameters of the convolution's equation that say where it looks.
    """

    unscaled = "a convolution sees each channel of its input at many places"

    kernel: tuple[int, ...]
    order: tuple[int, ...]
    params: tuple[tuple[str, Any], ...]

    def samples(self, x: jax.Array) -> jax.Array:
        """See `Vectors.samples`; there is one group."""
        params = dict(self.params)
        numbers = params.pop("dimension_numbers")
        window = [self.kernel[axis] for axis in numbers.rhs_spec[2:]]
        patches = lax.conv_general_dilated_patches(
            x,
            filter_shape=window,
            dimension_numbers=numbers,
            precision=lax.Precision.HIGHEST,
            **params,
        )
        patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
        channels = patches.shape[-1]
        patches = patches.reshape(-1, channels // math.prod(window), *window)
        patches = patches.transpose((0, *(1 + axis for axis in self.order)))
        return patches.reshape(1, -1, channels)
