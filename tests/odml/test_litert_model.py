"""LiteRT models: run, looked into, and compared with JAX."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qwix_train import odml
from tests.odml.small import INT8, Mlp, converted, init, normal, stats_of

SHAPE = (3, 8)


@pytest.fixture(scope="module")
def litert():
    x = normal(*SHAPE)
    return converted(Mlp(), init(Mlp(), x), x)


@pytest.fixture(scope="module")
def of_codes():
    """With integer inputs and outputs."""
    x = normal(*SHAPE)
    return converted(
        Mlp(),
        init(Mlp(), x),
        x,
        integer_inputs=True,
        integer_outputs=True,
    )


@pytest.fixture(scope="module")
def two_inputs():
    """A dictionary of an image and tokens, and a mask by keyword."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, batch, *, scale):
            x = nn.Dense(4)(batch["image"]) + nn.Embed(8, 4)(batch["ids"])
            return {"sum": x * scale, "image": batch["image"]}

    model = Model()
    batch = {"image": normal(3, 8), "ids": jnp.array([1, 5, 2])}
    scale = normal(3, 4, seed=2)
    variables = init(model, batch, scale=scale)
    provider = odml.OdmlQatProvider(INT8)

    def run(variables, batch, scale):
        return model.apply(variables, batch, scale=scale)

    stats = stats_of(provider, run, variables, batch, scale)
    return odml.convert(
        model, variables, provider, batch, scale=scale, quant_stats=stats
    )


def test_save_and_load(litert, tmp_path):
    path = tmp_path / "model.tflite"
    litert.save(path)
    loaded = odml.LiteRTModel.load(path)
    x = normal(*SHAPE, seed=1)
    np.testing.assert_array_equal(loaded(x), litert(x))
    assert str(loaded.ops()) == str(litert.ops())
    assert loaded.is_full_integer
    assert loaded.signatures["serving_default"].inputs == ("x",)
    with pytest.raises(ValueError, match="the model was read from a file"):
        loaded.report(x)


def test_a_file_that_is_there_is_replaced_only_on_request(litert, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"\x1c\0\0\0TFL3 of an older model")
    with pytest.raises(FileExistsError, match="model.tflite exists. Pass overwrite="):
        litert.save(path)
    litert.export(path, overwrite=True)
    assert path.read_bytes() == litert.content
    path.write_text("import qwix_train")
    with pytest.raises(FileExistsError, match="is not a LiteRT model"):
        litert.save(path, overwrite=True)


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"14 bytes are no .tflite file"):
        odml.LiteRTModel.load(path)


def test_report_on_other_inputs(litert):
    x = normal(*SHAPE, seed=1)
    (out,) = litert.report(x)
    assert out.max_steps <= 1.01 and out.equal > 0.9
    (named,) = litert.report(x=x)
    assert named == out
    assert out.scale == litert.ops()[-1].inputs[0].scale[0]
    assert "output_0" in str(litert.report(x))


def test_threads_do_not_change_the_result(litert):
    x = normal(*SHAPE)
    np.testing.assert_array_equal(litert(x, num_threads=2), litert(x))
    with pytest.raises(ValueError, match="num_threads=0: give 1 or more"):
        litert(x, num_threads=0)


def test_types_that_stand_for_floats(litert):
    x = normal(*SHAPE)
    for other in (np.asarray(x, np.float64), x.astype(jnp.bfloat16), [[0, 1] * 4] * 3):
        expected = litert(np.asarray(other, np.float32))
        np.testing.assert_array_equal(litert(np.asarray(other)), expected)


