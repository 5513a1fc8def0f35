import pytest

from pacatune.adapters.inspect import inspect_adapter, plot_columns


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_mark_for_each_column(adapter_dir, tmp_path, suffix):
    report = inspect_adapter(adapter_dir)
    path = tmp_path / "plots" / f"columns{suffix}"
    plot_columns(report, path)
    start = {".png": b"\x89PNG", ".svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(start)
    if suffix == ".svg":  # text is drawn as shapes, marks are lines of a collection
        assert path.read_text().count("EventCollection") == len(report.modules) == 6


def test_what_cannot_be_drawn(adapter_dir, tmp_path):
    with pytest.raises(ValueError, match=r"columns.txt must end in one of .png, .svg, .pdf"):
        plot_columns(inspect_adapter(adapter_dir), tmp_path / "columns.txt")
    with pytest.raises(ValueError, match="there are no columns to draw: only PaCA adapters"):
        plot_columns(None, tmp_path / "columns.png")
