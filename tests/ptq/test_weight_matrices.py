"""What enters a weight, and the weight, as matrices: however the model spells it."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

import qwix_train
from qwix_train import QuantizationRule, ptq
from qwix_train.calib.observe import Observed
from qwix_train.ptq.input_statistics import InputTagging
from tests.ptq.gptq_reference import correlated, run

RULES = [QuantizationRule(weight_qtype="int4")]


class Product(nn.Module):
    """One weight, in any shape, and what is done with it."""

    shape: tuple[int, ...]
    subscripts: str = ""
    fn: object = None

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), self.shape)
        return self.fn(x, w) if self.fn else jnp.einsum(self.subscripts, x, w)


# The shape of the input; the model; the matrices (inputs, outputs) of the param; the
# matrices, (samples, inputs) each, of the input.
SPELLINGS = {
    "transposed": (
        (24, 6),
        Product((5, 6), fn=lambda x, w: x @ w.T),
        lambda w: [w.T],
        lambda x: [x],
    ),
    "two axes": (
        (8, 3, 2, 3),
        Product((2, 3, 5), "abhd,hdo->abo"),
        lambda w: [w.reshape(6, 5)],
        lambda x: [x.reshape(-1, 6)],
    ),
    "heads": (
        (8, 3, 6),
        Product((6, 2, 4), "abi,iho->abho"),
        lambda w: [w.reshape(6, 8)],
        lambda x: [x.reshape(-1, 6)],
    ),
    "experts": (
        (2, 24, 6),
        Product((2, 6, 5), "eni,eio->eno"),
        list,
        list,
    ),
    "experts last": (
        (24, 6, 2),
        Product((6, 5, 2), "nie,ioe->noe"),
        lambda w: list(np.moveaxis(w, -1, 0)),
        lambda x: list(np.moveaxis(x, -1, 0)),
    ),
    "merged by a reshape": (
        (24, 6),
        Product((2, 3, 5), fn=lambda x, w: x @ w.reshape(6, 5)),
        lambda w: [w.reshape(6, 5)],
        lambda x: [x],
    ),
    "weight first": (
        (6, 24),
        Product((5, 6), fn=lambda x, w: w @ x),
        lambda w: [w.T],
        lambda x: [x.T],
    ),
    "read twice": (
        (24, 6),
        Product((6, 5), fn=lambda x, w: x @ w + (2 * x**2) @ w),
        lambda w: [w],
        lambda x: [np.concatenate([x, 2 * x**2])],
    ),
    "convolution": (
        (2, 7, 6, 3),
        Product(
            (3, 2, 3, 5),
            fn=lambda x, w: jax.lax.conv_general_dilated(
                x,
                w,
                (2, 1),
                ((1, 1), (0, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ),
        ),
        lambda w: [w.reshape(18, 5)],
        lambda x: [windows(x)],
    ),
}


def windows(x):
    """What a kernel of 3 by 2 sees, with strides 2 and 1, and zeros around."""
    x = np.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))
    _, height, width, _ = x.shape
    return np.stack(
        [
            image[i : i + 3, j : j + 2].ravel()
            for image in x
            for i in range(0, height - 2, 2)
            for j in range(width - 1)
        ]
    )


@pytest.mark.thinned(9)
@pytest.mark.parametrize("name", SPELLINGS)
def test_ways_to_read_a_weight(name):
    shape, model, matrices, samples = SPELLINGS[name]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    tagging = InputTagging(RULES, second_moment=True)
    observed = Observed(lambda p, x: model.apply({"params": p}, x), tagging)
    state, out = jax.jit(observed)({}, params, x)
    expected = jax.jit(model.apply)({"params": params}, x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    (name,) = tagging.reads
    found = list(tagging.reads[name].values())
    view = found[0].view
    kernels = [w.T for w in matrices(np.asarray(params["w"]))]
    np.testing.assert_array_equal(view.to_matrices(params["w"]), kernels)
    np.testing.assert_array_equal(
        view.from_matrices(view.to_matrices(params["w"])), params["w"]
    )
    merged = state[found[0].name]
    if len(found) == 2:
        merged = found[0].statistics.merge(merged, state[found[1].name])
    inputs = [np.asarray(x, np.float64) for x in samples(x)]
    np.testing.assert_allclose(
        merged["second_moment"],
        [x.T @ x / len(x) for x in inputs],
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        merged["absmean"], [np.abs(x).mean(0) for x in inputs], 1e-5
    )
    np.testing.assert_allclose(merged["min"], [x.min(0) for x in inputs], 1e-6)
    assert merged["samples"] == len(inputs[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experts last", "convolution", "two axes"])
def test_the_error_of_outputs_is_what_the_report_says(name):
    shape, model, *_ = SPELLINGS[name]
    x = correlated(int(np.prod(shape)) // 6, 6).reshape(shape)
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    method = ptq.Gptq(RULES)
    quantized = run(method, model, params, x)
    whole = qwix_train.quantize_model(model, method.provider)
    out, expected = (
        np.asarray(m.apply({"params": p}, x), np.float64)
        for m, p in ((whole, quantized), (model, params))
    )
    error = np.sum((out - expected) ** 2) / np.sum(expected**2)
    (record,) = method.report.weights
    np.testing.assert_allclose(record.error, error, rtol=1e-3)
    assert record.error < record.rounding_error


@pytest.mark.parametrize("tiles", [(1, 1, 5), (2, 1, 5), (2, 3, 1), (1, 1, 1)])
def test_scales_of_elements(tiles):
    """A scale is spread over the matrices, and gathered again."""
    model = SPELLINGS["two axes"][1]
    x = jnp.ones(SPELLINGS["two axes"][0])
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    tagging = InputTagging(RULES, second_moment=False)
    Observed(lambda p, x: model.apply({"params": p}, x), tagging).init(params, x)
    view = next(iter(tagging.reads["w",].values())).view
    scale = np.arange(np.prod(tiles), dtype=np.float32).reshape(tiles)
    spread = view.spread(jax.device_put(scale))
    whole = np.broadcast_to(scale, (2, 3, 5)).reshape(6, 5)
    np.testing.assert_array_equal(spread, [whole.T])
    np.testing.assert_array_equal(view.gathered(spread, tiles), scale)
