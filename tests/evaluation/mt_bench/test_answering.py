"""A tiny model answers."""

import json

import pytest
import torch

from pacatune.adapters.generation import Sampling, TextGenerator
from pacatune.evaluation.mt_bench.answering import (
    AnswerFile,
    answer_questions,
    check_template,
    read_answers,
    turn_seed,
)
from pacatune.evaluation.mt_bench.questions import Question
from tests.evaluation.mt_bench.conftest import answer_row, write_lines


@pytest.fixture(scope="module")
def generator(tiny_model_dir):
    return TextGenerator(str(tiny_model_dir))


@pytest.fixture
def asked(generator, monkeypatch):
    """Prompts and samplings of each call of `generate_batch`."""
    calls = []
    generate_batch = generator.generate_batch

    def record(prompts, samplings):
        calls.append((prompts, samplings))
        return generate_batch(prompts, samplings)

    monkeypatch.setattr(generator, "generate_batch", record)
    return calls


def answer(generator, questions, path, **options):
    file = AnswerFile(path, "tiny")
    settings = {"max_new_tokens": 8, "batch_size": 3, "seed": 0} | options
    answer_questions(generator, questions, file, **settings)
    return [json.loads(line) for line in path.read_text().splitlines()]


def turns_of(rows):
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}


def test_both_turns_are_conversations_at_the_temperature_of_the_category(
    generator, questions, asked, tmp_path
):
    rows = answer(generator, questions, tmp_path / "a.jsonl")
    assert [row["question_id"] for row in rows] == [one.id for one in questions]
    assert [len(prompts) for prompts, _ in asked] == [3, 3, 3, 3, 2, 2]
    by_id = {one.id: one for one in questions}
    temperatures = {"writing": 0.7, "math": 0, "coding": 0, "stem": 0.1}
    for row in rows:
        question = by_id[row["question_id"]]
        assert row["details"]["temperature"] == [temperatures[question.category]] * 2
        assert row["details"]["seed"] == [turn_seed(0, question, turn) for turn in (0, 1)]
        messages = []
        for turn, text in enumerate(row["choices"][0]["turns"]):
            messages.append({"role": "user", "content": question.turns[turn]})
            tokens = generator.encode_chat(messages)
            sampling = Sampling(
                max_new_tokens=8,
                temperature=temperatures[question.category],
                seed=row["details"]["seed"][turn],
            )
            (alone,) = generator.generate_batch([tokens], [sampling])
            assert text == alone.text.strip()
            assert row["details"]["num_prompt_tokens"][turn] == tokens.shape[1]
            messages.append({"role": "assistant", "content": text})


def test_seeds_differ_and_are_fixed():
    one, two = (Question(id=number, category="stem", turns=("a", "b")) for number in (81, 82))
    seeds = [turn_seed(seed, q, turn) for seed in (0, 1) for q in (one, two) for turn in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    # Noted here so that answers of one release can be made again with the next.
    assert turn_seed(0, one, 0) == 95914036


def test_an_interrupted_run_goes_on_where_it_was(generator, questions, asked, tmp_path):
    whole = answer(generator, questions, tmp_path / "whole.jsonl")
    asked.clear()
    calls = 0

    def interrupt(done, total):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt, match=r"interrupted; 3 of 8 answers are kept in .*again"):
        answer(generator, questions, path, on_done=interrupt)
    assert len(asked) == 2
    assert turns_of(answer(generator, questions, path)) == turns_of(whole)
    assert sum(len(prompts) for prompts, _ in asked) == 16
    assert len(asked) == 2 + 4
    answer(generator, questions, path)
    assert len(asked) == 6


