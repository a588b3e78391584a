import dataclasses

import jax.numpy as jnp
import pytest

from qwix_train.core.how import HowToQuantize, parse_calibration_method


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("absmax", ("absmax", ())),
        ("AbsMax, 0.5", ("absmax", (0.5,))),
        ("minmax", ("minmax", ())),
        ("rms,7", ("rms", (7.0,))),
        ("fixed,2", ("fixed", (-2.0, 2.0))),
        ("fixed,0,3", ("fixed", (0.0, 3.0))),
    ],
)
def test_methods(text, parsed):
    assert parse_calibration_method(text) == parsed


@pytest.mark.parametrize(
    "text, reason",
    [
        ("max", "Unknown calibration method 'max'; choose from: absmax"),
        ("", "Unknown"),
        (None, "is a string, not None"),
        ("absmax,x", "not a number"),
        ("absmax,nan", "not finite"),
        ("absmax,1,2", "2 arguments"),
        ("absmax,0", "factor must be positive"),
        ("rms", "0 arguments"),
        ("rms,-1", "factor must be positive"),
        ("fixed", "0 arguments"),
        ("fixed,1,2", "must hold 0"),
        ("fixed,0,0", "must hold 0"),
        ("fixed,-3", "must hold 0"),
    ],
)
def test_bad_methods_say_why(text, reason):
    with pytest.raises(ValueError, match=reason):
        HowToQuantize(qtype="int8", calibration_method=text)


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        (dict(qtype="uint8"), "Unknown quantized type 'uint8'"),
        (dict(channelwise_axes=(0,), tiled_axes={0: 2}), "Axis 0 is both"),
        (dict(tiled_axes={0: 0}), "must be a positive integer"),
        (dict(tiled_axes={0: 2.0}), "must be a positive integer"),
        (dict(qtype="nf4", calibration_method="minmax"), "nf4 has no zero points"),
        (dict(qtype="nf4", calibration_method="fixed,-1,2"), "nf4 has no zero points"),
    ],
)
def test_wrong_fields_are_refused_when_made(kwargs, reason):
    with pytest.raises(ValueError, match=reason):
        HowToQuantize(**{"qtype": "int8", **kwargs})


def test_equal_and_hashable_whatever_the_spelling():
    one = HowToQuantize(qtype="int8", channelwise_axes=[1, 0], tiled_axes={2: 4})
    two = HowToQuantize(qtype=jnp.int8, channelwise_axes=(0, 1), tiled_axes={2: 4})
    assert one == two and hash(one) == hash(two)
    assert dataclasses.replace(one, tiled_axes={2: 0.5}) != one
    assert one.qtype == jnp.int8 and one.tiled_axes == {2: 4}


def test_scale_shape():
    how = HowToQuantize(qtype="int8", channelwise_axes=(-1,), tiled_axes={0: 0.25})
    assert how.scale_shape((8, 3, 5)) == (4, 1, 5)
    with pytest.raises(ValueError, match="Axis -1 is out of range"):
        how.scale_shape(())
    clash = HowToQuantize(qtype="int8", channelwise_axes=(-1,), tiled_axes={1: 2})
    with pytest.raises(ValueError, match="Axis 1 is both"):
        clash.scale_shape((4, 4))
    padded = HowToQuantize(qtype="int8", tiled_axes={0: 4}, pad_tiles=True)
    assert padded.scale_shape((10, 2)) == (3, 1)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"channelwise_axes": 1}, "channelwise_axes=1 must be a collection of ints"),
        ({"channelwise_axes": "1"}, "channelwise_axes='1' must be"),
        ({"channelwise_axes": (1.0,)}, "must be a collection of ints"),
        ({"tiled_axes": [(0, 4)]}, "tiled_axes=.* must map axes to tile sizes"),
        ({"tiled_axes": {"0": 4}}, "must map axes to tile sizes"),
        ({"tiled_axes": {0: True}}, "must map axes to tile sizes"),
    ],
)
def test_axes_of_another_type_are_named(fields, message):
    with pytest.raises(TypeError, match=message):
        HowToQuantize(qtype="int8", **fields)


def test_an_axis_that_is_tiled_twice():
    how = HowToQuantize(qtype="int8", tiled_axes={1: 4, -1: 2})
    with pytest.raises(ValueError, match="names axis 1 of 2 twice"):
        how.scale_shape((4, 8))
