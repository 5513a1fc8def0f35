import pytest

from pacatune.experiments.study.tuning import best_of, is_at_edge, rate_beyond, tune

LOSSES = {1e-3: 3.0, 3e-3: 1.0, 9e-3: 2.0}


def test_the_best_rate_by_either_sign():
    assert best_of(LOSSES) == 3e-3
    assert best_of(LOSSES, higher_is_better=True) == 1e-3
    assert best_of({1e-3: None, 3e-3: 5.0}) == 3e-3
    assert best_of({1e-3: None}) is None


def test_edges_and_what_lies_beyond():
    assert [is_at_edge(rate, LOSSES) for rate in LOSSES] == [True, False, True]
    assert not is_at_edge(1e-3, [1e-3])
    assert not is_at_edge(None, LOSSES)
    assert rate_beyond(9e-3, LOSSES) == 2.7e-2
    assert rate_beyond(1e-3, LOSSES) == 3.33e-4
    assert rate_beyond(3e-3, LOSSES) is None
    assert rate_beyond(None, LOSSES) is None


def test_each_rate_once_and_every_seed_at_the_best():
    seen = []

    def train(rate, seed):
        seen.append((rate, seed))
        return rate, seed

    tuned = tune(list(LOSSES), (5, 6), train, lambda run: LOSSES[run[0]])
    assert seen == [(1e-3, 5), (3e-3, 5), (9e-3, 5), (3e-3, 6)]
    assert (tuned.rate, tuned.curve) == (3e-3, LOSSES)
    assert tuned.runs == {5: (3e-3, 5), 6: (3e-3, 6)}


def test_a_grid_without_rates():
    with pytest.raises(ValueError, match="`rates` is empty; give at least one"):
        tune([], (0,), lambda rate, seed: None, lambda run: 0.0)
