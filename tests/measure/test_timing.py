"""How contenders take turns and what is made of the times."""

import gc
from itertools import pairwise

import pytest
import torch

from pacatune.measure.timing import alternate, compare, order_of_round, summarize


@pytest.mark.parametrize("num", [2, 3, 7, 8])
def test_everybody_follows_everybody_equally_often(num):
    followed = torch.zeros(num, num, dtype=torch.int64)
    first = torch.zeros(num, dtype=torch.int64)
    for round_ in range(2 * num):
        order = order_of_round(num, round_)
        assert sorted(order) == list(range(num))
        first[order[0]] += 1
        for before, after in pairwise(order):
            followed[before, after] += 1
    assert first.tolist() == [2] * num
    assert followed.tolist() == [[0 if i == j else 2 for j in range(num)] for i in range(num)]


def test_contenders_take_turns_without_the_collector():
    calls = []

    def run(name):
        assert not gc.isenabled()
        calls.append(name)
        return len(calls)

    runs = {"a": lambda: run("a"), "b": lambda: run("b")}
    measured = alternate(runs, seconds=0, min_rounds=3, num_warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a", "b", "a"]
    assert measured == {"a": [3, 6, 8], "b": [4, 5, 7]}
    assert gc.isenabled()


def test_summary_has_median_quartiles_and_minimum():
    summary = summarize([4.0, 1.0, 2.0, 3.0, 5.0], "step_ms")
    assert summary == {
        "step_ms": 3.0,
        "step_ms_quartile_1": 2.0,
        "step_ms_quartile_3": 4.0,
        "step_ms_min": 1.0,
    }
    assert summarize([7.0], "step_ms")["step_ms_quartile_3"] == 7.0


def test_interval_of_a_ratio_draws_whole_rounds():
    reference = [1.0, 10.0, 2.0, 30.0, 3.0]  # noise that hits both alike
    ratio = compare([0.5 * seconds for seconds in reference], reference, seed=0)
    assert ratio == pytest.approx({"ratio": 0.5, "low": 0.5, "high": 0.5, "ratio_of_minima": 0.5})
    noisy = compare([1.0, 2.0, 3.0, 4.0, 9.0], [2.0, 2.0, 2.0, 2.0, 2.0], seed=0)
    assert noisy["low"] < noisy["ratio"] == 1.5 < noisy["high"]
    assert noisy == compare([1.0, 2.0, 3.0, 4.0, 9.0], [2.0, 2.0, 2.0, 2.0, 2.0], seed=0)
