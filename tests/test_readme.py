"""The README's code runs as it stands there."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwix_train
from tests import trace_count

pytestmark = pytest.mark.documentation
README = pathlib.Path(__file__).parent.parent / "README.md"


def test_python_blocks_run_in_order(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    # The first block is the one-line summary, of names defined further down.
    for block in blocks[1:]:
        exec(block, names)
    assert len(blocks) == 18
    assert names["state"].step == 5
    assert np.isfinite(names["loss"])

    # The wrapped step is quantized: its loss is that of the quantized weights.
    kernel = names["params"]["Dense_0"]["kernel"]
    scale = np.abs(kernel).max(0, keepdims=True) * np.float32(1 / 7.5)
    codes = np.clip(np.round(np.asarray(kernel) / scale), -8, 7)
    assert len(np.unique(codes)) <= 16
    float_loss = jax.jit(names["train_step"])(
        names["state"].replace(params=names["params"]), names["batch"]
    )[1]
    quantized_loss = names["step"](
        names["state"].replace(params=names["params"]), names["batch"]
    )[1]
    assert float_loss != quantized_loss
    assert abs(float_loss - quantized_loss) < 0.2

    # The quantized model computes what the training step saw.
    assert names["quantized"]["Dense_0"]["kernel"].array.qvalue.dtype == jnp.int4
    expected = names["qat_logits"]
    np.testing.assert_allclose(names["logits"], expected, rtol=0, atol=1e-5)
    assert (tmp_path / "export").is_dir()
    scale = names["static_params"]["Dense_1"]["dot_general0_lhs_scale"].array
    # The images are ones, which the best range makes as good as exact.
    scale = float(scale[0, 0])
    assert abs(round(1 / scale) * scale - 1) < 0.002

    # The phone's model is of integers, and computes what the fake-quantized one does.
    assert names["litert"].is_full_integer
    assert (tmp_path / "model.tflite").stat().st_size < 10_000
    (report,) = names["litert"].report(names["images"])
    assert report.max_steps <= 1 and report.equal >= 0.9
    assert names["litert_logits"].shape == (32, 10)

    # Recipes: scales that are trained, params on a grid, bits within a size.
    learned = names["learned"].params["Dense_1"]
    assert learned["kernel_scale"].shape == (1, 64)
    assert set(learned) > {"kernel", "bias", "dot_general0_lhs_scale"}
    on_grid = names["on_grid"]["Dense_1"]
    codes = np.asarray(on_grid["kernel"], np.float64) / on_grid["kernel_scale"]
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
    assert np.abs(codes).max() <= 8
    bits = {rule.module_path: rule.weight_qtype for rule in names["mixed"]}
    assert set(bits.values()) <= {"int2", "int4"}
    assert names["trained"].step == 6

    table = capsys.readouterr().out
    assert "FULLY_CONNECTED  int8[32x64] int8[64x64] per channel" in table
    assert re.search(r"Dense_0 +dot_general0 .*int4 channel 1 tile 0:16", table)
    assert re.search(r"Dense_1 +dot_general0 .*float", table)


def test_the_wrapped_step_compiles_as_often_as_the_plain_one():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks[1:3]:
        exec(block, names)
    wrap = functools.partial(qwix_train.wrap_train_step, rules=names["rules"])
    traces = {}
    for name, change in (("plain", lambda step: step), ("wrapped", wrap)):
        step, traced = trace_count.counted(names["train_step"])
        step = jax.jit(change(step))
        state = names["state"].replace(step=0)  # a Python number, in the first call
        traces[name] = []
        for _ in range(3):
            state, loss = step(state, names["batch"])
            traces[name].append(len(traced))
        assert jnp.isfinite(loss)
    assert traces["wrapped"] == traces["plain"] == [1, 1, 1]
