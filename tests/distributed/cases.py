"""What several processes compute as one: functions of a mesh."""

import jax
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qwix_train
from qwix_train import calib, lora, ptq
from tests import models
from tests.optim import transforms as of_optax

MODEL = models.Mlp()
X = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32)
X *= np.float32([1, 3, 2])[:, None, None]
PARAMS = {
    "Dense_0": {"kernel": (8, 16), "bias": (16,)},
    "Dense_1": {"kernel": (16, 3), "bias": (3,)},
}


def mesh_of(shape):
    """A mesh over the first devices: of this process, or of all of them."""
    count = shape[0] * shape[1]
    devices = jax.devices()[:count]
    return jax.make_mesh(
        shape, ("data", "model"), (AxisType.Auto,) * 2, devices=devices
    )


def put(mesh, tree):
    """A tree on a mesh: rows over one axis, and columns over the other."""
    names = ("data", "model")

    def one(array):
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
            return array
        array = np.asarray(array)
        parts = [
            name if size % mesh.shape[name] == 0 else None
            for name, size in zip(names, array.shape, strict=False)
        ]
        sharding = NamedSharding(mesh, PartitionSpec(*parts))
        return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

    return jax.tree.map(one, tree)


def whole(tree):
    """A tree as NumPy arrays, all of each."""

    def one(x):
        if not isinstance(x, jax.Array) or x.is_fully_replicated:
            return np.asarray(x)
        if x.is_fully_addressable:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


def float_params():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda shape: rng.normal(0, 0.3, shape).astype(np.float32),
        PARAMS,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def state_of(mesh, tx, model=MODEL):
    """A float train state on a mesh."""
    params = put(mesh, float_params())
    opt_state = jax.jit(tx.init)(params)
    return TrainState(put(mesh, np.int32(0)), model.apply, params, tx, opt_state)


def train_step(state, x):
    def loss_of(params):
        logits = state.apply_fn({"params": params}, x)
        return models.loss_of(logits, models.classes(x))

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


def evaluate(params, x):
    return MODEL.apply({"params": params}, x)


def trained(mesh, step, state):
    """The losses and all numbers of the state after a step with each batch."""
    step, losses = jax.jit(step), []
    for x in X:
        state, loss = step(state, put(mesh, x))
        losses.append(loss)
    return whole((losses, state))


def in_training(mesh):
    """QAT with static ranges in the state, and a schedule."""
    rules = [models.rule("int4", "int8", act_static_scale=True)]
    schedule = qwix_train.Schedule(start_step=1, ramp_steps=2)
    state = state_of(mesh, optax.adam(0.01))
    state = qwix_train.attach(state, rules, put(mesh, X[0]))
    step = qwix_train.wrap_train_step(train_step, rules, schedule=schedule)
    return trained(mesh, step, state)


def learned_scales(mesh):
    rules = [
        qwix_train.QuantizationRule(
            weight_qtype="int4",
            act_qtype="int8",
            weight_calibration_method="lsq+",
            act_calibration_method="lsq",
        )
    ]
    state = state_of(mesh, optax.sgd(0.01))
    state = qwix_train.attach(state, rules, put(mesh, X[0]))
    return trained(mesh, qwix_train.wrap_train_step(train_step, rules), state)


def quantized_training(mesh):
    """Products of codes both ways, with stochastic rounding."""
    rules = [
        qwix_train.QtRule(
            weight_qtype="int8",
            act_qtype="int8",
            bwd_qtype="int8",
            bwd_stochastic_rounding="uniform",
            channelwise_noise_axes=(0, 1),
        )
    ]
    state = state_of(mesh, optax.sgd(0.01))
    return trained(mesh, qwix_train.wrap_train_step(train_step, rules), state)


def calibrated(mesh):
    """Ranges that a `Calibrator` collects, and the params that PTQ makes of them."""
    rules = [models.rule("int4", "int8", act_static_scale=True, act_observer="mse")]
    params = put(mesh, float_params())
    calibrator = calib.Calibrator(rules)
    step = calibrator.wrap(
        jax.jit(lambda params, x: MODEL.apply({"params": params}, x))
    )
    for x in X:
        step(params, put(mesh, x))
    model, params = ptq.quantize(
        MODEL, params, rules, put(mesh, X[0]), quant_stats=calibrator.quant_stats
    )
    out = jax.jit(model.apply)({"params": params}, put(mesh, X[0]))
    return whole((calibrator.state, params, out))


def adapters(mesh, **kwargs):
    rules = [lora.LoraRule(rank=2, alpha=4.0, **kwargs)]
    state = state_of(mesh, optax.adam(0.01))
    state = qwix_train.attach(state, rules, put(mesh, X[0]), rng=jax.random.key(1))
    return trained(mesh, train_step, state)


def qlora(mesh):
    return adapters(mesh, weight_qtype="nf4", tile_size=4, double_quant=True)


