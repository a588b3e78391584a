"""The code of the README and of each page of the documentation runs as it stands."""

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
ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks_of(file):
    return re.findall(r"^```python\n(.*?)^```", file.read_text(), re.DOTALL | re.M)


PAGES = sorted(file.stem for file in (ROOT / "docs").glob("*.md") if blocks_of(file))


def run(blocks, names):
    for block in blocks:
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def ten_lines():
    """The names of the README's code, which every page goes on from."""
    # The first block is the one-line summary, of names defined further down.
    return run(blocks_of(README)[1:], {})


def test_the_readmes_step_is_quantized(ten_lines):
    assert ten_lines["state"].step == 3
    assert np.isfinite(ten_lines["loss"])
    # Its loss is that of the quantized weights.
    kernel = ten_lines["params"]["Dense_0"]["kernel"]
    scale = np.abs(kernel).max(0, keepdims=True) * np.float32(1 / 7.5)
    codes = np.clip(np.round(np.asarray(kernel) / scale), -8, 7)
    assert len(np.unique(codes)) <= 16
    state = ten_lines["state"].replace(params=ten_lines["params"])
    float_loss = jax.jit(ten_lines["train_step"])(state, ten_lines["batch"])[1]
    quantized_loss = ten_lines["step"](state, ten_lines["batch"])[1]
    assert float_loss != quantized_loss
    assert abs(float_loss - quantized_loss) < 0.2


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, ten_lines, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(ROOT / "docs" / f"{page}.md")
    names = run(blocks, dict(ten_lines))
    if check := CHECKS.get(page):
        check(names, capsys.readouterr().out, tmp_path)


def test_no_page_names_the_wheel_of_one_version():
    pages = [README, *(ROOT / "docs").rglob("*.md")]
    assert not [p for p in pages if re.search(r"qwix_train-\d", p.read_text())]


def check_start(names, printed, folder):
    assert re.search(r"Dense_0 +dot_general0 .*int4 channel 1 tile 0:16", printed)
    assert re.search(r"Dense_1 +dot_general0 .*float", printed)
    page = (ROOT / "docs" / "start.md").read_text()
    message, found, _ = printed.partition("QuantizationRule(weight_qtype='int44'): ")
    assert found and message[message.index("No rule quantizes") :].strip() in page
    assert names["quantized"]["Dense_0"]["kernel"].array.qvalue.dtype == jnp.int4
    assert (folder / "model_int4").is_dir()


def check_qat(names, printed, folder):
    np.testing.assert_allclose(names["logits"].shape, names["qat_logits"].shape)
    assert np.isfinite(names["nnx_loss"])


def check_ptq(names, printed, folder):
    # The quantized model computes what the training step saw.
    expected = names["qat_logits"]
    np.testing.assert_allclose(names["logits"], expected, rtol=0, atol=1e-5)
    assert (folder / "export").is_dir()


def check_calibration(names, printed, folder):
    scale = names["static_params"]["Dense_1"]["dot_general0_lhs_scale"].array
    # The images are ones, which the best range makes as good as exact.
    scale = float(scale[0, 0])
    assert abs(round(1 / scale) * scale - 1) < 0.002
    assert all(rule.act_static_scale for rule in names["best"])


def check_litert(names, printed, folder):
    # The phone's model is of integers, and computes what the fake-quantized one does.
    assert names["litert"].is_full_integer
    assert (folder / "model.tflite").stat().st_size < 10_000
    (report,) = names["litert"].report(names["images"])
    assert report.max_steps <= 1 and report.equal >= 0.9
    assert names["litert_logits"].shape == (32, 10)
    assert "FULLY_CONNECTED  int8[32x64] int8[64x64] per channel" in printed


def check_recipes(names, printed, folder):
    # Scales that are trained, params on a grid, bits within a size.
    learned = names["learned"].params["Dense_1"]
    assert learned["kernel_scale"].shape == (1, 64)
    assert set(learned) > {"kernel", "bias", "dot_general0_lhs_scale"}
    on_grid = names["on_grid"]["Dense_1"]
    codes = np.asarray(on_grid["kernel"], np.float64) / on_grid["kernel_scale"]
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
    assert np.abs(codes).max() <= 8
    bits = {rule.module_path: rule.weight_qtype for rule in names["mixed"]}
    assert set(bits.values()) <= {"int2", "int4"}


def check_scale(names, printed, folder):
    assert printed in (ROOT / "docs" / "scale.md").read_text()


CHECKS = {
    "scale": check_scale,
    "start": check_start,
    "qat": check_qat,
    "ptq": check_ptq,
    "calibration": check_calibration,
    "litert": check_litert,
    "recipes": check_recipes,
}


def test_the_wrapped_step_compiles_as_often_as_the_plain_one(ten_lines):
    names = dict(ten_lines)
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
