"""JSON that anybody may have written, and reports."""

import os

import pytest

from qwix_train.files import json_text


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "Expecting value"),
        ("[1]", "no JSON object"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("[" * 200_000, "nested too deeply"),
        (b"\xff", "can't decode"),
    ],
)
def test_a_text_that_holds_no_object(text, message):
    with pytest.raises(ValueError, match=f"a.json.*{message}"):
        json_text.parse(text, "a.json")


def test_a_report_replaces_a_report(tmp_path):
    path = tmp_path / "report.json"
    json_text.write(path, {"loss": 1})
    with pytest.raises(FileExistsError, match="report.json exists"):
        json_text.write(path, {"loss": 2})
    json_text.write(path, {"loss": 2}, overwrite=True)
    assert path.read_text() == '{\n  "loss": 2\n}\n'
    with pytest.raises(TypeError, match=r"hold what is to be in .*report.json"):
        json_text.write(path, {"loss": {3}}, overwrite=True)
    assert json_text.read(path) == {"loss": 2}
    path.write_text("loss,2")
    with pytest.raises(FileExistsError, match="is not a file of JSON"):
        json_text.write(path, {"loss": 3}, overwrite=True)
    assert os.listdir(tmp_path) == ["report.json"]
