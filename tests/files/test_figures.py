"""Figures are replaced as a whole, and only by figures."""

import pytest

from qwix_train.files.figures import save_figure


@pytest.fixture(scope="module")
def figure():
    return pytest.importorskip("matplotlib.figure").Figure(figsize=(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_a_figure_replaces_one_of_its_format(figure, tmp_path, ending):
    path = tmp_path / f"plot.{ending}"
    save_figure(figure, path)
    with pytest.raises(FileExistsError, match="exists"):
        save_figure(figure, path)
    save_figure(figure, path, overwrite=True)
    path.write_text("notes")
    with pytest.raises(FileExistsError, match="is not a figure of this format"):
        save_figure(figure, path, overwrite=True)
    assert path.read_text() == "notes"


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(figure, tmp_path):
    (tmp_path / "plot.xyz").write_bytes(b"old")
    with pytest.raises(ValueError, match="'xyz' is not supported"):
        save_figure(figure, tmp_path / "plot.xyz", overwrite=True)
    assert (tmp_path / "plot.xyz").read_bytes() == b"old"
