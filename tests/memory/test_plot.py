from pathlib import Path

import pytest

from pacatune.memory.estimate import estimate_memory
from pacatune.memory.plot import check_plot_path, save_plot
from tests.memory.real_step import tiny


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_writes_a_picture(suffix, tmp_path):
    path = tmp_path / f"bars{suffix}"
    estimates = {name: estimate_memory(tiny(tmp_path, method=name)) for name in ("paca", "full")}
    save_plot(estimates, path, available_bytes=2**30)
    assert path.stat().st_size > 1000
    if suffix == ".svg":
        text = path.read_text()
        assert "optimizer" in text
        assert "gathered" not in text
    else:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_file_that_is_no_picture():
    with pytest.raises(ValueError, match=r"plot out.txt: the file must end in one of .png"):
        check_plot_path(Path("out.txt"))


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; make it"):
        check_plot_path(tmp_path / "none" / "out.png")
