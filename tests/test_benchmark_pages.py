"""The pages of benchmarks are made of the results that are committed."""

import json

from benchmarks import pages

TABLE = "| type | PTQ | qwix |\n| ---- | --: | ---: |\n| int8 | 1.5 ms | 1,234 us |"
REPORT = {
    "machine": {"date": "2020-01-02", "load at the start": "3.0"},
    "options": {"quick": True},
    "tables": {"encode": TABLE},
}


def test_no_page_is_old(capsys):
    assert pages.main(["--check"]) == 0, capsys.readouterr().out


def test_a_page_says_where_its_numbers_come_from():
    text = pages.page("formats", REPORT)
    assert "date: 2020-01-02; load at the start: 3.0" in text
    assert "--quick" in text and TABLE in text
    assert "formats_encode_dark.svg#only-dark" in text


def test_a_run_is_taken_and_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "PAGES", tmp_path)
    monkeypatch.setattr(pages, "RESULTS", tmp_path / "results")
    (tmp_path / "formats.json").write_text(json.dumps(REPORT))
    assert pages.main([str(tmp_path / "formats.json")]) == 0
    for scheme in pages.SCHEMES:
        text = (tmp_path / f"formats_encode_{scheme}.svg").read_text()
        assert "int8" in text
    assert pages.main(["--check"]) == 0
    (tmp_path / "formats.md").write_text("old")
    assert pages.main(["--check"]) == 1


def test_bars_have_the_numbers_of_the_table():
    picture = pages.Picture(("PTQ", "qwix", "lacking"), "time")
    (axes,) = pages.draw(TABLE, picture, "light").axes
    assert [bar.get_width() for bar in axes.patches] == [1.5, 1.234]


def test_a_row_may_be_named_by_several_columns():
    picture = pages.Picture(("qwix",), "time", rows="int8, .*", names=2)
    (axes,) = pages.draw(TABLE, picture, "dark").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["int8, 1.5 ms"]
