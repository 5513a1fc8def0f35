import pytest

from pacatune.measure.estimate import Estimate, estimate_memory
from pacatune.measure.pictures import _title_and_names, save_plot
from pacatune.measure.simulate import Measured
from tests.measure.real_step import tiny

MEASURED = Measured(10, {"weights": 10}, "forward", {})


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_writes_a_picture(suffix, tmp_path):
    path = tmp_path / f"bars{suffix}"
    estimates = {name: estimate_memory(tiny(tmp_path, method=name)) for name in ("paca", "full")}
    save_plot(estimates, path, available_bytes=2**30, device="h100")
    assert path.stat().st_size > 1000
    if suffix == ".svg":
        text = path.read_text()
        assert "optimizer" in text
        assert "gathered" not in text
        peak = estimates["paca"].peak_bytes / 2**30
        for words in (
            "config.json: memory of a training step",
            "batch 2, tokens 32, rank 4",
            "h100:",
            "1.0 GiB",
            f"{peak:.2f}",
        ):
            assert words in text
    else:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_sizes_that_differ_are_named_below_their_bars(tmp_path):
    setting = tiny(tmp_path)
    estimates = {
        "paca": Estimate(setting, MEASURED),
        "lora": Estimate(setting.but(rank=7), MEASURED),
    }
    title, names = _title_and_names(estimates)
    assert title == "config.json: memory of a training step\nbatch 2, tokens 32"
    assert names == ["paca\nrank 4", "lora\nrank 7"]
