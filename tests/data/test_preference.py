"""Pairs and judged answers, encoded as TRL trains on them."""

import pytest

from pacatune.data.config import PreferenceDataConfig
from pacatune.data.encode import Encoder
from pacatune.data.preference import prepare_judged, prepare_pairs, to_judged, to_pairs
from pacatune.data.read import Row
from tests.data.conftest import USER, chat, write_lines

PAIR = {"prompt": "What is 1?", "chosen": " It is one.", "rejected": " No idea."}
CHAT = {
    "prompt": chat("What is 1?"),
    "chosen": chat("", "It is one.")[1:],
    "rejected": chat("", "No idea.")[1:],
}


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def run(rows, function=prepare_pairs, *, max_length=200, eval_fraction=0, **options):
        path = write_lines(tmp_path / "d.jsonl", rows)
        config = PreferenceDataConfig(path=path, eval_fraction=eval_fraction)
        encoder = Encoder(tokenizer=tokenizer, stop_ids={2}, max_length=max_length, **options)
        return function(config, encoder)

    return run


@pytest.fixture
def texts(prepare, tokenizer):
    """The texts of the only row of a table, of each column of ids."""

    def run(row, **options):
        (found,) = prepare([row], **options).train
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [tokenizer.decode(found[name]) for name in names if name in found]

    return run


def test_pairs_of_texts_and_of_chats(texts, prepare):
    """A chat ends where generation does; what both answers begin with may be the prompt."""
    assert texts(PAIR) == ["<s>What is 1?", " It is one.</s>", " No idea.</s>"]
    cue = "<s><|user|>\nWhat is 1?</s>\n<|assistant|>\n"
    assert texts(CHAT) == [cue, "It is one.</s>", "No idea.</s>"]
    for row in (PAIR, CHAT):
        implicit = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
        assert prepare([implicit]).train[0] == prepare([row]).train[0]


def test_models_that_score_see_whole_texts(texts):
    whole = ["<s>What is 1? It is one.</s>", "<s>What is 1? No idea.</s>"]
    assert texts(PAIR, learn_all=True) == whole
    assert texts({"chosen": "Yes.", "rejected": "No."}, learn_all=True)[0] == "<s>Yes.</s>"
    turns = "<s><|user|>\nWhat is 1?</s>\n<|assistant|>\n"
    answers = (f"{turns}{answer}</s>\n" for answer in ("It is one.", "No idea."))
    assert texts(CHAT, learn_all=True) == [*answers]


def test_judged_answers(prepare, tokenizer):
    rows = [{"prompt": "a", "completion": f" {n}", "label": n % 2 == 0} for n in range(6)]
    data = prepare(rows, prepare_judged).train
    found = {tokenizer.decode(row["completion_ids"]): row["label"] for row in data}
    assert found == {f" {n}</s>": n % 2 == 0 for n in range(6)}
    # in an order of the seed, which is that of training
    assert data["place"] != sorted(data["place"])
    assert data["place"] == prepare(rows, prepare_judged).train["place"]


def test_pairs_become_judged_answers_of_which_both_are_held_out(prepare):
    rows = [{**PAIR, "prompt": f"What is {n}?"} for n in range(10)]
    data = prepare(rows, prepare_judged, eval_fraction=0.3)
    assert sorted(data.evaluation["label"]) == 3 * [False] + 3 * [True]
    assert not set(data.train["place"]) & set(data.evaluation["place"])


JUDGED = {"prompt": "a", "completion": "b"}


def test_labels_of_tables():
    rows = [Row("r", {**JUDGED, "label": text}) for text in ("true", "False", 1, 0)]
    assert [label for _, label in to_judged(rows)] == [True, False, True, False]


@pytest.mark.parametrize(
    ("function", "row", "message"),
    [
        (to_pairs, {"prompt": "a", "chosen": "b"}, r"'rejected' is missing \(columns \['chosen', "),
        (to_pairs, {**PAIR, "rejected": PAIR["chosen"]}, "are the same, so neither is better; rem"),
        (to_pairs, {"chosen": "ab", "rejected": "xy"}, "there is no 'prompt', and .*; add the col"),
        (to_pairs, {"chosen": "a", "rejected": [USER]}, "there is no 'prompt', and 'chosen' and"),
        (to_judged, JUDGED, "field 'label' is missing .* needs prompt, completion"),
        (to_judged, {**JUDGED, "label": "good"}, "'label' is 'good'; it must be true"),
    ],
)
def test_bad_rows(function, row, message):
    options = {"needs_prompt": True} if function is to_pairs else {}
    with pytest.raises(ValueError, match=f"d.jsonl, row 1: .*{message}"):
        list(function([Row("d.jsonl, row 1", row)], **options))


def test_pairs_that_do_not_fit_are_left_out(prepare):
    long = {**PAIR, "prompt": "What " * 30}
    data = prepare([PAIR, long, PAIR | {"chosen": " Two."}], max_length=40)
    assert len(data.train) == 2
    _, warning = data.warnings
    assert warning.startswith("1 of 3 training examples do not fit into `training.max_length` (40)")
    assert warning.endswith("row 2.")
    with pytest.raises(ValueError, match=r"all 1 training examples are longer than `training.max"):
        prepare([long], max_length=40)
    # Models that score cut nothing.
    long = {**PAIR, "rejected": " No" * 60}
    data = prepare([PAIR, long], max_length=50, learn_all=True)
    assert len(data.train) == 1
    assert "1 of 2 training examples do not fit" in data.warnings[0]
