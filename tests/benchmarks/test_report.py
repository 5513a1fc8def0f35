"""What benchmarks make of measured times."""

from benchmarks.report import make_ratios


def test_target_is_judged_by_the_ratio_of_medians():
    times = {"paca": [1.0, 1.0], "lora": [2.0, 2.0], "full": [4.0, 4.0]}
    lora, full = make_ratios({"setting": "s"}, times, {"lora": 0.49}, seed=0)
    assert (lora["target"], lora["is_reached"]) == (0.49, False)
    assert (full["target"], full["is_reached"]) == (None, None)
    assert make_ratios({}, {"lora": [1.0]}, {}, seed=0) == []
