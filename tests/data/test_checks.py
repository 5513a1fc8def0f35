"""What looks wrong with encoded data: left out, or said in one sentence."""

import re

import pytest
from datasets import Dataset, concatenate_datasets

from pacatune.data.checks import fingerprint, overlap_warning
from tests.data.conftest import talk, write_lines

ROWS = [talk(f"What is {i}?", f"It is {i}.") for i in range(20)]


@pytest.mark.parametrize(
    ("row", "num_kept", "message"),
    [
        (talk("Hi?", "It is so. " * 20), 2, "are cut at .* [(]30[)] and never learn to stop: .*2"),
        (talk("Hi? " * 40, "Yes."), 1, "do not fit into .* [(]30[)] and are left out: .*row 2.$"),
    ],
)
def test_warnings(prepare, row, num_kept, message):
    data = prepare([talk("Hi?", "Yes."), row], eval_fraction=0, max_length=30)
    (warning,) = data.warnings
    assert re.match(f"1 of 2 training examples {message}", warning)
    assert len(data.train) == num_kept
    assert data.longest == max(len(row["labels"]) for row in data.train) <= 30


def test_texts_that_are_trained_without_the_chat_template(prepare, tokenizer):
    rows = [{"prompt": "It", "completion": " is so."}] * 2
    (warning,) = prepare(
        [*rows, {"prompt": "Is", "completion": " it?"}], eval_fraction=0.3
    ).warnings
    assert re.match(
        "[0-9] of [0-9] training examples are texts .* `generate` uses; .*--no_chat", warning
    )
    assert prepare([{"text": "It is so."}], eval_fraction=0).warnings == []
    instruction = [{"instruction": "q", "output": "a"}]
    assert prepare(instruction, eval_fraction=0).warnings == []
    tokenizer.chat_template = None
    assert prepare(rows, eval_fraction=0).warnings == []


def test_other_warnings(prepare, tokenizer):
    (warning, _) = prepare([{"prompt": "It ", "completion": "is so."}], eval_fraction=0).warnings
    assert warning.startswith("1 of 1 training examples have a prompt that is tokenized otherwise")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "")
    (warning,) = prepare(ROWS).warnings
    assert warning.startswith("19 of 19 training examples do not end in a stop token, so the model")


def test_examples_in_both_parts(prepare, tmp_path):
    held_out = write_lines(tmp_path / "held.jsonl", [talk("Hi?", "Yes."), *ROWS[2:6]])
    data = prepare(ROWS, eval_path=held_out)
    assert (len(data.train), len(data.evaluation)) == (20, 5)
    assert "held.jsonl, row 1" in data.evaluation["place"][0]
    assert data.warnings == []
    (warning,) = overlap_warning(data.train, data.evaluation, ("input_ids", "labels"))
    assert warning.startswith("4 of 5 evaluation examples are also in the training data (")
    assert "row 4 and 1 more" in warning


def table(**columns):
    return Dataset.from_dict({"prompt_ids": [[1, 2]] * 3, "label": [True] * 3, **columns})


def of(*parts, names=("prompt_ids", "chosen_ids", "label")):
    return fingerprint(parts, names)


def test_a_fingerprint_is_of_every_row_and_its_borders():
    first = of(table(chosen_ids=[[3], [4], [5]]))
    whole = table(chosen_ids=[[9], [3], [4], [5]][1:], place=["a", "b", "c"])
    assert of(whole) == of(concatenate_datasets([whole.select([0]), whole.select([1, 2])])) == first
    assert of(whole.select([0, 1]), whole.select([2])) != first  # held out, and not trained on
    others = [
        table(chosen_ids=[[3], [4], [6]]),
        table(chosen_ids=[[3], [5], [4]]),
        table(chosen_ids=[[3], [4]], prompt_ids=[[1, 2]] * 2, label=[True] * 2),
        table(chosen_ids=[[3], [4], [5]], label=[True, True, False]),
        table(chosen_ids=[[2, 3], [4], [5]], prompt_ids=[[1], [1, 2], [1, 2]]),
        table(chosen_ids=[[3], [4], [5]], prompt_ids=[[1, 2], [1, 2, 4], []]),
    ]
    assert len({first, *(of(other) for other in others)}) == len(others) + 1
