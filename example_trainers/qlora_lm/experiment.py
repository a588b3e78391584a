"""The comparison: what is trained, fine-tuned, exported and measured, in order."""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time
from types import ModuleType
from typing import Any

import jax
import ml_collections
import numpy as np

from example_trainers import byte_text, loop, metrics
from example_trainers.loop import make_optimizer
from example_trainers.qlora_lm import (
    data,
    generate,
    methods,
    model_linen,
    model_nnx,
    report,
)
from example_trainers.qlora_lm.measure import measure
from example_trainers.workdirs import claim_workdir

FRAMEWORKS: dict[str, ModuleType] = {"linen": model_linen, "nnx": model_nnx}


def make_phase(framework: ModuleType, name: str, *, steps: int) -> loop.Phase:
    """A phase of training, with steps that are compiled when they are first used."""
    train_step, eval_step = framework.compile_steps()
    return loop.Phase(
        name, steps, train_step, eval_step, framework.to_tree, framework.from_tree
    )


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
    """Pre-trains on prose, fine-tunes on code in several ways, and exports.

    Args:
        config: The settings, see `config.get_config`.
        workdir: Where checkpoints, exports and results go. A run that was killed in
            it continues where its latest checkpoint is.

    Returns:
        What `results.json` holds.
    """
    # Orbax takes absolute paths only.
    workdir = pathlib.Path(workdir).resolve()
    claim_workdir(config, workdir)
    started = time.perf_counter()
    experiment = Experiment(
        config,
        FRAMEWORKS[config.framework],
        workdir,
        data.load_prose(),
        data.load_code(),
    )
    trained, base = experiment.pretrain()
    print(
        f"test loss of the base: {base['prose']['loss']:.3f} on prose, "
        f"{base['code']['loss']:.3f} on code\n",
        flush=True,
    )
    rows, finished = [], {}
    sample: dict[str, Any] = {}
    for name in config.methods:
        method = methods.make_method(config, name)
        row, finished[name], exported = experiment.finetune(trained, method)
        rows.append(row)
        print(f"{report.format_row(row)}\n", flush=True)
        if name == config.sample_method:
            sample = {"method": method.label} | experiment.write_sample(*exported)

    times = _step_times(finished, experiment.train_batch(), config.timing_rounds)
    for row in rows:
        row["step_seconds"] = times[row["method"]]
    results = {
        "config": json.loads(config.to_json()),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "bytes_of_text": {
            kind: {name: len(text) for name, text in splits.items()}
            for kind, splits in (("prose", experiment.prose), ("code", experiment.code))
        },
        "base": base,
        "rows": rows,
        "sample": sample,
        "seconds": time.perf_counter() - started,
    }
    report.write(results, workdir)
    return results


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained, on what, and where it is kept.

    Attributes:
        config: The settings.
        framework: The dialect of Flax.
        workdir: Where checkpoints and exports go.
        prose: The text of pre-training, by split.
        code: The text of fine-tuning, by split.
    """

    config: ml_collections.ConfigDict
    framework: ModuleType
    workdir: pathlib.Path
    prose: dict[str, np.ndarray]
    code: dict[str, np.ndarray]

    def pretrain(self) -> tuple[Any, dict[str, Any]]:
        """Trains all weights on prose; returns the state, and what was measured."""
        config = self.config
        phase = make_phase(self.framework, "pre-training", steps=config.pretrain_steps)
        tx = make_optimizer(config.pretrain_learning_rate, config.pretrain_steps)
        seed = config.pretrain_seed
        state = self.framework.create_train_state(config, tx, seed)
        state, history = self._run(
            phase,
            state,
            self.prose,
            seed,
            eval_every=config.pretrain_eval_every,
            folder="pretraining",
        )
        return state, {
            "history": history,
            "params": _count(self.framework.arrays(state)["trained"]),
            "prose": loop.evaluate(phase.eval_step, state, self._test(self.prose)),
            "code": loop.evaluate(phase.eval_step, state, self._test(self.code)),
        }

    def finetune(
        self, trained: Any, method: methods.Method
    ) -> tuple[dict[str, Any], tuple[loop.Phase, Any], Any]:
        """Trains on code, from each seed, and exports what the first came to.

        Args:
            trained: The state after pre-training.
            method: What to train.

        Returns:
            What was measured; the phase and the state that it ended with; and the
            restored export.
        """
        config = self.config
        # One compiled step for each method, shared by all seeds.
        phase = make_phase(self.framework, method.label, steps=config.finetune_steps)
        tx = make_optimizer(method.learning_rate, config.finetune_steps)
        row: dict[str, Any] = {
            "method": method.name,
            "label": method.label,
            "losses": [],
            "histories": [],
        }
        state, exported = None, None
        for seed in config.seeds:
            state = self.framework.create_finetune_state(
                config, trained, tx, method.rules, seed, like=state
            )
            if exported is None:
                # Adapters add nothing yet, but a quantized base is not the base.
                start = loop.evaluate(phase.eval_step, state, self._test(self.code))
                row["loss_before"] = start["loss"]
            state, history = self._run(
                dataclasses.replace(phase, name=f"{method.label}, seed {seed}"),
                state,
                self.code,
                # Every method sees the same batches.
                seed,
                eval_every=config.finetune_eval_every,
                folder=f"{method.name}_seed_{seed}",
            )
            measured = loop.evaluate(phase.eval_step, state, self._test(self.code))
            row["losses"].append(measured["loss"])
            row["histories"].append(history)
            if exported is None:
                row |= _sizes(self.framework.arrays(state))
                row["exported"], exported = self._export(state, method)
        return row, (phase, state), exported

    def write_sample(self, predict: Any, params: Any) -> dict[str, str]:
        """Has a model continue the first bytes of the held-out code."""
        prompt = self.code["test"][: self.config.sequence_length]
        written = generate.sample(
            predict,
            params,
            prompt.astype(np.int32),
            length=self.config.sample_length,
            temperature=self.config.sample_temperature,
            seed=0,
        )
        return {
            "prompt": prompt.tobytes().decode(errors="replace"),
            "text": written.decode(errors="replace"),
        }

    def train_batch(self) -> Any:
        """A batch to time steps with."""
        return next(self._iterator(self.code, 0))

    def _run(
        self,
        phase: loop.Phase,
        state: Any,
        splits: dict[str, np.ndarray],
        seed: int,
        *,
        eval_every: int,
        folder: str,
    ) -> tuple[Any, list[dict[str, float]]]:
        return loop.run_phase(
            phase,
            state,
            batches=self._iterator(splits, seed),
            validation=lambda: self._eval_batches(
                splits["validation"], self.config.validation_batches
            ),
            eval_every=eval_every,
            checkpoint_dir=self.workdir / "checkpoints" / folder,
        )

    def _iterator(self, splits, seed: int):
        return byte_text.train_iterator(
            splits["train"],
            length=self.config.sequence_length,
            batch_size=self.config.batch_size,
            seed=seed,
        )

    def _test(self, splits):
        return self._eval_batches(splits["test"], self.config.test_batches)

    def _eval_batches(self, text: np.ndarray, count: int):
        return byte_text.eval_batches(
            text,
            length=self.config.sequence_length,
            batch_size=self.config.eval_batch_size,
            batches=count,
        )

    def _export(self, state: Any, method: methods.Method) -> tuple[dict[str, Any], Any]:
        """Exports a model, restores it, and evaluates what was restored."""
        rules = methods.export_rules(self.config, method)
        path = self.workdir / "exported" / method.name
        self.framework.export(self.config, state, rules, path)
        predict, params = self.framework.restore(self.config, rules, path)

        @jax.jit
        def eval_step(params, batch):
            return measure(predict(params, batch["input"]), batch)

        measured = loop.evaluate(eval_step, params, self._test(self.code))
        record = {
            "qtype": method.export_qtype,
            "loss": measured["loss"],
            "bytes": metrics.nbytes(params),
        }
        return record, (predict, params)


def _sizes(arrays: dict[str, Any]) -> dict[str, int]:
    """What the arrays of a state take, as they are held."""

    def nbytes(name: str) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays[name]))

    return {
        "trained_params": _count(arrays["trained"]),
        "trained_bytes": nbytes("trained"),
        "frozen_bytes": nbytes("frozen"),
        "optimizer_bytes": nbytes("optimizer"),
    }


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _step_times(
    finished: dict[str, tuple[loop.Phase, Any]], batch: Any, rounds: int
) -> dict[str, float]:
    """Medians over rounds in which the methods take turns: a busy machine slows all."""
    times: dict[str, list[float]] = {name: [] for name in finished}
    states = {name: state for name, (_, state) in finished.items()}
    for _ in range(rounds + 1):
        for name, (phase, _) in finished.items():
            started = time.perf_counter()
            states[name], measured = phase.train_step(states[name], batch)
            jax.block_until_ready(measured)
            times[name].append(time.perf_counter() - started)
    # In the first round, steps of a run that was resumed are compiled.
    return {name: statistics.median(found[1:]) for name, found in times.items()}
