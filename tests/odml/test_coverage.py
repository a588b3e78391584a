"""Every kind of operation, converted and run by LiteRT."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from qwix_train import QuantizationRule, as_model, calib, odml
from tests.odml.cases import CASES

# The widest range of all batches, so that nothing is cut off.
RULES = [
    QuantizationRule(weight_qtype="int8", act_qtype="int8", act_averaging="minmax")
]


def inputs_of(case, seed):
    rng = np.random.default_rng(seed)
    shapes = case.shape if isinstance(case.shape[0], tuple) else (case.shape,)
    if case.integers is not None:
        return [jax.device_put(rng.integers(case.integers, size=s)) for s in shapes]
    arrays = [rng.normal(size=s).astype(np.float32) for s in shapes]
    return [jax.device_put(np.abs(x) + 0.3 if case.positive else x) for x in arrays]


def made(case, inputs):
    """The model, its variables, and a function that runs it."""
    rng = np.random.default_rng(0)
    if isinstance(case.model, nn.Module):
        shapes = jax.eval_shape(case.model.init, jax.random.key(0), *inputs)

        def draw(path, leaf):
            # Statistics and scales that are not 0 and 1.
            if path[-1].key in ("var", "scale"):
                values = rng.uniform(0.5, 1.5, leaf.shape)
            else:
                std = max(1, leaf.size // leaf.shape[-1]) ** -0.5
                values = rng.normal(0, std if leaf.ndim > 1 else 0.1, leaf.shape)
            return jax.device_put(values.astype(leaf.dtype))

        variables = jax.tree_util.tree_map_with_path(draw, shapes)
        run = functools.partial(case.model.apply, variables)
        return case.model, variables, jax.jit(run)
    if isinstance(case.model, type):
        model = case.model()
        model.eval()
        for _, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.BatchStat):
                noise = rng.uniform(0.5, 1.5, variable.get_value().shape)
                variable.set_value(variable.get_value() + noise.astype(np.float32))
        return model, None, functools.partial(nnx.jit(lambda m, *xs: m(*xs)), model)
    params = {
        k: jax.device_put(rng.normal(size=s).astype(np.float32))
        for k, s in case.params.items()
    }
    return case.model, params, jax.jit(functools.partial(case.model, params))


def calibrated(case, inputs):
    provider = odml.OdmlQatProvider(RULES, strict=not case.exceptions)
    model, variables, run = made(case, inputs)
    args = [variables]
    if isinstance(model, nnx.Module):
        step, args = nnx.jit(lambda model, *xs: model(*xs)), [model]
    elif isinstance(model, nn.Module):
        step = jax.jit(model.apply)
    else:
        step = jax.jit(as_model(model))
    calibrator = calib.Calibrator(provider)
    wrapped = calibrator.wrap(step)
    for seed in (1, 3):
        wrapped(*args, *inputs_of(case, seed))
    return provider, model, variables, run, calibrator.quant_stats


# Models that have most kinds of layers between them; the others are slow tests.
DEFAULT = frozenset(
    "embedding outputs function nnx_cnn conv_transposed hard_swish".split()
)


def _cases():
    for name in CASES:
        slow = () if name in DEFAULT else pytest.mark.slow
        yield pytest.param(name, marks=slow)


def test_the_default_run_has_cases_that_there_are():
    assert CASES.keys() >= DEFAULT


# Two batches of a third power have ranges that differ much.
@pytest.mark.thinned(2)
@pytest.mark.filterwarnings("ignore:1 static ranges are of batches that differ much")
@pytest.mark.parametrize("name", list(_cases()))
def test_full_integer_and_equal(name):
    case = CASES[name]
    inputs = inputs_of(case, 3)
    provider, model, variables, run, stats = calibrated(case, inputs)
    litert = odml.convert(model, variables, provider, *inputs, quant_stats=stats)
    assert tuple(op.name for op in litert.float_ops) == case.exceptions, litert.ops()
    report = litert.report(*inputs)
    print(name, report, litert.ops(), sep="\n")
    for out in report:
        assert round(out.max_steps, 3) <= 2, (report, litert.ops())
        assert out.equal >= (0.9 if case.single else 0.5), (report, litert.ops())
    # The float model is near.
    for a, b in zip(
        jax.tree.leaves(litert(*inputs)), jax.tree.leaves(run(*inputs)), strict=True
    ):
        if np.issubdtype(a.dtype, np.floating):
            assert np.abs(a - b).mean() < 0.1 * np.abs(b).mean() + 0.03
