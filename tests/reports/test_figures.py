import sys

from pacatune.reports import figures


def test_figures_are_saved_without_pyplot(tmp_path):
    before = sys.modules.get("matplotlib.pyplot")
    path = tmp_path / "new" / "a.png"
    figure = figures.new_figure(3, 2)
    figure.add_subplot().plot([0, 1], [1, 0], label="a line")
    figures.save_figure(figure, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (360, 240)
    assert sys.modules.get("matplotlib.pyplot") is before
