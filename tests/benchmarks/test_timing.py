"""How contenders take turns and what is made of the times."""

import gc
from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch

from benchmarks import timing
from benchmarks.methods import make_contender
from benchmarks.models import llama_values, make_batch
from benchmarks.timing import Step, Stopwatch, alternate, order_of_round, ratio_row, time_row

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


class Event:
    """A CUDA event: noted when recorded, reached by the device when it is waited for."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.time = next(stream)

    def synchronize(self):
        Event.reached = self.time

    def elapsed_time(self, end):
        assert Event.reached >= end.time
        return end.time - self.time


def test_a_stopwatch_waits_for_cuda_when_it_is_read(monkeypatch):
    times = iter([100, 350, 400])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where: times)
    watch = Stopwatch(torch.device("cuda", 0))
    for _ in range(3):
        watch.mark()
    assert watch.seconds() == pytest.approx((0.25, 0.05))


def test_a_step_waits_for_the_device_at_its_end_alone(monkeypatch):
    events = []

    class Watch:
        """A clock that tells what the device would be waited for."""

        def __init__(self, device):
            self.num_marks = 0

        def mark(self):
            events.append("mark")
            self.num_marks += 1

        def seconds(self):
            events.append("wait")
            return tuple(float(number) for number in range(1, self.num_marks))

    monkeypatch.setattr(timing, "Stopwatch", Watch)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *args: pytest.fail("waited"))
    values = llama_values(32, 2, num_heads=2, vocab_size=64)
    contender = make_contender("paca", values, torch.float32, rank=4)
    step = Step(contender=contender, batch=make_batch(2, 6, 64, seed=0))
    assert step() == (1.0, 2.0, 3.0)
    assert events == ["mark"] * 4 + ["wait"]
    # Forward and backward of two micro-batches take turns.
    assert replace(step, accumulation=2)() == (1.0 + 3.0, 2.0 + 4.0, 5.0)
    assert step.seconds() == 6.0
