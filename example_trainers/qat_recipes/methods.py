"""The recipes that are compared: what a user writes for each of them."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optax

import qwix_train
from example_trainers.qat_recipes.tasks import Task
from qwix_train import optim, qat

# The range of a weight with few levels, as a multiple of its root mean square.
_CLIPPING = "rms,2"
# What the sensitivity of the layers is measured on.
_SENSITIVITY_BATCHES = 4

Rules = Sequence[qwix_train.QuantizationRule]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all recipes start from.

    Attributes:
        task: The model, its data and its steps.
        weight_qtype: The type of the weights.
        act_qtype: The type of the activations.
        steps: The number of steps.
        optimizer: The optimizer of float training.
        state: The train state of the float model, of the first seed.
        batches: What it trains on.
    """

    task: Task
    weight_qtype: str
    act_qtype: str
    steps: int
    optimizer: optax.GradientTransformation
    state: Any
    batches: Iterable[Any]

    @property
    def bits(self) -> int:
        """The number of bits of a weight."""
        return int(self.weight_qtype.removeprefix("int"))

    def rules(self, **options: Any) -> list[qwix_train.QuantizationRule]:
        """Every layer, the first and the last included."""
        options = {"weight_qtype": self.weight_qtype, **options}
        return [qwix_train.QuantizationRule(act_qtype=self.act_qtype, **options)]

    def plan(self, rules: Rules) -> qwix_train.Plan:
        """What the rules do to the model."""
        task = self.task
        return qwix_train.plan(task.model, rules, *task.inputs, **task.options)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A way of training.

    Attributes:
        rules: How the model is exported; in float if there are none.
        train_step: The train step.
        tx: The optimizer.
        prepared: Takes the train state of the float model; returns that to begin with.
        exported: Takes a train state; returns the params to quantize.
    """

    rules: Rules
    train_step: Callable[..., Any]
    tx: optax.GradientTransformation
    prepared: Callable[[Any], Any] = lambda state: state
    exported: Callable[[Any], Any] = lambda state: state.params


def plain(setting: Setting) -> Recipe:
    """Fake quantization from the first step to the last."""
    rules = setting.rules()
    step = qwix_train.wrap_train_step(setting.task.train_step, rules)
    return Recipe(rules, step, setting.optimizer)


def clipped(setting: Setting) -> Recipe:
    """The same, with ranges that do not reach out to the largest weight."""
    rules = setting.rules(weight_calibration_method=_CLIPPING)
    step = qwix_train.wrap_train_step(setting.task.train_step, rules)
    return Recipe(rules, step, setting.optimizer)


def scheduled(setting: Setting) -> Recipe:
    """Two bits more at first, then one, and the bits that are asked for at last."""
    rules, bits, steps = setting.rules(), setting.bits, setting.steps
    schedule = qwix_train.Schedule(
        weight_qtypes={
            0: f"int{bits + 2}",
            steps // 8: f"int{bits + 1}",
            steps // 4: f"int{bits}",
        }
    )
    step = qwix_train.wrap_train_step(setting.task.train_step, rules, schedule=schedule)
    return Recipe(rules, step, setting.optimizer)


def lsq(setting: Setting) -> Recipe:
    """Scales that are trained with the weights."""
    task = setting.task
    rules = setting.rules(weight_calibration_method="lsq")

    def prepared(state: Any) -> Any:
        return qwix_train.attach(state, rules, *task.inputs, **task.options)

    step = qwix_train.wrap_train_step(task.train_step, rules)
    return Recipe(rules, step, setting.optimizer, prepared)


def proximal(setting: Setting) -> Recipe:
    """The float step, and an optimizer that draws weights to their grid (PARQ)."""
    rules = setting.rules(weight_calibration_method=_CLIPPING)
    strength = optax.linear_schedule(0.0, 1.0, transition_steps=3 * setting.steps // 4)
    drawn = optim.proximal(setting.plan(rules), strength, method="parq")
    return Recipe(
        rules,
        setting.task.train_step,
        optax.chain(setting.optimizer, drawn),
        exported=lambda state: qwix_train.attach(state.params, state.opt_state),
    )


def freezing(setting: Setting) -> Recipe:
    """Weights that go back and forth between two levels are frozen at one."""
    rules = setting.rules()
    step = qwix_train.wrap_train_step(setting.task.train_step, rules)
    threshold = optax.cosine_decay_schedule(0.1, setting.steps, alpha=0.1)
    frozen = optim.freeze_oscillations(setting.plan(rules), threshold)
    return Recipe(rules, step, optax.chain(setting.optimizer, frozen))


def mixed(setting: Setting) -> Recipe:
    """Types for each op by what it costs, with as many bits on average."""
    task = setting.task
    sensitivity = qat.sensitivity(
        lambda state, batch: task.eval_step(state, batch).loss.compute(),
        setting.state,
        setting.rules(),
        itertools.islice(setting.batches, _SENSITIVITY_BATCHES),
    )
    print(f"\n{sensitivity}\n", flush=True)
    rules = qat.assign_bits(sensitivity, average_bits=setting.bits)
    step = qwix_train.wrap_train_step(task.train_step, rules)
    return Recipe(rules, step, setting.optimizer)


METHODS: dict[str, Callable[[Setting], Recipe]] = {
    "QAT": plain,
    "QAT: schedule": scheduled,
    "QAT: clipped": clipped,
    "QAT: LSQ": lsq,
    "QAT: freezing": freezing,
    "QAT: mixed bits": mixed,
    "proximal": proximal,
}


def applies(method: str, weight_qtype: str) -> bool:
    """Whether a method is one for weights of a type.

    Types can be mixed where there are narrower ones and wider ones.
    """
    return method != "QAT: mixed bits" or weight_qtype == "int3"
