"""What long work says of how far it is."""

import io
import sys

import jax
import pytest
from flax import linen as nn

from qwix_train import (
    Progress,
    QuantizationRule,
    as_model,
    progress,
    ptq,
    qat,
    quantize_model,
)
from qwix_train.files import progress as progress_file
from qwix_train.ptq import hugging_face
from qwix_train.ptq.hugging_face import Place
from tests import models

RULES = [QuantizationRule(weight_qtype="int8")]
PARAMS = {"a": {"w": models.normal(4, 3)}, "b": {"w": models.normal(3, 2)}}
X = models.normal(2, 4)


def forward(params, x):
    return x @ params["a"]["w"] @ params["b"]["w"]


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


def work():
    ptq.quantize(forward, PARAMS, RULES, X)


def counts(found):
    return [(p.what, p.done, p.total, p.item) for p in found]


def test_a_function_is_told_of_each_item():
    found = []
    with progress(found.append):
        work()
    assert counts(found) == [
        ("quantizing params", 1, 2, "a/w"),
        ("quantizing params", 2, 2, "b/w"),
    ]
    assert 0 <= found[0].seconds <= found[1].seconds
    work()
    assert len(found) == 2  # The context has ended.


@pytest.mark.parametrize(
    "asked, is_terminal, begins",
    [
        (None, False, ""),
        (False, True, ""),
        (None, True, "\r\x1b[Kquantizing params: 1/2 in 0 s a/w\r"),
        (True, False, "quantizing params: 1/2 in 0 s a/w\n"),
    ],
)
def test_who_sees_it(monkeypatch, asked, is_terminal, begins):
    monkeypatch.setattr(sys, "stderr", Stream(is_terminal))
    monkeypatch.setattr(progress_file, "_SECONDS_BEFORE_THE_FIRST", 0)
    if asked is None:
        work()
    else:
        with progress(asked):
            work()
    text = sys.stderr.getvalue()
    assert text.startswith(begins) and bool(text) == bool(begins)
    if text:
        last = text.replace("\r\x1b[K", "\n").rstrip("\n").rpartition("\n")[2]
        assert last == "quantizing params: 2/2 in 0 s"


def test_work_that_is_soon_done_says_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(True))
    list(progress_file.tracked("counting", range(1000)))
    assert sys.stderr.getvalue() == ""


def test_one_process_of_several_says_it(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    found = []
    with progress(found.append):
        list(progress_file.tracked("counting", range(3)))
    assert found == []


def test_an_error_passes_through(monkeypatch):
    found = []
    with pytest.raises(ZeroDivisionError), progress(found.append):
        for x in progress_file.tracked("dividing", [1, 0]):
            1 / x
    assert [p.done for p in found] == [1]


def test_a_loop_that_is_left_ends_the_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(True))
    monkeypatch.setattr(progress_file, "_SECONDS_BEFORE_THE_FIRST", 0)
    monkeypatch.setenv("COLUMNS", "20")
    for x in progress_file.tracked("counting", range(3)):
        if x:
            break
    assert sys.stderr.getvalue() == "\r\x1b[Kcounting: 1/3 in 0 \n"


def test_without_stderr_or_backends(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(jax, "process_index", lambda: pytest.fail("JAX was asked"))
    assert list(progress_file.tracked("counting", range(3))) == [0, 1, 2]
    with progress():  # Nothing is shown so soon.
        assert list(progress_file.tracked("counting", range(3))) == [0, 1, 2]


def test_reading_and_writing_files(tmp_path):
    mapping = {"a": Place("a/w"), "b": Place("b/w")}
    hugging_face.save(tmp_path / "float", PARAMS, mapping)
    tree = {"a": {"kernel": ptq.quantize(forward, PARAMS, RULES, X)[1]["a"]["w"]}}
    found = []
    with progress(found.append):
        hugging_face.load(tmp_path / "float", mapping, PARAMS)
        ptq.save_compressed_tensors(tmp_path / "int8", tree)
        ptq.load_compressed_tensors(tmp_path / "int8")
    assert counts(found) == [
        ("reading params", 1, 2, "a/w"),
        ("reading params", 2, 2, "b/w"),
        ("encoding params", 1, 1, "a/kernel"),
        ("reading layers", 1, 1, "a"),
    ]


@pytest.mark.slow
def test_passes_over_data():
    model = nn.Sequential([nn.Dense(4), nn.Dense(3), nn.Dense(2)])
    variables = models.params_of(model, X)
    method = ptq.Gptq(RULES)
    step = method.wrap(jax.jit(model.apply))
    quantized = quantize_model(model, method.provider)
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), X)["params"]
    found: list[Progress] = []
    with progress(found.append):
        ptq.quantize_in_sequence(
            method,
            lambda params: step({"params": params}, X),
            variables,
            abstract,
            block=r"layers_\d+",
        )
    blocks = [p for p in found if p.what == "quantizing blocks"]
    assert counts(blocks) == [
        ("quantizing blocks", 1 + i, 3, f"layers_{i}") for i in range(3)
    ]
    found.clear()

    def loss(params, x):
        return (as_model(forward)(params, x) ** 2).mean()

    with progress(found.append):
        qat.sensitivity(loss, PARAMS, RULES, [X], qtypes=["int8", "int4"])
    whats = [p.what for p in found]
    # Each of two layers in two types, in one batch.
    assert whats == ["sensitivity of layers"] * 4 + ["sensitivity of batches"]
