"""What several processes write as one, and what one of them may do wrong."""

import itertools
import pathlib

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import qwix_train
from qwix_train import calib, hooks, lora, ptq
from qwix_train.core.qarray import WithAux, quantize_array
from tests.distributed.cases import mesh_of, put

X = np.arange(32, dtype=np.float32).reshape(8, 4)
HOW = qwix_train.HowToQuantize(qtype="int8", channelwise_axes=(1,))
MODEL = nn.Dense(4, use_bias=False)


def rules_of(qtype="int8", **kwargs):
    return [qwix_train.QuantizationRule(weight_qtype=qtype, **kwargs)]


def on_host(x=X):
    return {"kernel": WithAux(quantize_array(jax.numpy.asarray(x), HOW), HOW)}


def layout_of(rank=2):
    return lora.AdapterLayout(
        path=("proj",),
        shape=(8, 4),
        op="dot_general",
        rank=rank,
        alpha=4.0,
        scaling=2.0,
        dora=False,
        layers=(),
        a_axes=(0,),
        b_axes=(1,),
        contracted=(0,),
        flat=True,
    )


LAYOUTS = {("proj",): layout_of()}


def adapters_of(x=X):
    return {"proj_lora_a": x[:, :2], "proj_lora_b": x[:2]}


def write(folder, x=X, overwrite=False):
    """Writes a file of each kind, from arrays that are sharded over the processes."""
    mesh, folder = mesh_of((jax.device_count(), 1)), pathlib.Path(folder)
    params, adapters = put(mesh, on_host(x)), put(mesh, adapters_of(x))
    ptq.save(folder / "ptq", params, overwrite=overwrite)
    ptq.save_compressed_tensors(folder / "ct", {"proj": params}, overwrite=overwrite)
    lora.save(folder / "lora", adapters, LAYOUTS, overwrite=overwrite)
    lora.save_peft(folder / "peft", adapters, LAYOUTS, overwrite=overwrite)


def read(folder):
    """The kernel and the first adapter of each file."""
    folder = pathlib.Path(folder)
    kernels = [
        ptq.restore(folder / "ptq")["kernel"],
        ptq.load_compressed_tensors(folder / "ct")["proj"]["kernel"],
    ]
    adapters = [
        lora.restore(folder / "lora", LAYOUTS),
        lora.load_peft(folder / "peft", LAYOUTS),
    ]
    kernels = [np.asarray(qwix_train.dequantize(x.array)) for x in kernels]
    return kernels, [np.asarray(x["proj_lora_a"]) for x in adapters]


def write_twice(folder):
    """Writes, and tries to write over it. Then exports, twice."""
    write(folder)
    refused = errors(folder, {"again": lambda: write(folder)})
    mesh = mesh_of((jax.device_count(), 1))
    state = TrainState.create(
        apply_fn=MODEL.apply, params=put(mesh, {"kernel": X}), tx=optax.sgd(0.1)
    )
    export = hooks.Export(f"{folder}/exports", MODEL, rules_of(), X.T, every_steps=1)
    for step in (1, 2):
        export(step, state=state)
    return refused


def write_on(folder):
    """Writes again and again, and says so."""
    for version in itertools.count():
        write(folder, X * (1 + version % 2), overwrite=version > 0)
        if jax.process_index() == 0:
            pathlib.Path(folder, "version").write_text(str(version))