def test_codes_in_and_out(of_codes, litert):
    x = normal(*SHAPE)
    assert of_codes.is_full_integer
    source = of_codes.ops()[0].inputs[0]
    codes = np.clip(
        np.round(np.asarray(x) / np.float32(source.scale[0])) + source.zero_point[0],
        -128,
        127,
    ).astype(np.int8)
    np.testing.assert_array_equal(of_codes(codes), of_codes(x))
    np.testing.assert_array_equal(of_codes(x), litert(x))
    raw = of_codes(x, dequantize=False)
    target = of_codes.ops()[-1].outputs[0]
    assert raw.dtype == np.int8
    np.testing.assert_allclose(
        (raw.astype(np.float64) - target.zero_point[0]) * target.scale[0],
        of_codes(x),
        rtol=1e-6,
    )
    for given in (x, codes):
        (out,) = of_codes.report(given)
        assert out.max_steps <= 1.01 and out.equal > 0.9


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_integers_that_are_no_codes(of_codes, dtype):
    with pytest.raises(ValueError, match="takes codes of type int8, or floats"):
        of_codes(np.zeros(SHAPE, dtype))


@pytest.mark.slow
def test_inputs_by_name_and_in_dictionaries(two_inputs):
    names = ("batch_ids", "batch_image", "scale")
    assert two_inputs.signatures["serving_default"].inputs == names
    batch = {"image": normal(3, 8, seed=4), "ids": np.array([7, 0, 3])}
    scale = normal(3, 4, seed=5)
    expected = two_inputs(batch, scale)
    assert set(expected) == {"sum", "image"}
    for out in (
        two_inputs(batch, scale=scale),
        two_inputs(batch=batch, scale=scale),
        two_inputs(batch_ids=batch["ids"], batch_image=batch["image"], scale=scale),
    ):
        jax.tree.map(np.testing.assert_array_equal, out, expected)
    for out in two_inputs.report(batch, scale=scale):
        assert out.max_steps <= 1.01, out
    assert [out.name for out in two_inputs.report(batch, scale)] == ["image", "sum"]


@pytest.mark.slow
def test_a_loaded_model_takes_inputs_in_the_same_order(two_inputs):
    loaded = odml.LiteRTModel(two_inputs.content)
    batch, scale = {"image": normal(3, 8), "ids": np.array([7, 0, 3])}, normal(3, 4)
    assert loaded.signatures["serving_default"].outputs == ("image", "sum")
    image, total = loaded(batch, scale)
    np.testing.assert_array_equal(total, two_inputs(batch, scale)["sum"])
    np.testing.assert_array_equal(image, two_inputs(batch, scale)["image"])


def test_calls_that_do_not_fit(litert, two_inputs):
    x = normal(*SHAPE)
    cases = [
        (lambda: litert(x, signature="other"), "no signature 'other'; .* serving_def"),
        (lambda: litert(), "takes 1 inputs, x; it was given 0"),
        (lambda: litert(x, x), "takes 1 inputs, x; it was given 2"),
        (lambda: litert(x, x=x), "given 1, and by name x"),
        (lambda: litert(y=x), "given 0, and by name y"),
        (lambda: litert(x[0]), r"'x' has the shape \(8,\), and the model takes \(3, 8"),
        (lambda: litert(x[:, :4]), r"the shape \(3, 4\), and the model takes \(3, 8\)"),
        (lambda: litert(x[:1]), r"takes \(3, 8\). Convert it with dynamic_batch=True"),
        (lambda: litert.report(x[:1]), "has the shape"),
        (
            lambda: two_inputs({"image": x, "ids": np.ones(3)}, normal(3, 4)),
            "'batch_ids' is of type float64, and the model takes int32",
        ),
        (
            lambda: two_inputs({"image": x, "ids": np.full(3, 2**40)}, normal(3, 4)),
            "'batch_ids' is of type int64, and the model takes int32",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_damaged_file_is_one_error_with_its_name(litert, tmp_path):
    path = tmp_path / "model.tflite"
    content, rng = litert.content, np.random.default_rng(0)
    damaged = [content[:length] for length in (8, 100, len(content) // 2)]
    for _ in range(50):
        flipped = bytearray(content)
        flipped[rng.integers(8, len(flipped))] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            odml.LiteRTModel.load(path).ops()
        except ValueError as error:
            assert f"{path}: These {len(content)} bytes are a .tflite" in str(error)
            refused += 1
    # A flipped bit of a weight is a weight.
    assert refused > 15
