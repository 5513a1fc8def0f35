import pytest

from pacatune.evaluation.mt_bench.judging import parse_rating


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Fine. Rating: [[7]]", 7),
        ("[[7.5]]", 7.5),
        ("[[10]]", 10),
        ("[[8.]]", 8),
        ("first [[3]], then [[9]]", 3),
        ("[2] but [[6]]", 6),
        ("Rating: [4]", 4),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[[10.5]]", None),
        ("[[-3]]", None),
        ("[[rating]]", None),
        ("Rating: 5", None),
        ("", None),
        ("<think>[[3]], or rather [[4]]</think>\nRating: [[5]]", 5),
        ("\n<think>Could be [[3]]", None),
        ("It wrote <think>. [[6]]", 6),
        ("[[" + "9" * 400 + "]]", None),
    ],
)
def test_rating(text, rating):
    found = parse_rating(text)
    assert found == rating
    assert type(found) is type(rating)
