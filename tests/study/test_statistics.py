"""Means, spreads and the exact test, against closed forms and scipy; rates of a grid."""

import pytest

from pacatune.study.statistics import (
    best_of,
    compare,
    is_at_edge,
    mean_of,
    rate_beyond,
    sign_flip_p_value,
    std_of,
)


def test_means_and_spreads():
    assert mean_of([]) is None
    assert mean_of([1.0, 2.0, 6.0]) == 3.0
    assert std_of([1.0]) is None
    assert std_of([1.0, 2.0, 6.0]) == pytest.approx(7**0.5)


def test_the_exact_test_in_closed_forms():
    for number in (1, 2, 5):
        differences = [0.1 * (i + 1) for i in range(number)]
        assert sign_flip_p_value(differences) == 2 / 2**number
        assert sign_flip_p_value([-d for d in differences]) == 2 / 2**number
    assert sign_flip_p_value([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_p_value([1.0, -1.0]) == 1.0
    # Four of five differences alike: 2 * (C(5,0) + C(5,1)) / 2^5, with rounding or without.
    assert sign_flip_p_value([0.1, 0.1, 0.1, 0.1, -0.1]) == 12 / 32
    assert sign_flip_p_value([0.3, 0.1 + 0.2, 0.3, 0.3, -0.3]) == 12 / 32


def test_comparison_is_paired_by_seed():
    found = compare({0: 1.0, 1: 2.5, 7: 9.0}, {0: 0.5, 1: 1.5, 2: 0.0})
    assert (found.num_seeds, found.mean, found.std) == (2, 0.75, pytest.approx(0.5 / 2**0.5))
    assert found.p_value == found.smallest_p_value == 0.5
    assert compare({0: 1.0}, {1: 1.0}) is None


def test_the_best_rate_by_either_sign_edges_and_what_lies_beyond():
    losses = {1e-3: 3.0, 3e-3: 1.0, 9e-3: 2.0}
    assert best_of(losses) == 3e-3
    assert best_of(losses, higher_is_better=True) == 1e-3
    assert best_of({1e-3: None, 3e-3: 5.0}) == 3e-3
    assert best_of({1e-3: None}) is None
    assert [is_at_edge(rate, losses) for rate in (*losses, None)] == [True, False, True, False]
    assert not is_at_edge(1e-3, [1e-3])
    assert [rate_beyond(rate, losses) for rate in (*losses, None)] == [3.33e-4, None, 2.7e-2, None]
