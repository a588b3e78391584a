"""The comparison: what is trained, exported and measured, in order."""

import dataclasses
import json
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import qwix_train
from example_trainers import loop
from example_trainers.loop import make_optimizer
from example_trainers.qat_recipes import methods, report
from example_trainers.qat_recipes.tasks import Task, make_task
from example_trainers.workdirs import SettingsError, claim_workdir


class Exporter:
    """Evaluates a task's model as it would be served: quantized, in integers.

    Args:
        task: The task.
    """

    def __init__(self, task: Task):
        self._task = task
        self._models: dict[Any, Any] = {}
        # Compiled once for each set of rules, whatever the optimizer was.
        self._eval_step = jax.jit(task.eval_step)
        self._served = optax.identity()

    def eval_step(self, recipe: methods.Recipe) -> Callable[[Any, Any], Any]:
        """Returns an eval step that exports the model of the state first."""

        def evaluate(state: Any, batch: Any) -> Any:
            apply_fn, params = state.apply_fn, recipe.exported(state)
            if recipe.rules:
                model, abstract = self._model(tuple(recipe.rules))
                apply_fn = model.apply
                params = qwix_train.quantize_params(params, abstract)
            return self._eval_step(
                state.replace(
                    step=0,
                    apply_fn=apply_fn,
                    params=params,
                    tx=self._served,
                    opt_state=(),
                ),
                batch,
            )

        return evaluate

    def _model(self, rules: tuple[qwix_train.QuantizationRule, ...]) -> Any:
        if rules not in self._models:
            task = self._task
            provider = qwix_train.PtqProvider(rules)
            model = qwix_train.quantize_model(task.model, provider)
            variables = jax.eval_shape(
                lambda *inputs: model.init(jax.random.key(0), *inputs, **task.options),
                *task.inputs,
            )
            self._models[rules] = model, variables["params"]
        return self._models[rules]


class Experiment:
    """All that is trained and measured on one task.

    Args:
        config: The settings.
        task: The model, its data and its steps.
        workdir: Where checkpoints go.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, task: Task, workdir: pathlib.Path
    ):
        self.config, self.task, self._workdir = config, task, workdir
        self._exporter = Exporter(task)
        self._rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Returns the measurements: a row for each type of weights and method."""
        task, settings = self.task, self.task.config
        # Two streams of batches for each seed; all methods fine-tune on the same one.
        streams = {
            seed: np.random.SeedSequence(seed).generate_state(2).tolist()
            for seed in self.config.seeds
        }
        steps, rate = settings.float_steps, settings.float_learning_rate
        recipe = methods.Recipe((), task.train_step, make_optimizer(rate, steps))
        floating = self._train(
            recipe,
            steps,
            {seed: task.create_state(seed, recipe.tx) for seed in streams},
            {
                seed: task.train_batches(data, steps)
                for seed, (data, _) in streams.items()
            },
            "float",
            "float",
        )

        steps, rate = settings.qat_steps, settings.qat_learning_rate
        batches = {
            seed: task.train_batches(data, steps) for seed, (_, data) in streams.items()
        }
        optimizer = make_optimizer(rate, steps)
        # The control: what these steps do without any quantization.
        control = methods.Recipe((), task.train_step, optimizer)
        self._train(control, steps, floating, batches, "float", "float, as many steps")
        for weight_qtype in self.config.weight_qtypes:
            setting = methods.Setting(
                task,
                weight_qtype,
                self.config.act_qtype,
                steps,
                optimizer,
                floating[self.config.seeds[0]],
                batches[self.config.seeds[0]],
            )
            evaluate = self._exporter.eval_step(methods.plain(setting))
            measured = [
                {"test": loop.evaluate(evaluate, state, task.test), "seconds": 0.0}
                for state in floating.values()
            ]
            self._add(weight_qtype, "PTQ", measured)
            for method in self.config.methods:
                if methods.applies(method, weight_qtype):
                    recipe = methods.METHODS[method](setting)
                    self._train(recipe, steps, floating, batches, weight_qtype, method)
        return {
            "task": task.name,
            "label": task.label,
            "metric": task.metric,
            "rows": self._rows,
        }

    def _train(
        self,
        recipe: methods.Recipe,
        steps: int,
        states: dict[int, Any],
        batches: dict[int, grain.IterDataset[Any]],
        weights: str,
        method: str,
    ) -> dict[int, Any]:
        """Trains the model of each seed, and adds what its export is worth."""
        evaluate = self._exporter.eval_step(recipe)
        phase = loop.Phase(
            name="",
            steps=steps,
            # One compiled step, shared by all seeds.
            train_step=jax.jit(recipe.train_step, donate_argnums=0),
            eval_step=evaluate,
            to_tree=lambda state: state,
            from_tree=lambda state, tree: tree,
        )
        trained, measured = {}, []
        for seed, state in states.items():
            started = time.perf_counter()
            name = f"{self.task.name} | {weights} | {method} | seed {seed}"
            trained[seed], history = loop.run_phase(
                dataclasses.replace(phase, name=name),
                _begin(recipe, state),
                batches=iter(batches[seed]),
                validation=lambda: self.task.validation,
                eval_every=steps,
                checkpoint_dir=self._workdir / re.sub(r"\W+", "_", name),
            )
            measured.append(
                {
                    "test": loop.evaluate(evaluate, trained[seed], self.task.test),
                    "validation": history[-1],
                    "seconds": time.perf_counter() - started,
                }
            )
        self._add(weights, method, measured)
        return trained

    def _add(self, weights: str, method: str, measured: list[dict[str, Any]]) -> None:
        row = {"weights": weights, "method": method, "seeds": measured}
        self._rows.append(row)
        print(
            f"{self.task.name} | {report.format_row(row, self.task.metric)}", flush=True
        )


def _begin(recipe: methods.Recipe, state: Any) -> Any:
    """The train state of a float model as a recipe begins with it."""
    # Copies, because the train step takes over the buffers of the state it is given.
    state = recipe.prepared(state.replace(step=0, opt_state=()))
    state = jax.tree.map(jnp.copy, state)
    return state.replace(tx=recipe.tx, opt_state=recipe.tx.init(state.params))


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
    """Trains by every method, and reports what each recovers.

    Args:
        config: The settings, see `config.get_config`.
        workdir: Where checkpoints and results go. A run that was killed in it
            continues where its latest checkpoint is.

    Returns:
        What `results.json` holds; `broken` in it lists what does not hold of what
        must.

    Raises:
        SettingsError: There is no such method, or the workdir holds a run with other
            settings.
    """
    unknown = [name for name in config.methods if name not in methods.METHODS]
    if unknown:
        raise SettingsError(
            f"There is no method {', '.join(map(repr, unknown))}. Choose from "
            f"{', '.join(methods.METHODS)}."
        )
    # Orbax takes absolute paths only.
    workdir = pathlib.Path(workdir).resolve()
    claim_workdir(config, workdir)
    started = time.perf_counter()
    checkpoints = workdir / "checkpoints"
    measured = [
        Experiment(config, make_task(name, config), checkpoints).run()
        for name in config.tasks
    ]
    results = {
        "config": json.loads(config.to_json()),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "tasks": [report.summarize(task) for task in measured],
        "seconds": time.perf_counter() - started,
    }
    results["broken"] = report.check(results)
    report.write(results, workdir)
    return results
