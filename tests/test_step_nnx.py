"""Train steps with NNX models, quantized unchanged."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx, struct
from flax.training import train_state
from jax import numpy as jnp

from qwix_train import quantize_fn, wrap_eval_step, wrap_train_step
from qwix_train.qat import QtProvider
from tests import models

X = models.normal(16, 4, seed=0)
Y = models.classes(X)
RULES = [
    models.rule("int8", "int8", module_path="l1"),
    models.rule("int4", "int8", module_path="l2"),
]


def make(rate=0.0):
    model = models.NnxMlp(nnx.Rngs(0), rate)
    return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)


def loss_fn(model, x, y):
    return models.loss_of(model(x), y)


def step(model, optimizer, x, y):
    value, grads = nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return value


def by_hand(model, x, y):
    """The loss and its gradients for l1 in int8 and l2 in int4, without dropout."""

    def loss(params):
        h = models.dense(params["l1"], x)
        mean, var = h.mean(0), h.var(0)
        bn = params["bn"]
        h = (h - mean) * jax.lax.rsqrt(var + 1e-5) * bn["scale"] + bn["bias"]
        logits = models.dense(params["l2"], nnx.relu(h), weight_bits=4)
        return models.loss_of(logits, y)

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.jit(jax.value_and_grad(loss))(params)


def check(before, after, value, count=1):
    """That `after` is `before` after one step of gradient descent."""
    want, grads = by_hand(before, X, Y)
    models.assert_close(value, want)
    params = nnx.to_pure_dict(nnx.state(before, nnx.Param))
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    models.assert_close(nnx.to_pure_dict(nnx.state(after, nnx.Param)), params, 1e-4)
    assert_clean(after)


def assert_clean(*trees):
    for tree in trees:
        for _, module in nnx.iter_modules(tree):
            assert not hasattr(type(module), "_qwix_train_class"), type(module)


CALLS = {
    "eager": lambda f: wrap_train_step(f, RULES),
    "nnx.jit around": lambda f: nnx.jit(wrap_train_step(f, RULES)),
    "nnx.jit inside": lambda f: wrap_train_step(nnx.jit(f), RULES),
    "partial": lambda f: wrap_train_step(functools.partial(f, y=Y), RULES),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_step_updates_the_very_objects(name):
    model, optimizer = make()
    before = nnx.clone(model)
    l1, kernel = model.l1, model.l1.kernel
    y = {} if name == "partial" else {"y": Y}
    value = CALLS[name](step)(model, optimizer, X, **y)
    assert type(model) is models.NnxMlp and type(model.l1) is nnx.Linear
    assert model.l1 is l1 and model.l1.kernel is kernel
    check(before, model, value)
    # Running statistics are those of the quantized layer.
    hidden = models.dense(nnx.to_pure_dict(nnx.state(before.l1)), X)
    models.assert_close(model.bn.mean[...], 0.01 * hidden.mean(0), 1e-4)
    assert optimizer.step[...] == 1


@pytest.mark.slow
def test_jax_jit_around_with_modules_as_pytrees():
    @jax.jit
    def functional(model, optimizer, x, y):
        value = step(model, optimizer, x, y)
        return model, optimizer, value

    for call in (jax.jit(wrap_train_step(functional, RULES)), functional):
        model, optimizer = make()
        before = nnx.clone(model)
        new, new_optimizer, value = call(model, optimizer, X, Y)
        assert type(new) is models.NnxMlp
        assert_clean(new, model)
        models.assert_same(nnx.state(model), nnx.state(before))
        if call is not functional:
            check(before, new, value)
        else:
            plain, plain_optimizer = make()
            models.assert_close(value, step(plain, plain_optimizer, X, Y), 1e-6)


def test_dropout_is_that_of_float_and_training_goes_down():
    jitted = nnx.jit(step)
    quantized = wrap_train_step(jitted, RULES)
    (model, optimizer), (plain, plain_optimizer) = make(0.5), make(0.5)
    losses, float_losses = [], []
    for _ in range(60):
        losses.append(float(quantized(model, optimizer, X, Y)))
        float_losses.append(float(jitted(plain, plain_optimizer, X, Y)))
    models.assert_same(nnx.state(model, nnx.RngState), nnx.state(plain, nnx.RngState))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert abs(np.mean(losses[-10:]) - np.mean(float_losses[-10:])) < 0.15
    again, again_optimizer = make(0.5)
    assert float(jitted(again, again_optimizer, X, Y)) == float_losses[0]


def test_an_eval_step_leaves_the_params_as_they_are():
    for run in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
        model, _ = make()
        before = nnx.clone(model)
        out = wrap_eval_step(run, RULES)(model, X)
        models.assert_same(nnx.state(model, nnx.Param), nnx.state(before, nnx.Param))
        models.assert_differ(out, run(before, X))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("compile_step", [nnx.jit, lambda f: f])
def test_what_no_rule_matches_is_bit_identical(compile_step):
    (model, optimizer), (plain, plain_optimizer) = make(0.5), make(0.5)
    nothing = wrap_train_step(step, models.NOTHING, allow_unmatched=True)
    value = compile_step(nothing)(model, optimizer, X, Y)
    want = compile_step(step)(plain, plain_optimizer, X, Y)
    models.assert_same(value, want)
    models.assert_same(nnx.state(model), nnx.state(plain))
    models.assert_same(nnx.state(optimizer), nnx.state(plain_optimizer))
    assert_clean(model)
    with pytest.raises(ValueError, match=r"(?s)'l1'.*'l2'"):
        wrap_train_step(step, models.NOTHING)(model, optimizer, X, Y)
    assert_clean(model)


class Inputs(nnx.Module):
    """A method with NNX arguments, and one that is not `__call__`."""

    def __init__(self, rngs):
        self.l1 = nnx.Linear(4, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def __call__(model, x, rngs=None):
        return model.dropout(model.l1(x), rngs=rngs)

    @nnx.jit
    def jitted(self, x):
        return self.l1(x)


METHODS = {
    "call": lambda m, rngs: m(X, rngs=rngs),
    "submodule": lambda m, rngs: m.dropout(m.l1(X), rngs=rngs),
    "jitted method": lambda m, rngs: m.dropout(m.jitted(X), rngs=rngs),
    "function": lambda m, rngs: nnx.jit(type(m).__call__)(m, X, rngs),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", METHODS)
def test_methods_and_rngs_as_arguments(name):
    model, rngs = Inputs(nnx.Rngs(0)), nnx.Rngs(dropout=1)
    rules = [models.rule("int8", "int8", module_path="l1")]
    out = wrap_eval_step(METHODS[name], rules)(model, rngs)
    plain_rngs = nnx.Rngs(dropout=1)
    plain = METHODS[name](model, plain_rngs)
    assert np.array_equal(out == 0, plain == 0)
    assert rngs.dropout.count[...] == plain_rngs.dropout.count[...] == 1
    want = models.dense(nnx.to_pure_dict(nnx.state(model.l1)), X)
    models.assert_close(out, jnp.where(out == 0, 0, 2 * want))
    assert_clean(model)


@pytest.mark.slow
def test_modules_in_containers_metrics_and_model_and_optimizer():
    model = models.NnxMlp(nnx.Rngs(0), 0.0)
    teacher = models.NnxMlp(nnx.Rngs(1), 0.0)
    teacher.eval()
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
    both = nnx.ModelAndOptimizer(model, optax.sgd(0.1))
    before = nnx.clone(model)

    def wide(state, *, metrics, others):
        def loss(model):
            teacher = others["teacher"][0]
            # The teacher belongs to an outer trace than the student.
            return loss_fn(model, X, Y), teacher(X)

        (value, target), grads = nnx.value_and_grad(loss, has_aux=True)(state.model)
        state.update(grads)
        metrics.update(loss=value)
        return value, target

    with pytest.warns(UserWarning, match="2 different trees of params of one model"):
        value, target = wrap_train_step(wide, RULES)(
            both, metrics=metrics, others={"teacher": (teacher, None)}
        )
    assert both.model is model
    check(before, model, value)
    models.assert_close(metrics.compute()["loss"], value)
    models.assert_differ(target, teacher(X))
    assert_clean(teacher)


class Stack(nnx.Module):
    """Layers under a transformation."""

    def __init__(self, kind, rngs):
        self.kind = kind

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        if kind == "remat":
            self.layers = nnx.Linear(4, 4, rngs=rngs)
        else:
            self.layers = create(rngs)

    def __call__(self, x):
        if self.kind == "scan":

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x, layer):
                return jnp.tanh(layer(x))

            return forward(x, self.layers)
        if self.kind == "vmap":
            call = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
            return call(self.layers, x).sum(0)
        return nnx.remat(lambda layer, x: layer(x))(self.layers, x)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", ["scan", "vmap", "remat"])
def test_layers_under_a_transformation(kind):
    model = Stack(kind, nnx.Rngs(0))
    before = nnx.clone(model)

    def hand(params, x):
        layer = functools.partial(models.dense)
        if kind == "scan":
            for i in range(3):
                x = jnp.tanh(layer(jax.tree.map(lambda p, i=i: p[i], params), x))
            return x
        if kind == "vmap":
            return jax.vmap(layer, (0, None))(params, x).sum(0)
        return layer(params, x)

    def run(model, x):
        return nnx.value_and_grad(lambda m: model_sum(m, x))(model)

    def model_sum(m, x):
        return (m(x) ** 2).sum()

    rules = [models.rule("int8", "int8", module_path="layers")]
    value, grads = wrap_train_step(nnx.jit(run), rules)(model, X)
    params = nnx.to_pure_dict(nnx.state(before.layers))
    want = jax.jit(jax.value_and_grad(lambda p: (hand(p, X) ** 2).sum()))(params)
    models.assert_close((value, nnx.to_pure_dict(grads)["layers"]), want, 1e-4)
    models.assert_same(nnx.state(model), nnx.state(before))
    out = wrap_eval_step(lambda m, x: m(x), rules)(model, X)
    models.assert_close(out, jax.jit(hand)(params, X))
    models.assert_same(nnx.state(model), nnx.state(before))


@pytest.mark.slow
def test_the_functional_style_with_graph_definitions():
    def functional(graphdef, params, rest, x, y):
        def loss(params):
            return loss_fn(nnx.merge(graphdef, params, rest, copy=True), x, y)

        value, grads = jax.value_and_grad(loss)(params)
        model = nnx.merge(graphdef, params, rest)
        return nnx.split(model.l1)[0], value, nnx.to_pure_dict(grads)

    model, _ = make()
    graphdef, *state = nnx.split(model, nnx.Param, ...)
    want, want_grads = by_hand(model, X, Y)
    for call in (
        wrap_train_step(functional, RULES),
        jax.jit(wrap_train_step(functional, RULES), static_argnums=0),
        wrap_train_step(jax.jit(functional, static_argnums=0), RULES),
    ):
        layer, value, grads = call(graphdef, *state, X, Y)
        models.assert_close((value, grads), (want, want_grads))
        assert layer == nnx.graphdef(model.l1)
    hidden = wrap_train_step(
        functools.partial(lambda *a: functional(graphdef, *a)), RULES
    )
    with pytest.raises(ValueError, match="graph definition"):
        hidden(*state, X, Y)


class HasGraphdef(struct.PyTreeNode):
    params: Any
    graphdef: Any
    step: int = 0


class HasStaticGraphdef(struct.PyTreeNode):
    params: Any
    graphdef: Any = struct.field(pytree_node=False)


class HasBoth(train_state.TrainState):
    graphdef: Any = struct.field(pytree_node=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class HasNested:
    inner: Any
    graphdef: Any = dataclasses.field(metadata={"static": True}, default=None)


def states_with_a_graphdef(graphdef, params):
    tx = optax.sgd(0.1)
    return {
        "field": HasGraphdef(params, graphdef),
        "static": HasStaticGraphdef(params, graphdef),
        "beside apply_fn": HasBoth.create(
            apply_fn=None, params=params, tx=tx, graphdef=graphdef
        ),
        "nested": HasNested({"state": HasStaticGraphdef(params, graphdef)}),
        "in a container": HasGraphdef(params, {"model": (graphdef,)}),
    }


@pytest.mark.parametrize("kind", states_with_a_graphdef(None, {}))
def test_a_state_that_holds_a_graph_definition(kind):
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    state = states_with_a_graphdef(graphdef, params)[kind]

    def step(state, x):
        held = state.inner["state"] if kind == "nested" else state
        found = held.graphdef["model"][0] if "container" in kind else held.graphdef
        return state, nnx.merge(found, held.params)(x)

    rules = [models.rule("int8", "int8")]
    for run in (wrap_eval_step(step, rules), jax.jit(wrap_eval_step(step, rules))):
        new, out = run(state, X)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        want = models.dense(nnx.to_pure_dict(nnx.state(layer)), X)
        models.assert_close(out, want)


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.count = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        self.sow(nnx.Intermediate, "hidden", x)
        self.count[...] += 1
        return x


@pytest.mark.parametrize("jit", [nnx.jit, lambda f: f])
def test_what_a_model_with_a_list_sows_is_captured(jit):
    def step(model, x):
        def loss(model):
            out, kept = nnx.capture(model, nnx.Intermediate)(x)
            return jnp.mean(out), (out, kept)

        return nnx.value_and_grad(loss, has_aux=True)(model)[0][1]

    model = Layers(nnx.Rngs(0))
    out, kept = jit(wrap_train_step(step, models.INT8))(model, X)
    want = X
    for layer in model.layers:
        want = models.dense(nnx.to_pure_dict(nnx.state(layer)), want)
    models.assert_close(out, want)
    models.assert_same(kept["hidden"].get_value()[0], out)
    assert model.count[...] == 1
    assert_clean(model)


@pytest.mark.slow
def test_a_train_state_with_a_graph_definition():
    model, _ = make()
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    class State(train_state.TrainState):
        rest: nnx.State

    def functional(state, x, y):
        def loss(params):
            logits, (_, updated) = state.apply_fn(params, state.rest)(x)
            return models.loss_of(logits, y)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    state = State.create(
        apply_fn=graphdef.apply, params=params, rest=rest, tx=optax.sgd(0.1)
    )
    new, value = jax.jit(wrap_train_step(functional, RULES))(state, X, Y)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    want = wrap_eval_step(loss_fn, RULES)(model, X, Y)
    models.assert_close(value, want)
    models.assert_differ(value, loss_fn(model, X, Y))


class Sowing(nnx.Module):
    """Changes its own structure as it runs."""

    def __init__(self, rngs):
        self.l1 = nnx.Linear(4, 4, rngs=rngs)
        self.calls = 0

    def __call__(self, x):
        x = self.l1(x)
        self.sow(nnx.Intermediate, "hidden", x)
        self.calls += 1
        return x

    def layer(self, x):
        return self.l1(x), self.l1, self.l1.bias


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_variables_and_attributes_that_a_call_adds():
    model = Sowing(nnx.Rngs(0))
    layer = model.l1
    rules = [models.rule("int8", "int8", module_path="l1")]
    wrapped = wrap_eval_step(lambda m, x: (m(x), m(x))[1], rules)
    out = wrapped(model, X)
    want = models.dense(nnx.to_pure_dict(nnx.state(model.l1)), X)
    assert model.calls == 2 and model.l1 is layer
    models.assert_close(model.hidden, (want, want))
    models.assert_same(jax.tree.leaves(model.hidden)[1], out)
    assert_clean(model)
    # Those that `nnx.capture` collects are not left behind.
    del model.hidden
    capture = nnx.capture(lambda m, x: m(x), nnx.Intermediate)
    out, captured = wrap_eval_step(capture, rules)(model, X)
    models.assert_same(jax.tree.leaves(captured), [out])
    assert not hasattr(model, "hidden")
    # What a method returns may be the model's own parts.
    out, same, bias = wrap_eval_step(lambda m, x: m.layer(x), rules)(model, X)
    assert same is layer and bias is layer.bias
    models.assert_close(out, want)
    assert_clean(model)


def test_cached_steps_do_not_leak():
    @nnx.jit
    def forward(model, x):
        return model(x)

    model, _ = make()
    model.eval()
    plain = forward(model, X)
    int8 = wrap_eval_step(forward, models.INT8)
    int4 = wrap_eval_step(forward, models.INT4)
    first = int8(model, X), int4(model, X)
    models.assert_same(forward(model, X), plain)
    models.assert_same((int8(model, X), int4(model, X)), first)
    models.assert_differ(first[0], plain)
    models.assert_differ(first[0], first[1])


def test_an_exception_in_the_middle_leaves_nothing_changed():
    class Broken(nnx.Module):
        def __init__(self, rngs):
            self.l1 = nnx.Linear(4, 4, rngs=rngs)
            self.n = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x, fail=True):
            x = self.l1(x)
            self.n[...] += 1
            if fail:
                raise RuntimeError("on purpose")
            return x

    model = Broken(nnx.Rngs(0))
    state = jax.tree.map(jnp.copy, nnx.state(model))
    wrapped = wrap_eval_step(lambda m, x, fail: m(x, fail), models.INT8)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="on purpose"):
            wrapped(model, X, True)
        assert type(model) is Broken
        assert_clean(model)
        models.assert_same(nnx.state(model), state)
    plain = model.l1(X)
    models.assert_differ(wrapped(model, X, False), plain)
    assert model.n[...] == 1


def test_classes_of_unusual_make():
    registered = []

    class Registered(nnx.Module):
        def __init_subclass__(cls, *, name, **kwargs):
            super().__init_subclass__(**kwargs)
            assert name not in registered
            registered.append(name)

    class Model(Registered, name="model"):
        def __init__(self, rngs):
            self.l1 = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.l1(x)

    @nnx.dataclass
    class Data(nnx.Module):
        l1: nnx.Linear
        factor: float = 2.0

        def __call__(self, x):
            return self.l1(x) * self.factor

    for model in (Model(nnx.Rngs(0)), Data(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))):
        rules = [models.rule("int8", "int8", module_path="l1")]
        out = wrap_eval_step(nnx.jit(lambda m, x: m(x)), rules)(model, X)
        want = models.dense(nnx.to_pure_dict(nnx.state(model.l1)), X)
        models.assert_close(out, want * getattr(model, "factor", 1))
        assert_clean(model)
    assert registered == ["model"]


def test_a_model_that_is_not_an_argument():
    model, _ = make()
    scale = 2.0

    def helper(x):
        return scale * model(x)

    class Trainer:
        def __init__(self):
            self.model = model

        def evaluate(self, x):
            return scale * self.model(x)

    model.eval()
    want = wrap_eval_step(lambda model, x: scale * model(x), RULES)(model, X)
    helpers = {"evaluate": helper}
    for step in (
        lambda x: scale * model(x),
        lambda x: helper(x),
        lambda x: helpers["evaluate"](x),
        jax.jit(helper),
        functools.partial(lambda call, x: call(x), helper),
        Trainer().evaluate,
        lambda x: GLOBAL[0](scale, x),
    ):
        GLOBAL[:] = [lambda scale, x: scale * model(x)]
        models.assert_close(wrap_eval_step(step, RULES)(X), want)
        assert_clean(model)


GLOBAL = []


@pytest.mark.slow
def test_a_method_of_an_object_that_holds_the_model():
    class Learner(nnx.Module):
        def __init__(self):
            self.model = models.NnxMlp(nnx.Rngs(0), 0.0)
            self.optimizer = nnx.Optimizer(self.model, optax.sgd(0.1), wrt=nnx.Param)

        def train(self, x, y):
            return step(self.model, self.optimizer, x, y)

    learner = Learner()
    before = nnx.clone(learner.model)
    rules = [
        models.rule(r.weight_qtype, r.act_qtype, f"model/{r.module_path}")
        for r in RULES
    ]
    value = wrap_train_step(learner.train, rules)(X, Y)
    check(before, learner.model, value)


def test_a_hidden_model_is_refused():
    class Holder:
        model = make()[0]

    with pytest.raises(ValueError, match="attribute of another object"):
        wrap_train_step(lambda x, y: loss_fn(Holder.model, x, y), RULES)(X, Y)
    wrapped = wrap_train_step(lambda f, p, x: f(p, x), RULES)
    with pytest.raises(ValueError, match="as_model"):
        wrapped(quantize_fn(lambda p, x: x @ p, QtProvider(models.INT8)), X.T, X)