def test_a_first_turn_is_not_made_again(generator, questions, asked, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    generate_batch = generator.generate_batch

    def die(prompts, samplings):
        if len(asked) == 3:
            raise RuntimeError("killed")
        return generate_batch(prompts, samplings)

    with monkeypatch.context() as patch:
        patch.setattr(generator, "generate_batch", die)
        with pytest.raises(RuntimeError, match="killed"):
            answer(generator, questions, path)
    assert len(path.read_text().splitlines()) == 9  # 3 whole, and the first turn of 3
    answer(generator, questions, path)
    assert sum(len(prompts) for prompts, _ in asked) == 16


def test_what_does_not_fit_is_cut_off_there_and_said(generator, tmp_path):
    long = [
        Question(id=1, category="math", turns=("a" * 230, "b")),  # 242 tokens with the template
        Question(id=2, category="writing", turns=("a" * 300, "b")),
        Question(id=3, category="math", turns=("a", "b")),
    ]
    rows = answer(generator, long, tmp_path / "a.jsonl", max_new_tokens=60)
    reasons = [row["details"]["finish_reason"] for row in rows]
    by_id = dict(zip((row["question_id"] for row in rows), reasons, strict=True))
    assert by_id[1][0] in ("context", "stop")
    assert by_id[1][1] == "no_room"
    assert by_id[2] == ["no_room", "no_room"]
    assert set(by_id[3]) <= {"length", "stop"}
    for row in rows:
        for turn, reason in enumerate(row["details"]["finish_reason"]):
            prompt, new = (
                row["details"][name][turn] for name in ("num_prompt_tokens", "num_tokens")
            )
            assert (row["choices"][0]["turns"][turn] == "") >= (reason == "no_room")
            assert reason == "no_room" or prompt + new <= 256
            assert reason != "context" or prompt + new == 256


def test_the_template_must_write_two_turns(tiny_model_dir):
    template = "{{ raise_exception('one turn only') if messages | length > 1 }}{{ messages }}"
    generator = TextGenerator(str(tiny_model_dir), chat_template=template)
    with pytest.raises(ValueError, match=r"two turns \(one turn only\); .* --chat-template FILE"):
        check_template(generator)


def test_the_global_random_state_stays(generator, questions, tmp_path):
    state = torch.get_rng_state()
    answer(generator, questions[:2], tmp_path / "a.jsonl")
    assert torch.equal(torch.get_rng_state(), state)


QUESTION = Question(id=81, category="writing", turns=("a", "b"))


@pytest.fixture
def file(tmp_path):
    return AnswerFile(tmp_path / "model_answer" / "m.jsonl", "m")


def test_answers_grow_turn_by_turn_and_end_in_the_form_of_fastchat(file):
    assert file.turns(QUESTION) == ()
    file.add(QUESTION, "one", {"seed": 1})
    again = AnswerFile(file.path, "m")
    assert again.turns(QUESTION) == ("one",)
    assert not again.is_complete(QUESTION)
    again.add(QUESTION, "two", {"seed": 2})
    assert again.is_complete(QUESTION)
    assert AnswerFile(file.path, "m").turns(QUESTION) == ("one", "two")
    again.tidy()
    (row,) = map(json.loads, file.path.read_text().splitlines())
    assert row.keys() >= {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert (row["question_id"], row["model_id"]) == (81, "m")
    assert row["choices"] == [{"index": 0, "turns": ["one", "two"]}]
    assert row["details"] == again.details(QUESTION) == {"seed": [1, 2]}


def test_an_answer_to_another_text_is_refused(file):
    file.add(QUESTION, "one", {})
    changed = Question(id=81, category="writing", turns=("a", "c"))
    with pytest.raises(ValueError, match=r"answers another question 81; .*--output DIR"):
        AnswerFile(file.path, "m").turns(changed)


def test_a_cut_line_costs_one_turn(file):
    file.add(QUESTION, "one", {})
    file.add(QUESTION, "two", {})
    file.path.write_bytes(file.path.read_bytes()[:-10])
    repaired = AnswerFile(file.path, "m")
    assert repaired.turns(QUESTION) == ("one",)


@pytest.mark.parametrize(
    "row",
    [{"choices": "x", "question_id": 1}, {"question_id": 1}, {"question_id": 1, "choices": [1]}],
)
def test_rows_of_another_form_are_refused(tmp_path, row):
    path = write_lines(tmp_path / "m.jsonl", [row])
    with pytest.raises(ValueError, match="answer 1: no answer in the form of FastChat"):
        AnswerFile(path, "m")


def test_a_row_without_question_is_refused(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", [answer_row(None, ["a"])])
    with pytest.raises(ValueError, match=r"answer 1: `question_id` \(None\) must be"):
        AnswerFile(path, "m")


def test_answers_of_others(tmp_path):
    rows = [answer_row(81, ["old", "old"]), answer_row(81, ["one", "two"]), answer_row(5, ["x"])]
    path = str(write_lines(tmp_path / "a.jsonl", rows))
    assert read_answers(path, [QUESTION]) == ("model-a", {81: ("one", "two")})


def test_answers_of_others_must_be_whole_and_of_one_model(tmp_path):
    questions = [QUESTION, Question(id=82, category="math", turns=("a", "b"))]
    rows = [answer_row(81, ["one", "two"]), answer_row(82, ["one"])]
    path = str(write_lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(ValueError, match=r"not answer both turns of 1 of 2 questions: 82; add"):
        read_answers(path, questions)
    rows.append(answer_row(82, ["one", "two"], "model-b"))
    path = str(write_lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(ValueError, match="holds answers of model-a, model-b; give a file for each"):
        read_answers(path, questions)
    with pytest.raises(FileNotFoundError, match=r"--answers \('nowhere.jsonl'\) is no file"):
        read_answers("nowhere.jsonl", questions)
