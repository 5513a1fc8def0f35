"""What looks wrong with encoded data: left out, or said in one sentence."""

import re

import pytest

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


def test_other_warnings(prepare, tokenizer):
    (warning,) = prepare([{"prompt": "It ", "completion": "is so."}], eval_fraction=0).warnings
    assert warning.startswith("1 of 1 training examples have a prompt that is tokenized otherwise")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "")
    (warning,) = prepare(ROWS).warnings
    assert warning.startswith("19 of 19 training examples do not end in a stop token, so the model")


def test_examples_in_both_parts(prepare, tmp_path):
    held_out = write_lines(tmp_path / "held.jsonl", [talk("Hi?", "Yes."), *ROWS[2:6]])
    data = prepare(ROWS, eval_path=held_out)
    assert (len(data.train), len(data.evaluation)) == (20, 5)
    assert "held.jsonl, row 1" in data.evaluation["place"][0]
    (warning,) = data.warnings
    assert warning.startswith("4 of 5 evaluation examples are also in the training data (")
    assert "row 4 and 1 more" in warning
