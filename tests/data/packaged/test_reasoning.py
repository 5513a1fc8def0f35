"""Packaged problems: each has one answer that reasoning-gym accepts; none is in both files."""

import json

import pytest

from pacatune.data import PromptDataConfig
from pacatune.data.packaged import prepare_reasoning
from pacatune.data.packaged.reasoning import PROBLEMS, Problems
from pacatune.data.prompts import reasoning_gym_data


@pytest.fixture(autouse=True)
def _reasoning_gym():
    pytest.importorskip("reasoning_gym")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name, tmp_path):
    train, test = map(read, prepare_reasoning(tmp_path, name, num_train=60, num_test=20))
    assert (len(train), len(test)) == (60, 20)
    prompts = [row["prompt"] for row in train + test]
    assert len(set(prompts)) == 80
    assert all(row["completion"].startswith(" ") for row in train + test)


@pytest.mark.parametrize("name", PROBLEMS)
def test_answers_are_those_that_reasoning_gym_accepts(name):
    problems = PROBLEMS[name]
    path = f"reasoning-gym:{problems.generator}"
    made = reasoning_gym_data(PromptDataConfig(path=path, size=20, options=problems.options))
    for i, row in enumerate(problems.rows(made)):
        assert made.score_answer(row["completion"].strip(), entry=made[i]) == 1.0
        assert not row["prompt"].endswith(" ")  # or the answer's first token would be another


def test_the_second_call_reads_and_other_problems_are_elsewhere(tmp_path):
    first = prepare_reasoning(tmp_path, "reverse-words", num_train=30, num_test=10)
    before = [path.stat().st_mtime_ns for path in first]
    assert prepare_reasoning(tmp_path, "reverse_words", num_train=30, num_test=10) == first
    assert [path.stat().st_mtime_ns for path in first] == before
    other = prepare_reasoning(tmp_path, "reverse-words", num_train=30, num_test=10, seed=1)
    assert other[0].parent != first[0].parent
    assert other[1].read_bytes() != first[1].read_bytes()


def test_refuses(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`name` \('reverse-word'\) must be one of .*did you"):
        prepare_reasoning(tmp_path, "reverse-word")
    few = Problems(
        generator="chain_sum",
        options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        prompt="{expression} =",
    )
    monkeypatch.setitem(PROBLEMS, "few", few)
    with pytest.raises(ValueError, match=r"'few' has \d+ different problems, fewer than `num_tr"):
        prepare_reasoning(tmp_path, "few", num_train=1000, num_test=1)
    assert not list(tmp_path.iterdir())