def errors(folder, actions):
    """What each of some actions raises in this process."""
    found = {}
    for name, action in actions.items():
        try:
            action()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def fail(folder):
    """The errors of each kind of difference between the processes."""
    second = jax.process_index() == 1
    mesh = mesh_of((jax.device_count(), 1))
    nan = np.where(np.arange(32).reshape(8, 4) == 31, np.nan, X)
    sharded = {"kernel": put(mesh, on_host()["kernel"])}
    rows = qwix_train.HowToQuantize(qtype="int8", channelwise_axes=(0,))
    by_row = WithAux(quantize_array(jax.numpy.asarray(X), rows), rows)
    scale = np.array(by_row.array.scale)
    scale[-1] = np.nan  # the last row, which the second process has
    bad = put(mesh, by_row.replace(array=by_row.array.replace(scale=scale)))
    export_rules = rules_of("int4" if second else "int8")
    export = hooks.Export(f"{folder}/export", MODEL, export_rules, X.T, every_steps=1)

    def calibrated(batches, **kwargs):
        rules = rules_of(act_qtype="int8", act_static_scale=True, **kwargs)
        calibrator = calib.Calibrator(rules)
        step = calibrator.wrap(jax.jit(MODEL.apply))
        for x in batches:
            step({"params": {"kernel": X[:4]}}, x)
        return calibrator

    def merged(*args, **kwargs):
        calibrator = calibrated(*args, **kwargs)
        calib.merge_processes(calibrator, calibrator.state)

    wide = WithAux(quantize_array(jax.numpy.ones((8, 8)), HOW), HOW)
    other = {("proj",): layout_of(1 + second)}
    adapters = {"proj_lora_a": X[:, : 1 + second], "proj_lora_b": X[: 1 + second]}
    alone = {} if second else sharded
    averaging = "minmax" if second else "mean"
    actions = {
        "types": lambda: ptq.save(
            f"{folder}/a", sharded, rules=rules_of("int4" if second else "int8")
        ),
        "rules": lambda: ptq.save(
            f"{folder}/a", sharded, rules=rules_of(module_path=f"a{int(second)}")
        ),
        "a shard with NaN": lambda: ptq.save(f"{folder}/a", {"kernel": bad}),
        "a copy with NaN": lambda: ptq.save(
            f"{folder}/a", on_host(nan if second else X)
        ),
        "other values": lambda: ptq.save(f"{folder}/a", on_host(X + second)),
        "no params": lambda: ptq.save(f"{folder}/a", alone),
        "ct: NaN": lambda: ptq.save_compressed_tensors(
            f"{folder}/a", {"proj": on_host(nan if second else X)}
        ),
        "ct: other shapes": lambda: ptq.save_compressed_tensors(
            f"{folder}/a", {"proj": {"kernel": wide} if second else on_host()}
        ),
        "lora: rank": lambda: lora.save(f"{folder}/a", adapters, other),
        "peft: rank": lambda: lora.save_peft(f"{folder}/a", adapters, other),
        "export": lambda: export(1, state=put(mesh, {"kernel": X})),
        "ranges: empty": lambda: merged([] if second else [X]),
        "ranges: NaN": lambda: merged([nan if second else X]),
        "ranges: rules": lambda: merged([X], act_averaging=averaging),
    }
    found = errors(folder, actions)
    return found, sorted(path.name for path in pathlib.Path(folder).iterdir())


def report(folder):
    """When a report is due, and what is written, with clocks that differ."""
    index = jax.process_index()
    written = []

    class Writer:
        def write_scalars(self, step, scalars):
            written.append(step)

    plan = qwix_train.plan(MODEL, rules_of(), X.T)
    hook = hooks.QuantReport(Writer(), plan, every_secs=10)
    params = put(mesh_of((2, 1)), {"kernel": X})
    # The clock of the second process runs ten times as fast.
    due = [hook(step, 6.0 * step * (1 + 9 * index), params) for step in range(5)]
    return due, written


def merge(folder):
    """Statistics of batches that each process has of its own, and those of all."""
    rules = rules_of(act_qtype="int8", act_static_scale=True, act_observer="mse")
    batches = np.random.default_rng(0).normal(size=(4, 64, 8)).astype(np.float32)
    batches *= np.float32([1, 30, 2, 5])[:, None, None]
    params = {"params": {"kernel": X}}
    whole, own = calib.Calibrator(rules), calib.Calibrator(rules)
    for collector, some in (whole, batches), (own, batches[jax.process_index() :: 2]):
        step = collector.wrap(jax.jit(MODEL.apply))
        for x in some:
            step(params, x)
    return jax.device_get((calib.merge_processes(own, own.state), whole.state))


def everything(folder):
    """All of these but the killed ones, in one start."""
    folders = [pathlib.Path(folder, name) for name in ("a", "b")]
    for path in folders:
        path.mkdir(exist_ok=True)
    return write_twice(folders[0]), fail(folders[1]), report(folder), merge(folder)
