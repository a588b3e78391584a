"""Training with states in 8 bits ends where training with float states does."""

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from qwix_train import optim

SEEDS, STEPS, BATCH = 4, 600, 64
SIZES = (64, 128, 128, 10)
OPTIMIZERS = {
    "adam": optax.adam(optax.cosine_decay_schedule(2e-3, STEPS)),
    "lion": optax.lion(optax.cosine_decay_schedule(4e-4, STEPS)),
}


def forward(params, x):
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    kernel, bias = params[-1]
    return x @ kernel + bias


def trained(tx):
    """Final losses on the 1400 images of the training data and on the 397 others."""
    from sklearn import datasets  # which takes a second to import

    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = jnp.asarray(digits.data[order] / 16, jnp.float32)
    labels = jax.device_put(digits.target[order])

    def loss(params, images, labels):
        logits = forward(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def run(seed):
        key = jax.random.key(seed)
        *keys, batches = jax.random.split(key, len(SIZES))
        params = [
            (jax.random.normal(key, (m, n)) * np.sqrt(2 / m), jnp.zeros(n))
            for key, m, n in zip(keys, SIZES[:-1], SIZES[1:], strict=True)
        ]

        def step(carry, batch):
            params, state = carry
            grads = jax.grad(loss)(params, images[batch], labels[batch])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        batches = jax.random.randint(batches, (STEPS, BATCH), 0, 1400)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches)
        train = loss(params, images[:1400], labels[:1400])
        return train, loss(params, images[1400:], labels[1400:])

    return np.stack(jax.jit(jax.vmap(run))(jnp.arange(SEEDS)), -1).astype(np.float64)


# Thousands of steps: here it pays to compile well.
@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_final_loss_is_within_noise_of_float(name):
    tx = OPTIMIZERS[name]
    float_losses = trained(tx)
    noise = float_losses.std(0, ddof=1)
    assert (float_losses[:, 0] < 0.06).all()  # It learns.
    off = {
        qtype: trained(optim.quantized_state(tx, qtype)) - float_losses
        for qtype in ("dynamic", "int8")
    }
    for row in ("float", float_losses), *off.items():
        print(name, row[0], row[1].mean(0), row[1].std(0, ddof=1))
    # Of the mean over seeds, and of all but an odd one among them.
    assert (np.abs(off["dynamic"].mean(0)) < noise / 2).all()
    assert (np.abs(off["dynamic"]) < 2 * noise).all()
    # Evenly spaced codes are worse on the training data, with Adam for every seed.
    assert off["int8"][:, 0].mean() > 3 * abs(off["dynamic"][:, 0].mean())
    if name == "adam":
        assert not (off["int8"][:, 0] < 10 * noise[0]).any()
