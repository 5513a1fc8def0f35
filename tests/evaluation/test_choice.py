"""Multiple choice: lm-eval against plain PyTorch, one choice at a time."""

import copy

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from pacatune import PacaConfig
from pacatune.adapters.loading import answered_warnings
from pacatune.data.config import DataConfig
from pacatune.data.prepare import prepare_data
from pacatune.data.read import Row
from pacatune.evaluation import ChoiceQuestion, evaluate_choice
from pacatune.evaluation.choice import to_choice_question
from pacatune.evaluation.language_model import LanguageModel
from tests.conftest import build_model
from tests.data.conftest import chat as turns
from tests.data.conftest import write_lines
from tests.evaluation.conftest import log_likelihood

QUESTIONS = [
    ChoiceQuestion("What is the capital of France?", ["Paris", "A short answer", "It"], 0),
    ChoiceQuestion("Is {{ it }} true?", ["yes", "no"], 1, prompt="The answer is"),
    ChoiceQuestion("Where is it from, please?" * 3, ["the question " * 6, "Été", "Y", "Z"], 3),
]


ROW = {"question": "Who?", "choices": ["Ann", " Bob "], "answer": 1}


def test_own_and_big_bench_rows_say_the_same():
    expected = ChoiceQuestion("Who?", ["Ann", "Bob"], 1)
    scores = {"input": "Who? ", "target_scores": {"Ann": 0, "Bob": 1}}
    for values in (ROW, {**ROW, "answer": "Bob"}, scores):
        assert to_choice_question(Row("here", values)) == expected
    assert expected.context() == "Question: Who?\nAnswer:"
    assert expected.context(chat=True) == "Who?"


WRONG = [{"choices": ["a", "b"], "answer": 0}]
WRONG += [ROW | {"choices": choices} for choices in (["a"], ["a", " "], ["a", "a "])]
WRONG += [ROW | wrong for wrong in ({"question": ""}, {"answer": 2}, {"answer": True})]
WRONG += [ROW | {"prompt": 3}]
WRONG += [{"input": "q", "target_scores": scores} for scores in ({}, {"a": 1, "b": 1})]


@pytest.mark.parametrize("values", WRONG)
def test_wrong_rows(values):
    with pytest.raises(ValueError, match=r"x.jsonl, row 3: .* needs the texts question and, if"):
        to_choice_question(Row("x.jsonl, row 3", values))


@pytest.mark.parametrize("chat", [False, True])
def test_padded_batches_equal_one_choice_at_a_time(model, tokenizer, chat):
    result = evaluate_choice(model, tokenizer, QUESTIONS, batch_size=4, chat=chat)
    for one, scored in zip(QUESTIONS, result.questions, strict=True):
        context, space = one.context(), " "
        if chat:
            user = [{"role": "user", "content": one.question}]
            options = {"tokenize": False, "add_generation_prompt": True}
            context, space = tokenizer.apply_chat_template(user, **options), ""
        options = {"add_special_tokens": not chat}  # the template has its own
        expected = [
            log_likelihood(model, tokenizer, context, space + choice, **options)
            for choice in one.choices
        ]
        assert scored["responses"] == pytest.approx(expected, abs=1e-4)
        by_length = [each / len(c) for each, c in zip(expected, one.choices, strict=True)]
        assert scored["acc"] == float(max(expected) == expected[one.answer])
        assert scored["acc_norm"] == float(max(by_length) == by_length[one.answer])
    found = {"acc": result.accuracy, "acc_norm": result.accuracy_normalised}
    for name, score in found.items():
        assert score.value == pytest.approx(sum(each[name] for each in result.questions) / 3)
    assert result.accuracy.num_questions == 3
    assert result.accuracy.stderr is not None
    assert result.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3)


def write_rows(path, questions, *, chat):
    """Write rows to train on and to score; return the data's configuration."""
    rows = []
    for one in questions:
        answer = one.choices[one.answer]
        row = {"prompt": one.context(), "completion": f" {answer}"}
        if chat:
            row = {"messages": turns(one.question, answer)}
        rows.append(row | {"question": one.question, "choices": one.choices, "answer": one.answer})
    return DataConfig(path=write_lines(path, rows), eval_fraction=0)


