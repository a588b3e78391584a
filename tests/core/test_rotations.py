"""A rotation from outside of the package, in QAT and in a quantized model."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qwix_train import QtProvider, QuantizationRule, ptq, quantize_model
from qwix_train.core import rotations
from qwix_train.core.calibration import calibrate
from qwix_train.core.how import HowToQuantize
from qwix_train.core.rotation import Rotation
from tests.compare import assert_close, assert_same

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 8)).astype(np.float32)
PARAMS = {"kernel": jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)}


@dataclasses.dataclass(frozen=True)
class Reversed(Rotation):
    """The elements of an axis in the opposite order, moved on by some."""

    moved: int = 0

    name: ClassVar[str] = "reversed"
    form: ClassVar[str] = "reversed[,moved]"

    @classmethod
    def parse(cls, numbers, axis, length):
        return cls(axis, *numbers)

    def apply(self, x):
        return jnp.roll(jnp.flip(x, self.axis), self.moved, self.axis)

    def undo(self, x):
        return jnp.flip(jnp.roll(x, -self.moved, self.axis), self.axis)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(rotations, "KINDS", dict(rotations.KINDS))
    rotations.register(Reversed)


def test_both_operands_are_quantized_in_its_basis():
    rules = [QuantizationRule(weight_qtype="int4", act_qtype="int8")]
    model, own = nn.Dense(4, use_bias=False), {}
    for rotation in (None, "reversed,3"):
        rules = [dataclasses.replace(rules[0], rotation=rotation)]
        trained = quantize_model(model, QtProvider(rules))
        served, params = ptq.quantize(model, PARAMS, rules, X)
        own[rotation] = params["kernel"].array.qvalue
        # It moves elements, and so it rounds them to the same values.
        outs = trained.apply({"params": PARAMS}, X), served.apply({"params": params}, X)
        assert_close(outs[0], outs[1], atol=1e-5)
    whole = Reversed(0, 3).apply(own[None].astype(jnp.int8))
    assert_same(own["reversed,3"].astype(jnp.int8), whole)


def test_one_name_is_one_rotation():
    with pytest.raises(ValueError, match="a rotation 'reversed' already"):
        rotations.register(Reversed)
    with pytest.raises(ValueError, match=r"Write reversed\[,moved\]"):
        rotations.parse("reversed,a")


def test_what_knows_no_rotations_complains():
    how = HowToQuantize(qtype="int4", rotation=Reversed(0))
    with pytest.raises(ValueError, match="rotation='reversed' are not supported here"):
        calibrate(PARAMS["kernel"], how)
    assert calibrate(PARAMS["kernel"], how.in_basis)["absmax"].shape == (1, 1)
