"""Means, spreads and the exact test, against closed forms and scipy; rates of a grid."""

import numpy as np
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


@pytest.mark.parametrize("number", [1, 2, 5])
def test_all_differences_of_one_sign_give_the_smallest_value(number):
    differences = [0.1 * (i + 1) for i in range(number)]
    assert sign_flip_p_value(differences) == 2 / 2**number
    assert sign_flip_p_value([-d for d in differences]) == 2 / 2**number


def test_no_difference():
    assert sign_flip_p_value([0.0, 0.0, 0.0]) == 1.0
    assert sign_flip_p_value([1.0, -1.0]) == 1.0


def test_equal_differences_follow_the_binomial():
    """Four of five differences alike: 2 * (C(5,0) + C(5,1)) / 2^5, with rounding or without."""
    assert sign_flip_p_value([0.1, 0.1, 0.1, 0.1, -0.1]) == 12 / 32
    assert sign_flip_p_value([0.3, 0.1 + 0.2, 0.3, 0.3, -0.3]) == 12 / 32


def test_is_the_test_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for number in (3, 6, 9):
        differences = rng.normal(0.5, 1, number)
        expected = stats.permutation_test(
            (differences,),
            np.mean,
            permutation_type="samples",
            n_resamples=np.inf,
            alternative="two-sided",
        ).pvalue
        assert sign_flip_p_value(list(differences)) == pytest.approx(expected)


def test_comparison_is_paired_by_seed():
    found = compare({0: 1.0, 1: 2.5, 7: 9.0}, {0: 0.5, 1: 1.5, 2: 0.0})
    assert found.num_seeds == 2
    assert found.mean == 0.75
    assert found.std == pytest.approx(0.5 / 2**0.5)
    assert found.p_value == found.smallest_p_value == 0.5
    assert compare({0: 1.0}, {1: 1.0}) is None


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