@pytest.mark.parametrize("chat", [False, True])
def test_training_tokens_are_those_that_are_scored(model, tokenizer, tmp_path, chat):
    config = write_rows(tmp_path / "train.jsonl", QUESTIONS, chat=chat)
    rows = prepare_data(config, tokenizer, max_length=None, stop_ids={2}).train
    lm = LanguageModel(model, tokenizer, keep_line_break=True)
    for one, row in zip(QUESTIONS, rows, strict=True):
        context, answer = one.context(chat=chat), one.choices[one.answer]
        if chat:
            context = lm.apply_chat_template([{"role": "user", "content": context}])
        context_ids, answer_ids = lm._encode_pair(context, answer if chat else f" {answer}")
        stop = [tokenizer.eos_token_id]
        learned = [label for label in row["labels"] if label != -100]
        assert learned == answer_ids + stop
        both = context_ids + answer_ids + stop
        assert row["input_ids"][: len(both)] == both


def test_limit_truncation_and_wrong_input(tokenizer):
    small = build_model(len(tokenizer), max_position_embeddings=64)
    result = evaluate_choice(small, tokenizer, QUESTIONS, limit=2)
    assert [each["number"] for each in result.questions] == [0, 1]
    assert result.num_truncated == 0
    assert evaluate_choice(small, tokenizer, QUESTIONS[2:]).num_truncated == 1
    longest = ChoiceQuestion("q", ["x" * 65, "y"], 0)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for used, questions, options, message in (
        (tokenizer, [longest], {}, "more than the model's context of 64; shorten it or use"),
        (tokenizer, [], {}, r"no questions are asked \(`limit` is None\)"),
        (tokenizer, QUESTIONS, {"batch_size": 0}, r"`batch_size` \(0\) must be at least 1"),
        (bare, QUESTIONS, {"chat": True}, "`chat` needs a chat template, which the model's"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_choice(small, used, questions, **options)


def responses(*args, **options):
    return [one["responses"] for one in evaluate_choice(*args, **options).questions]


def test_logits_that_are_not_read_are_not_computed(model, tokenizer, monkeypatch):
    """Batches of questions of any length: the same numbers as with all logits, from fewer."""
    whole = responses(model, tokenizer, QUESTIONS, batch_size=20)
    sizes = []
    handle = model.lm_head.register_forward_hook(
        lambda *args: sizes.append(args[2][..., 0].numel())
    )
    kept = responses(model, tokenizer, QUESTIONS, batch_size=2)
    num_kept = sum(sizes)
    monkeypatch.setattr(LanguageModel, "_tail", lambda self, requests: 0)
    unkept = responses(model, tokenizer, QUESTIONS, batch_size=2)
    handle.remove()
    assert num_kept < 0.5 * (sum(sizes) - num_kept)
    for one, other, third in zip(kept, unkept, whole, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
        assert one == pytest.approx(third, abs=1e-4)


def test_models_that_compute_all_logits(tokenizer):
    """Architectures without `logits_to_keep` are scored all the same."""

    class Plain(GPT2LMHeadModel):
        def forward(self, input_ids, **kwargs):
            return super().forward(input_ids, **kwargs)

    config = GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=16, n_layer=1, n_head=2)
    plain, whole = Plain(config).eval(), GPT2LMHeadModel(config).eval()
    whole.load_state_dict(plain.state_dict())
    both = [responses(one, tokenizer, QUESTIONS) for one in (plain, whole)]
    for one, other in zip(*both, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_nothing_of_the_model_or_of_the_random_states_changes(tokenizer):
    """R2a. An adapter unties tied weights, which lm-eval would tie again; it also sets seeds."""
    tied = build_model(len(tokenizer), tie_word_embeddings=True)
    options = {"r": 4, "target_modules": ["lm_head", "q_proj"], "init_weights": False}
    with answered_warnings():
        model = get_peft_model(tied, PacaConfig(**options, task_type="CAUSAL_LM")).eval()
    ids = torch.arange(3, 40)[None]
    before = model(ids).logits
    attributes = set(model.__dict__)
    versions = [p._version for p in model.parameters()]
    states = [torch.get_rng_state(), np.random.get_state()[1]]  # noqa: NPY002
    evaluate_choice(model, tokenizer, QUESTIONS)
    assert [p._version for p in model.parameters()] == versions
    assert torch.equal(model(ids).logits, before)
    assert set(model.__dict__) == attributes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
