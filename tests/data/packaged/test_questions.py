"""The packaged questions: what is kept, and that nothing held out is trained on."""

import json
import re

import pytest

from pacatune.data.packaged import questions


def read(path):
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert all([m["role"] for m in chat] == ["user", "assistant"] for chat in chats)
    return [(chat[0]["content"], chat[1]["content"]) for chat in chats]


def normalise(text):
    return re.sub(r"[^\w\s]", "", text.casefold()).split()


@pytest.fixture
def corpus():
    pytest.importorskip("chatterbot_corpus")


def test_real_corpus_splits_without_overlap(tmp_path, corpus):
    train, heldout = map(read, questions.prepare_questions(tmp_path))
    assert len(train) > 500
    assert len(heldout) >= questions.NUM_HELDOUT
    for side in (0, 1):
        seen = {tuple(normalise(pair[side])) for pair in train}
        assert not any(tuple(normalise(pair[side])) in seen for pair in heldout)
    everything = train + heldout
    assert len({tuple(normalise(question)) for question, _ in everything}) == len(everything)
    assert max(len(answer) for _, answer in everything) <= questions.MAX_ANSWER_CHARS


def test_seed_decides_the_split_and_the_second_call_reads(tmp_path, corpus):
    first = questions.prepare_questions(tmp_path, seed=0)
    before = [path.stat().st_mtime_ns for path in first]
    assert questions.prepare_questions(tmp_path, seed=0) == first
    assert [path.stat().st_mtime_ns for path in first] == before
    again = questions.prepare_questions(tmp_path / "again", seed=0)
    other = questions.prepare_questions(tmp_path, seed=1)
    assert again[1].read_bytes() == first[1].read_bytes() != other[1].read_bytes()


def test_half_a_folder_is_nobodys_to_delete(tmp_path, corpus):
    train, heldout = questions.prepare_questions(tmp_path)
    heldout.unlink()
    with pytest.raises(FileExistsError, match="is not empty; choose another or empty it first"):
        questions.prepare_questions(tmp_path)
    assert train.is_file()


def test_first_answer_of_a_question_is_kept():
    pairs = [("Hello", "Hi"), ("hello!", "Greetings"), ("Who?", ""), ("Why?", "x" * 201)]
    assert list(questions.unique_pairs(iter(pairs))) == [("Hello", "Hi")]


def test_questions_with_one_answer_stay_together():
    pairs = [(f"q{i}", "same" if i % 2 else f"a{i}") for i in range(20)]
    train, heldout = questions.split_pairs(pairs, seed=0, num_heldout=5)
    assert {a for _, a in train}.isdisjoint(a for _, a in heldout)
    assert len(train) + len(heldout) == 20


def test_too_few_pairs_are_refused():
    with pytest.raises(ValueError, match="2 pairs cannot give 5 held-out ones"):
        questions.split_pairs([("a", "b"), ("c", "d")], seed=0, num_heldout=5)


def test_missing_corpus_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(questions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`chatterbot-corpus` is not .*\[demo\]"):
        questions.prepare_questions(tmp_path)
