"""GPTQ in NumPy, by its definition, and what the tests of weight methods share."""

import functools

import jax
import numpy as np
from flax import nnx

from qwix_train import quantize_model

BOUNDS = {"int3": (-4, 3, 3.5), "int4": (-8, 7, 7.5), "int8": (-128, 127, 127.5)}
# Wider than the weights, of which the largest would be a tie between two codes.
WIDE = "absmax,1.1"


def correlated(rows, columns, seed=0):
    """Inputs whose channels have much in common, as real ones have."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(columns, columns)) / columns**0.5
    x = rng.normal(size=(rows, columns)) @ (mixing + 0.5 * np.eye(columns))
    return x.astype(np.float32)


def reference(w, hessian, qtype, *, tile=None, damping=0.01, order=None, static=False):
    """Optimal brain quantization of all rows, by explicit inverses.

    After each channel the inverse Hessian loses its row and column, as equation 3 of
    the paper says; there is no Cholesky factor.

    Returns:
      The codes and the scale of each element, shape (rows, columns).
    """
    low, high, bound = BOUNDS[qtype]
    w, original = w.astype(np.float64), w.astype(np.float64)
    rows, columns = w.shape
    tile = tile or columns
    hessian = hessian.astype(np.float64)
    hessian = hessian + damping * np.diag(hessian).mean() * np.eye(columns)
    inverse = np.linalg.inv(hessian)
    w, codes, scales = w.copy(), np.zeros(w.shape, int), np.zeros(w.shape)
    for step, j in enumerate(range(columns) if order is None else order):
        if static or step % tile == 0:
            group = slice(j // tile * tile, j // tile * tile + tile)
            source = original if static else w
            scale = 1.1 * np.abs(source[:, group]).max(1) / bound
        scales[:, j] = scale
        codes[:, j] = np.clip(np.round(w[:, j] / scale), low, high)
        error = (w[:, j] - codes[:, j] * scale) / inverse[j, j]
        w = w - np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, scales


def errors(found, w, inputs, qtype, **options):
    """The share of codes that are not those of the reference.

    Args:
      found: the codes of a kernel, shape (inputs, outputs).
      w: the kernel.
      inputs: what enters the layer, shape (samples, inputs).
      qtype: the type.
      **options: those of `reference`.
    """
    x = np.asarray(inputs, np.float64)
    codes, _ = reference(np.asarray(w).T, 2 * x.T @ x / len(x), qtype, **options)
    return np.mean(np.asarray(found, int).T != codes)


def collect(method, model, params, *batches):
    """Runs an eval loop of a Linen model, with its inputs collected."""
    step = method.wrap(jax.jit(lambda p, x: model.apply({"params": p}, x)))
    for x in batches:
        step(params, x)


def run(method, model, params, *batches):
    """The params of a Linen model that a method makes of float ones."""
    collect(method, model, params, *batches)
    return method.quantize_params(params, abstract(method, model, batches[0]))


def abstract(method, model, x):
    """The shapes of the params of the quantized model."""
    whole = quantize_model(model, method.provider)
    return jax.eval_shape(functools.partial(whole.init, jax.random.key(0)), x)["params"]


def run_nnx(method, model, *batches):
    """The quantized NNX model that a method makes of a float one."""
    step = method.wrap(nnx.jit(lambda model, x: model(x)))
    for x in batches:
        step(model, x)
    whole = quantize_model(model, method.provider, batches[0])
    floats = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(whole, method.quantize_params(floats, whole))
    return whole
