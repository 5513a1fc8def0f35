"""Fits, the spread, and the largest size."""

import pytest

from pacatune.measure.estimate import estimate_memory, find_max
from pacatune.measure.setting import Setting
from pacatune.measure.simulate import Estimate
from tests.measure.real_step import tiny

GIB = 2**30


def estimate_of(**by_category):
    setting, peak = Setting(model="llama3-8b"), sum(by_category.values())
    return Estimate(setting, peak, by_category, "backward", {"loss": 1})


def test_the_spread_is_context_and_gaps_and_what_fits_surely_fits_all_of_it():
    estimate = estimate_of(weights=10 * GIB, activations=20 * GIB)
    assert estimate.peak_bytes == 30 * GIB
    assert estimate.low_bytes == 30 * GIB + int(0.4 * GIB)
    assert estimate.high_bytes == 34 * GIB + int(0.7 * GIB)
    assert estimate.fits(35 * GIB) == "yes"
    assert estimate.fits(34 * GIB) == "perhaps"
    assert estimate.fits(30 * GIB) == "no"


def test_the_spread_holds_what_the_paper_measured():
    """Table 1: 20 GB of LLaMA2-7B with PaCA, whose simulated parts these are."""
    estimate = estimate_of(weights=int(13.56e9), activations=int(4.74e9))
    assert round(estimate.low_bytes / 1e9) < 20 == round(estimate.high_bytes / 1e9)


def test_estimate_is_the_same_every_time_and_notes_a_length_beyond_the_models(tmp_path):
    setting = tiny(tmp_path)
    first, second = estimate_memory(setting), estimate_memory(setting)
    assert first == second
    assert sum(first.by_category.values()) == first.peak_bytes
    assert first.notes == []
    notes = estimate_memory(tiny(tmp_path, seq_len=65)).notes
    assert notes == ["the model was made for 64 tokens, not 65."]


@pytest.mark.parametrize("quantity", ["seq_len", "batch_size", "rank"])
def test_largest_fits_and_the_next_does_not(quantity, tmp_path):
    setting = tiny(tmp_path)
    available = estimate_memory(setting.but(**{quantity: 37})).high_bytes + 10
    number, estimate = find_max(setting, quantity, available)
    assert number == 37
    assert estimate.setting == setting.but(**{quantity: 37})
    assert estimate.fits(available) == "yes"
    over = estimate_memory(setting.but(**{quantity: 38}))
    assert over.high_bytes > available


def test_nothing_fits_everything_fits_or_there_is_no_such_quantity(tmp_path):
    assert find_max(tiny(tmp_path), "batch_size", 1000) == (0, None)
    assert find_max(tiny(tmp_path), "rank", 100 * GIB)[0] == 64
    with pytest.raises(ValueError, match=r"`quantity` \('layers'\) must be one of seq_len, batch"):
        find_max(tiny(tmp_path), "layers", GIB)
    with pytest.raises(ValueError, match=r"`method` \('full'\) has no rank"):
        find_max(tiny(tmp_path, method="full"), "rank", GIB)
