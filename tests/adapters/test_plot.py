import dataclasses

import pytest

from pacatune.adapters.inspect import inspect_adapter
from pacatune.reports.columns import plot_columns

matplotlib = pytest.importorskip("matplotlib")


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


def large_report(adapter_dir, names):
    report = inspect_adapter(adapter_dir)
    (module, *_) = report.modules
    modules = [
        dataclasses.replace(module, name=name, columns=list(range(number % 5, 4096, 511)))
        for number, name in enumerate(names)
    ]
    return dataclasses.replace(report, modules=modules)


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA = [f"model.layers.{layer}.{kind}" for layer in range(80) for kind in LAYERS]
CNN = [f"blocks.{block}.conv_{kind}" for kind in range(40) for block in range(8)]


@pytest.mark.parametrize("names", [LLAMA, CNN], ids=["seven kinds", "forty kinds"])
def test_the_picture_fits_a_screen(names, adapter_dir, tmp_path):
    """560 modules once made a picture of 12,000 pixels."""
    path = tmp_path / "columns.png"
    plot_columns(large_report(adapter_dir, names), path)
    data = path.read_bytes()
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert width <= 1920
    assert height <= 1080


def test_a_panel_for_each_kind(adapter_dir, tmp_path):
    path = tmp_path / "columns.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_columns(large_report(adapter_dir, LLAMA), path)
    text = path.read_text()
    assert text.count("EventCollection") == len(LLAMA)
    for kind in LAYERS:
        assert text.count(f">{kind}</text>") == 1
    assert text.count(">column</text>") == len(LAYERS)  # the eighth place of the grid stays empty
    assert text.count('id="axes_') == len(LAYERS)
