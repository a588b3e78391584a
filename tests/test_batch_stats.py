"""Running statistics of batch normalization that stay as they are from a step on."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train import wrap_train_step
from qwix_train.qat import Schedule
from tests import models

RULES = [models.rule("int4", "int8")]
X = models.normal(16, 4, seed=0)
BATCH = {"x": X, "y": models.classes(X)}


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=False)(nn.Dense(7)(x)))


def normed_step(state, batch):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, updates = state.apply_fn(variables, batch["x"], mutable=["batch_stats"])
        return models.loss_of(out, batch["y"]), updates

    (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, **updates), loss


@pytest.mark.slow
def test_statistics_of_batch_norm_stay_from_a_step_on():
    model = Normed()
    state: Any = models.BatchState.create(
        apply_fn=model.apply,
        tx=optax.adam(0.01),
        **jax.jit(model.init)(jax.random.key(0), X),
    )
    schedule = Schedule(start_step=1, batch_stats_freeze_step=2)
    step = jax.jit(wrap_train_step(normed_step, RULES, schedule=schedule))
    plain = jax.jit(wrap_train_step(normed_step, RULES))
    states = [state]
    for _ in range(4):
        state, _ = step(state, BATCH)
        states.append(state)
    models.assert_differ(states[1].batch_stats, states[2].batch_stats)
    models.assert_same(states[2].batch_stats, states[4].batch_stats)
    # What the step learns is what it did: the batch normalizes.
    after, _ = plain(states[2], BATCH)
    models.assert_close(states[3].params, after.params, 1e-6)


def nnx_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda m: models.loss_of(m(x), y))(model)
    optimizer.update(model, grads)
    return loss


@pytest.mark.slow
def test_statistics_of_batch_norm_of_nnx_models():
    nnx_model = models.NnxMlp(nnx.Rngs(0), 0.0)
    optimizer = nnx.Optimizer(nnx_model, optax.sgd(0.1), wrt=nnx.Param)
    frozen = nnx.jit(
        wrap_train_step(nnx_step, RULES, schedule=Schedule(batch_stats_freeze_step=1))
    )
    frozen(nnx_model, optimizer, X, BATCH["y"])
    first = nnx.state(nnx_model, nnx.BatchStat)
    assert not np.allclose(nnx_model.bn.mean[...], 0)
    frozen(nnx_model, optimizer, X, BATCH["y"])
    models.assert_same(nnx.state(nnx_model, nnx.BatchStat), first)


def test_errors():
    state: Any = models.BatchState.create(
        apply_fn=nn.Dense(3).apply, tx=optax.identity(), params={}, batch_stats={}
    )
    frozen = wrap_train_step(
        normed_step, RULES, schedule=Schedule(batch_stats_freeze_step=1)
    )
    with pytest.raises(ValueError, match="no argument of the step is a state with"):
        frozen(state, BATCH)
    state = state.replace(batch_stats={"mean": jnp.zeros(3)})
    dropping = wrap_train_step(
        lambda state, batch: batch["x"],
        RULES,
        schedule=Schedule(batch_stats_freeze_step=1),
        allow_unmatched=True,
    )
    with pytest.raises(ValueError, match="1 states with batch_stats.*0 among"):
        dropping(state, BATCH)
