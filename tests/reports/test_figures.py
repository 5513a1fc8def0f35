import sys
from pathlib import Path

import pytest

from pacatune.reports.figures import (
    check_picture_path,
    new_figure,
    plain_text,
    save_figure,
)


def draw():
    figure = new_figure(3, 2)
    figure.add_subplot().plot([0, 1], [1, 0], label="a line")
    return figure


def test_figures_are_saved_without_pyplot(tmp_path):
    before = sys.modules.get("matplotlib.pyplot")
    path = tmp_path / "new" / "a.png"
    save_figure(draw(), path, dpi=100)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (300, 200)
    assert sys.modules.get("matplotlib.pyplot") is before


@pytest.mark.parametrize("name", ["a.png", "a.SVG", "a.pdf"])
def test_pictures(name):
    check_picture_path(Path(name))


def test_what_is_no_picture():
    with pytest.raises(ValueError, match=r"a.txt must end in one of .png, .svg, .pdf"):
        check_picture_path(Path("a.txt"))


def test_dollars_are_no_mathematics():
    assert plain_text("$5 or $6") == r"\$5 or \$6"
