import copy
import json

import pytest

from pacatune.data import PreferenceDataConfig
from pacatune.data.encode import Encoder
from pacatune.data.preference import prepare_judged, prepare_pairs, to_judged, to_pairs
from pacatune.data.read import Row


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


PAIR = {"prompt": "What is 1?", "chosen": " It is one.", "rejected": " No idea."}
CHAT = {
    "prompt": [user("What is 1?")],
    "chosen": [assistant("It is one.")],
    "rejected": [assistant("No idea.")],
}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def run(rows, function=prepare_pairs, *, max_length=200, eval_fraction=0, **options):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = PreferenceDataConfig(path=str(path), eval_fraction=eval_fraction)
        encoder = Encoder(tokenizer=tokenizer, stop_ids={2}, max_length=max_length, **options)
        return function(config, encoder)

    return run


def texts(data, tokenizer, *columns):
    return [[tokenizer.decode(row[column]) for column in columns] for row in data]


def test_a_pair_of_texts(prepare, tokenizer):
    (row,) = texts(prepare([PAIR]).train, tokenizer, "prompt_ids", "chosen_ids", "rejected_ids")
    assert row == ["<s>What is 1?", " It is one.</s>", " No idea.</s>"]


def test_a_pair_of_chats_ends_where_generation_does(prepare, tokenizer):
    (row,) = texts(prepare([CHAT]).train, tokenizer, "prompt_ids", "chosen_ids", "rejected_ids")
    assert row == ["<s><|user|>\nWhat is 1?</s>\n<|assistant|>\n", "It is one.</s>", "No idea.</s>"]


@pytest.mark.parametrize("row", [PAIR, CHAT], ids=["text", "chat"])
def test_a_prompt_that_both_answers_begin_with(prepare, row):
    implicit = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
    explicit, found = prepare([row]).train, prepare([implicit]).train
    assert found[0] == explicit[0]


def test_models_that_score_see_whole_texts(prepare, tokenizer):
    (row,) = texts(prepare([PAIR], learn_all=True).train, tokenizer, "chosen_ids", "rejected_ids")
    assert row == ["<s>What is 1? It is one.</s>", "<s>What is 1? No idea.</s>"]
    whole = {"chosen": "Yes.", "rejected": "No."}  # without a prompt
    (row,) = texts(prepare([whole], learn_all=True).train, tokenizer, "chosen_ids", "rejected_ids")
    assert row == ["<s>Yes.</s>", "<s>No.</s>"]


def test_same_tokens_as_trl(prepare, tokenizer):
    from types import SimpleNamespace

    from datasets import Dataset
    from trl import DPOTrainer

    stub = SimpleNamespace(_tokenizer=tokenizer)
    options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    theirs = DPOTrainer._prepare_dataset(stub, Dataset.from_list([PAIR]), tokenizer, options, "x")
    ours = prepare([PAIR]).train
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[0][column] == theirs[0][column], column


def test_judged_answers(prepare, tokenizer):
    rows = [{"prompt": "a", "completion": f" {n}", "label": n % 2 == 0} for n in range(6)]
    data = prepare(rows, prepare_judged).train
    found = {tokenizer.decode(row["completion_ids"]): row["label"] for row in data}
    assert found == {f" {n}</s>": n % 2 == 0 for n in range(6)}
    # in an order of the seed, which is that of training
    assert data["place"] != sorted(data["place"])
    assert data["place"] == prepare(rows, prepare_judged).train["place"]


def test_pairs_become_judged_answers(prepare):
    data = prepare([PAIR, CHAT | {"prompt": [user("b")]}][:1], prepare_judged).train
    assert sorted(data["label"]) == [False, True]


def test_both_answers_of_a_pair_are_held_out(prepare):
    rows = [{**PAIR, "prompt": f"What is {n}?"} for n in range(10)]
    data = prepare(rows, prepare_judged, eval_fraction=0.3)
    assert len(data.evaluation) == 6
    assert not set(data.train["place"]) & set(data.evaluation["place"])


@pytest.mark.parametrize(
    ("text", "label"), [("true", True), ("False", False), (1, True), (0, False)]
)
def test_labels_of_tables(text, label):
    row = Row("r", {"prompt": "a", "completion": "b", "label": text})
    assert [found for _, found in to_judged([row])] == [label]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            r"row 1: field 'rejected' is missing \(columns \['chosen'",
        ),
        (
            {"prompt": "a", "completion": "b"},
            r"field 'chosen' is missing .* needs chosen, rejected",
        ),
        ({**PAIR, "rejected": PAIR["chosen"]}, "'chosen' and 'rejected' are the same, so neither"),
        ({**PAIR, "chosen": ""}, "'chosen' is ''; it must be a text"),
        (
            {**PAIR, "chosen": [assistant("a")]},
            r"'prompt' .* and 'chosen' .* must both be texts or",
        ),
        ({**CHAT, "rejected": [user("a")]}, "'rejected' has no assistant turn"),
        ({**CHAT, "chosen": [{"role": "assistant"}]}, r"chosen\[0\]: the content is ''"),
        (
            {"chosen": "ab", "rejected": "xy"},
            "there is no 'prompt', and 'chosen' and 'rejected' are",
        ),
        ({"chosen": "a", "rejected": [user("a")]}, "there is no 'prompt', and 'chosen' and"),
        ({**PAIR, "images": ["x"]}, "column 'images' is not used by format 'preference'"),
    ],
)
def test_bad_pairs(row, message):
    with pytest.raises(ValueError, match=message):
        list(to_pairs([Row("d.jsonl, row 1", row)], needs_prompt=True))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "completion": "b"},
            r"field 'label' is missing .* needs prompt, completion",
        ),
        ({"prompt": "a", "completion": "b", "label": "good"}, "'label' is 'good'; it must be true"),
        ({"prompt": "a", "completion": "b", "label": 2}, "'label' is 2; it must be true"),
    ],
)
def test_bad_judged_answers(row, message):
    with pytest.raises(ValueError, match=message):
        list(to_judged([Row("d.jsonl, row 1", row)]))


def test_pairs_that_do_not_fit_are_left_out(prepare):
    long = {**PAIR, "prompt": "What " * 30}
    data = prepare([PAIR, long, PAIR | {"chosen": " Two."}], max_length=40)
    assert len(data.train) == 2
    (warning,) = data.warnings
    assert warning.startswith("1 of 3 training examples do not fit into `training.max_length` (40)")
    assert warning.endswith("row 2.")
    with pytest.raises(ValueError, match=r"all 1 training examples are longer than `training.max"):
        prepare([long], max_length=40)


def test_models_that_score_cut_nothing(prepare):
    long = {**PAIR, "rejected": " No" * 60}
    data = prepare([PAIR, long], max_length=50, learn_all=True)
    assert len(data.train) == 1
    assert "1 of 2 training examples do not fit" in data.warnings[0]


def test_a_chat_needs_a_template(prepare, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"row 1: the chat template cannot render it .Cannot use"):
        prepare([CHAT])


def test_pairs_in_both_parts_are_a_warning(prepare):
    rows = [PAIR] * 10
    warnings = prepare(rows, eval_fraction=0.2).warnings
    assert any("2 of 2 evaluation examples are also in the training data" in w for w in warnings)
