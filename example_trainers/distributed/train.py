"""What each of the processes does. None of it depends on how many there are."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import grain
import jax
import ml_collections
import orbax.checkpoint as ocp
from flax.training import train_state
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import qwix_train
from example_trainers import byte_text, loop, metrics
from example_trainers.qlora_lm.model_linen import LanguageModel, train_step
from example_trainers.static_range import data
from qwix_train import ptq

# The layers of a block whose input is cut along the devices of the model.
_ROWS = ("out", "down")


def make_rules(config: ml_collections.ConfigDict) -> list[qwix_train.QuantizationRule]:
    """Weights of the blocks in few bits, and activations with static ranges."""
    return [
        qwix_train.QuantizationRule(
            module_path="layer_.*",
            weight_qtype=config.weight_qtype,
            act_qtype="int8",
            act_static_scale=True,
        )
    ]


def make_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """A mesh over the devices of all processes."""
    shape = (jax.device_count() // config.model_parallel, config.model_parallel)
    return jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2)


def shardings(mesh: Mesh, state: Any) -> Any:
    """How a state is cut: its matrices along both axes of the mesh.

    What an optimizer keeps of a param has its path and its shape, and so its sharding.
    """

    def of_leaf(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = PartitionSpec()
        keys = [getattr(key, "key", None) for key in path]
        if leaf.ndim == 2 and keys[-1] in ("kernel", "embedding"):
            by_rows = keys[-2] in _ROWS
            spec = PartitionSpec(*(("model", "data") if by_rows else ("data", "model")))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(of_leaf, state)


def create_state(
    config: ml_collections.ConfigDict, mesh: Mesh
) -> train_state.TrainState:
    """A new state. Each process makes its own part of it alone."""
    model = LanguageModel(config.features, config.heads, config.layers)
    tokens = jax.ShapeDtypeStruct((1, config.sequence_length), jax.numpy.int32)
    tx = loop.make_optimizer(config.learning_rate, config.steps)

    def create() -> train_state.TrainState:
        inputs = jax.numpy.zeros(tokens.shape, tokens.dtype)
        params = model.init(jax.random.key(config.seed), inputs)["params"]
        state = train_state.TrainState.create(
            apply_fn=model.apply, params=params, tx=tx
        )
        return qwix_train.attach(state, make_rules(config), tokens)

    placed = shardings(mesh, jax.eval_shape(create))
    return jax.jit(create, out_shardings=placed)()


def batches(
    config: ml_collections.ConfigDict, mesh: Mesh, start: int
) -> Iterator[dict[str, jax.Array]]:
    """The batches from a step on: each process reads its rows alone.

    A batch has the same rows in the same order however many processes there are, so
    that the number of the step is all that there is to save of the input.
    """
    count, index = jax.process_count(), jax.process_index()
    dataset = (
        byte_text.train_dataset(
            data.load_splits()["train"],
            length=config.sequence_length,
            seed=config.seed,
        )
        .batch(config.batch_size // count, drop_remainder=True)
        .slice(slice(index + start * count, None, count))
    )
    rows = NamedSharding(mesh, PartitionSpec("data"))
    for batch in dataset.to_iter_dataset(grain.ReadOptions(num_threads=1)):
        yield {
            name: jax.make_array_from_process_local_data(rows, array)
            for name, array in batch.items()
        }


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> dict[str, Any] | None:
    """Trains from the latest checkpoint on, and exports the quantized model.

    Args:
        config: The settings.
        workdir: Where checkpoints, the export and the results go: a folder that all
            processes see.

    Returns:
        The results; None if the run was told to stop (SIGTERM), and has saved.
    """
    rules, mesh = make_rules(config), make_mesh(config)
    state = create_state(config, mesh)
    schedule = qwix_train.Schedule(start_step=config.quantize_from_step)
    step_fn = qwix_train.wrap_train_step(train_step, rules, schedule=schedule)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=(placed, None))
    history: list[dict[str, float]] = []
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(workdir / "checkpoints", options=options) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            restored = checkpoints.restore(
                start,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract),
                    history=ocp.args.JsonRestore(),
                ),
            )
            state, history = restored.state, restored.history["steps"]
        _say(f"{_shape(mesh)}, from step {start}")
        source, collected = batches(config, mesh, start), []
        for step in range(start + 1, config.steps + 1):
            state, measured = step_fn(state, next(source))
            collected.append(measured)
            # The steps of this process: JAX has a signal that came before the first of
            # them take effect in step 1, and no other.
            stopped = checkpoints.reached_preemption(step - start)
            if not (stopped or step % config.save_every == 0 or step == config.steps):
                continue
            merged = metrics.merge(collected)
            history.append({"step": step, **merged})
            collected.clear()
            checkpoints.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    history=ocp.args.JsonSave({"steps": list(history)}),
                ),
            )
            shown = ", ".join(f"{name} {value:.3f}" for name, value in merged.items())
            _say(f"step {step:4d}/{config.steps}: {shown}")
            if stopped:
                _say("told to stop: saved")
                return None
    _export(config, state, rules, workdir / "exported")
    return {"history": history}


def _export(
    config: ml_collections.ConfigDict,
    state: Any,
    rules: list[qwix_train.QuantizationRule],
    path: pathlib.Path,
) -> None:
    """Quantizes the weights where they are; every process writes its part of them."""
    tokens = jax.numpy.zeros((1, config.sequence_length), jax.numpy.int32)
    model = LanguageModel(config.features, config.heads, config.layers)
    _, params = ptq.quantize(
        model, state.params, rules, tokens, quant_stats=state.quant_stats
    )
    ptq.save(path, params, rules=rules, overwrite=True)
    _say(f"exported: {path.name}")


def _shape(mesh: Mesh) -> str:
    axes = " x ".join(f"{size} {name}" for name, size in mesh.shape.items())
    return f"processes: {jax.process_count()}, mesh: {axes}"


def _say(text: str) -> None:
    """Prints, in the first process alone."""
    if jax.process_index() == 0:
        print(text, flush=True)


def write_results(workdir: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes `results.json`, in the first process alone."""
    if jax.process_index() == 0:
        (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
