"""How contenders take turns and what is made of the times."""

import gc
import time
from collections import Counter
from itertools import pairwise, permutations

import pytest
import torch

from benchmarks.methods import make_contender
from benchmarks.models import llama_values, make_batch
from benchmarks.timing import Step, alternate, order_of_round, ratio_row, time_row

NAMES = {"what": "step", "method": "paca"}


@pytest.mark.parametrize("num", [2, 3, 8])
def test_everybody_follows_everybody_equally_often(num):
    orders = [order_of_round(num, round_) for round_ in range(2 * num)]
    assert all(sorted(order) == list(range(num)) for order in orders)
    assert Counter(order[0] for order in orders) == dict.fromkeys(range(num), 2)
    followed = Counter(pair for order in orders for pair in pairwise(order))
    assert followed == dict.fromkeys(permutations(range(num), 2), 2)


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


def test_rows_have_a_median_and_quartiles_or_an_interval_that_draws_whole_rounds():
    row = time_row([4.0, 1.0, 2.0, 3.0, 5.0], **NAMES)
    assert (row.value, row.low, row.high, row.unit, row.n) == (3000.0, 2000.0, 4000.0, "ms", 5)
    assert time_row([7.0], **NAMES).high == 7000.0
    reference = [1.0, 10.0, 2.0, 30.0, 3.0]  # noise that hits both alike
    half = ratio_row([0.5 * seconds for seconds in reference], reference, seed=0, **NAMES)
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (half.unit, half.n) == ("ratio", 5)
    both = [1.0, 2.0, 3.0, 4.0, 9.0], [2.0, 2.0, 2.0, 2.0, 2.0]
    noisy = ratio_row(*both, seed=0, **NAMES)
    assert noisy.low < noisy.value == 1.5 < noisy.high
    assert noisy == ratio_row(*both, seed=0, **NAMES)


def test_phases_of_a_step_are_timed_and_the_step_is_made():
    values = llama_values(32, 2, num_heads=2, vocab_size=64)
    contender = make_contender("paca", values, torch.float32, rank=4)
    trained = [p for p in contender.model.parameters() if p.requires_grad]
    before = [parameter.clone() for parameter in trained]
    step = Step(contender=contender, batch=make_batch(2, 6, 64, seed=0), accumulation=3)
    start = time.perf_counter()
    phases = step()
    elapsed = time.perf_counter() - start
    assert len(phases) == 3
    assert min(phases) > 0
    assert sum(phases) <= elapsed
    assert not any(torch.equal(a, b) for a, b in zip(trained, before, strict=True))
    assert step.kept_bytes() > 0
    assert step.seconds() > 0