class NnxMlp(nnx.Module):
    """`models.Mlp`, whose variables lie on a mesh."""

    def __init__(self, mesh):
        rngs = nnx.Rngs(0)
        self.Dense_0 = nnx.Linear(8, 16, rngs=rngs)
        self.Dense_1 = nnx.Linear(16, 3, rngs=rngs)
        for name, layer in put(mesh, float_params()).items():
            for leaf, value in layer.items():
                getattr(getattr(self, name), leaf).set_value(value)

    def __call__(self, x):
        return self.Dense_1(nnx.relu(self.Dense_0(x)))


def nnx_trained(mesh, rules, wrt, **kwargs):
    """The losses and all variables of an NNX model after a step with each batch."""
    model = NnxMlp(mesh)
    qwix_train.attach(model, rules, put(mesh, X[0]), **kwargs)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=wrt)

    def step(model, optimizer, x):
        def loss_of(model):
            return models.loss_of(model(x), models.classes(x))

        diff = nnx.DiffState(0, wrt)
        loss, grads = nnx.value_and_grad(loss_of, argnums=diff)(model)
        optimizer.update(model, grads)
        return loss

    wrapped = wrt is nnx.Param
    step = nnx.jit(qwix_train.wrap_train_step(step, rules) if wrapped else step)
    losses = [step(model, optimizer, put(mesh, x)) for x in X]
    return whole((losses, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))))


def nnx_static_ranges(mesh):
    rules = [models.rule("int4", "int8", act_static_scale=True)]
    return nnx_trained(mesh, rules, nnx.Param)


def nnx_qlora(mesh):
    rules = [lora.LoraRule(rank=2, alpha=4.0, weight_qtype="nf4", tile_size=4)]
    return nnx_trained(mesh, rules, nnx.LoRAParam, rng=jax.random.key(1))


def experts(mesh):
    """Experts that are spread over the processes, with ranges joined over these."""
    rules = [models.rule("int4", "int8", act_axis_names=("model",))]
    rng = np.random.default_rng(2)
    shapes = {"up": (8, 8, 4), "down": (8, 4, 8)}
    params = {k: rng.normal(0, 0.3, s).astype(np.float32) for k, s in shapes.items()}
    by_expert = NamedSharding(mesh, PartitionSpec("model"))
    params = jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, by_expert, lambda i: x[i]),
        params,
    )

    @qwix_train.as_model
    def forward(params, x):
        def of_shard(params, x):
            inside = jax.nn.relu(jnp.einsum("bd,edf->ebf", x, params["up"]))
            y = jnp.einsum("ebf,efd->bd", inside, params["down"])
            return jax.lax.psum(y, "model")

        return jax.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=(PartitionSpec("model"), PartitionSpec()),
            out_specs=PartitionSpec(),
        )(params, x)

    def step(params, x):
        def loss_of(params):
            return (forward(params, x) ** 2).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        return jax.tree.map(lambda w, g: w - 0.01 * g, params, grads), loss

    return trained(mesh, qwix_train.wrap_train_step(step, rules), params)


def transforms(mesh):
    """Every Optax transformation of ours, one step of each in one program."""
    found = {}
    params, grads = put(mesh, of_optax.PARAMS), put(mesh, of_optax.GRADS)
    for name, make in of_optax.TRANSFORMS.items():
        found[name] = of_optax.run(make(optax.adam(0.1)), params, grads, steps=2)
    return whole(found)


def of_inputs(mesh, method):
    params = put(mesh, float_params())
    rules = [qwix_train.QuantizationRule(weight_qtype="int4")]
    method = method(rules)
    step = method.wrap(jax.jit(evaluate))
    for x in X:
        step(params, put(mesh, x))
    model = qwix_train.quantize_model(MODEL, method.provider)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X[0])["params"]
    quantized = method.quantize_params(params, shapes)
    out = jax.jit(model.apply)({"params": quantized}, put(mesh, X[0]))
    return whole((method.state, quantized, out))


def gptq(mesh):
    return of_inputs(mesh, ptq.Gptq)


def awq(mesh):
    return of_inputs(mesh, ptq.Awq)


def smoothquant(mesh):
    return of_inputs(mesh, lambda rules: ptq.SmoothQuant([models.rule("int8", "int8")]))


CASES = {
    x.__name__: x
    for x in (
        in_training,
        quantized_training,
        calibrated,
        qlora,
        nnx_static_ranges,
        nnx_qlora,
        experts,
        learned_scales,
        adapters,
        transforms,
        gptq,
        awq,
        smoothquant,
    )
}
FEW = tuple(CASES)[:2]


def run(names, shape):
    """The leaves of some cases on a mesh of a shape, by the path of each."""
    found = {}
    for name in names:
        leaves = jax.tree_util.tree_leaves_with_path(CASES[name](mesh_of(shape)))
        found[name] = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return found
