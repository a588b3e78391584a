"""Several processes write once, and decide together."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from qwix_train import hooks, lora, ptq
from qwix_train.core.qarray import dequantize
from qwix_train.files import processes


class Hook(hooks.PeriodicAction):
    def _apply(self, step, t):
        pass


@pytest.fixture
def second(monkeypatch):
    """This process as the second one, and what the first one says."""
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(
        multihost_utils, "broadcast_one_to_all", lambda own: said.pop(0)
    )
    return said


def test_only_the_first_process_acts(second):
    second.append(np.zeros(1000, np.uint8))
    processes.once(lambda: pytest.fail("the second process acted"))
    second.append(np.frombuffer(b"OSError: full" + bytes(987), np.uint8))
    with pytest.raises(RuntimeError, match="The first process failed: OSError: full$"):
        processes.once(lambda: None)


def test_the_clock_of_the_first_process_counts(second):
    hook = Hook(every_secs=10)
    second += [np.bool_(False), np.bool_(True), np.bool_(False)]
    assert [hook(step, t=100.0 * step) for step in range(3)] == [False, True, False]
    by_steps = Hook(every_steps=2)  # No process has to ask.
    assert [by_steps(step, t=0.0) for step in range(3)] == [True, False, True]


CODE = """
import sys
import jax, numpy as np
from flax import linen as nn
from jax import numpy as jnp

port, index, path = sys.argv[1:]
index = int(index)
jax.distributed.initialize(f"localhost:{port}", 2, index)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import qwix_train
from qwix_train import hooks, lora, ptq
from qwix_train.core.qarray import WithAux, quantize_array

assert len(jax.local_devices()) == 1 and jax.device_count() == 2
mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))

def put(array):
    array = np.asarray(array)
    parts = ("a", *[None] * (array.ndim - 1)) if array.shape[0] % 2 == 0 else ()
    sharding = NamedSharding(mesh, PartitionSpec(*parts))
    return jax.make_array_from_callback(array.shape, sharding, lambda i: array[i])

x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
how = qwix_train.HowToQuantize(qtype="int8", channelwise_axes=(1,))
kernel = jax.tree.map(put, WithAux(quantize_array(jnp.asarray(x), how), how))
ptq.save_compressed_tensors(f"{path}/ct", {"Dense_0": {"kernel": kernel}})

layout = lora.AdapterLayout(
    path=("proj",), shape=(8, 4), op="dot_general", rank=2, alpha=4.0, scaling=2.0,
    dora=False, layers=(), a_axes=(0,), b_axes=(1,), contracted=(0,), flat=True,
)
adapters = {"proj_lora_a": put(x[:, :2]), "proj_lora_b": put(x[:2])}
lora.save_peft(f"{path}/peft", adapters, {("proj",): layout})
try:
    lora.save_peft(f"{path}/peft", adapters, {("proj",): layout})
except (FileExistsError, RuntimeError) as error:
    assert "exists. Pass overwrite=True" in str(error), error
else:
    raise AssertionError("both should fail")

class Writer:
    written = []
    def write_scalars(self, step, scalars):
        self.written.append(step)

rules = [qwix_train.QuantizationRule(weight_qtype="int8")]
plan = qwix_train.plan(nn.Dense(4), rules, jnp.ones((1, 8)))
report = hooks.QuantReport(Writer(), plan, every_secs=10)
params = {"kernel": put(x), "bias": put(np.zeros(4, np.float32))}
# The clock of the second process runs ten times as fast.
due = [report(step, 6.0 * step * (1 + 9 * index), params) for step in range(5)]
assert due == [False, False, True, False, True], due
assert Writer.written == ([] if index else [2, 4]), Writer.written
"""


@pytest.mark.slow
def test_two_processes_write_once_and_decide_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CODE), port, str(i), tmp_path],
            env={**os.environ, "XLA_FLAGS": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for child in children:
        _, err = child.communicate(timeout=240)
        assert child.returncode == 0, err
    x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    kernel = ptq.load_compressed_tensors(tmp_path / "ct")["Dense_0"]["kernel"]
    np.testing.assert_allclose(dequantize(kernel.array), x, atol=0.15)
    layouts = {
        ("proj",): lora.AdapterLayout(
            path=("proj",),
            shape=(8, 4),
            op="dot_general",
            rank=2,
            alpha=4.0,
            scaling=2.0,
            dora=False,
            layers=(),
            a_axes=(0,),
            b_axes=(1,),
            contracted=(0,),
            flat=True,
        )
    }
    adapters = lora.load_peft(tmp_path / "peft", layouts)
    np.testing.assert_array_equal(adapters["proj_lora_a"], x[:, :2])
