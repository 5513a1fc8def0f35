"""The picture of an adapter's columns: a panel for each kind, never larger than a screen."""

import dataclasses

import pytest

from pacatune.adapters.inspect import inspect_adapter
from pacatune.reports.columns import plot_columns
from tests.adapters.fixtures import adapter_dir

__all__ = ["adapter_dir"]

matplotlib = pytest.importorskip("matplotlib")

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA = [f"model.layers.{layer}.{kind}" for layer in range(80) for kind in LAYERS]
CNN = [f"blocks.{block}.conv_{kind}" for kind in range(40) for block in range(8)]


def report_of(folder, names):
    report = inspect_adapter(folder)
    modules = [
        dataclasses.replace(report.modules[0], name=name, columns=[*range(number % 5, 4096, 511)])
        for number, name in enumerate(names)
    ]
    return dataclasses.replace(report, modules=modules)


def test_what_cannot_be_drawn(adapter_dir, tmp_path):
    with pytest.raises(ValueError, match=r"columns.txt must end in one of .png, .svg, .pdf"):
        plot_columns(inspect_adapter(adapter_dir), tmp_path / "columns.txt")
    with pytest.raises(ValueError, match="there are no columns to draw: only PaCA adapters"):
        plot_columns(report_of(adapter_dir, []), tmp_path / "columns.png")


@pytest.mark.parametrize("names", [LLAMA, CNN], ids=["seven kinds", "forty kinds"])
def test_the_picture_fits_a_screen(names, adapter_dir, tmp_path):
    """560 modules once made a picture of 12,000 pixels."""
    path = tmp_path / "plots" / "columns.png"
    plot_columns(report_of(adapter_dir, names), path)
    data = path.read_bytes()
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert width <= 1920
    assert height <= 1080


def test_a_panel_for_each_kind_and_marks_for_each_module(adapter_dir, tmp_path):
    names = LLAMA[: 2 * len(LAYERS)]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_columns(report_of(adapter_dir, names), tmp_path / "columns.svg")
    text = (tmp_path / "columns.svg").read_text()
    assert text.count("EventCollection") == len(names)
    for kind in LAYERS:
        assert text.count(f">{kind}</text>") == 1
    assert text.count(">column</text>") == len(LAYERS)  # the eighth place of the grid stays empty
    assert text.count('id="axes_') == len(LAYERS)
