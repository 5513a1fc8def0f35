"""Prompts with all columns of their rows."""

from datetime import date

import pytest
from datasets import Dataset

from pacatune.data.config import PromptDataConfig
from pacatune.data.prompts import prepare_prompts
from tests.data.conftest import chat, write_lines


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def run(rows, *, eval_fraction=0, **options):
        path = write_lines(tmp_path / "d.jsonl", rows)
        config = PromptDataConfig(path=path, eval_fraction=eval_fraction, **options)
        return prepare_prompts(config, tokenizer, num_new_tokens=5)

    return run


def test_rows_come_back_as_they_are(prepare, tokenizer):
    """A table would make the numbers one type, and give both objects the fields of both."""
    rows = [
        {"prompt": "a", "answer": 1, "meta": {"x": [1, None]}},
        {"prompt": "a b c", "answer": "two", "meta": {"y": True}, "more": 0.5},
    ]
    data = prepare(rows)
    for row, found in zip(rows, data.train, strict=True):
        assert found.pop("place").endswith(("row 1", "row 2"))
        assert found == {"more": None, **row}
    assert data.train[:]["answer"] == [1, "two"]
    assert data.longest == len(tokenizer("a b c")["input_ids"]) + 5


def test_texts_that_are_answered_without_the_chat_template(prepare, tokenizer):
    (warning,) = prepare([{"prompt": "a"}, {"prompt": "b"}]).warnings
    assert warning.startswith(
        "2 of 2 training examples are texts that are trained without the chat template"
    )
    assert prepare([{"prompt": chat("a")}]).warnings == []
    tokenizer.chat_template = None
    assert prepare([{"prompt": "a"}]).warnings == []


def test_a_row_sets_variables_of_the_template(prepare, tokenizer):
    tokenizer.chat_template += "{{ more }}"
    asked = chat("a")
    longer, shorter = (
        prepare([{"prompt": asked, "chat_template_kwargs": {"more": more}}])
        for more in ("abc" * 9, "")
    )
    number = len(tokenizer("abc" * 9, add_special_tokens=False)["input_ids"])
    assert longer.longest == shorter.longest + number
    assert longer.train[0]["chat_template_kwargs"] == {"more": "abc" * 9}
    assert longer.warnings == []
    (warning,) = prepare([{"prompt": asked, "chat_template_kwargs": {"less": 1}}]).warnings
    assert (
        "1 of 1 training examples set `chat_template_kwargs` that the chat template does not"
        in warning
    )


REFUSES_B = "{{ raise_exception('no') if messages[0].content == 'b' else 'a' }}"


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        ([{"prompt": "a", "place": 1}], "", "column 'place' has the name of .*; rename it"),
        ([{"prompt": "a", "images": ["x"]}], "", "'images' has the name of an argument that"),
        ([{"prompt": "a", "chat_template_kwargs": {"x": 1}}], "", "row 1: .* not used by a text"),
        ([{"question": "a"}], "", r"row 1: field 'prompt' is missing \(columns \['question'\]\)"),
        ([{"prompt": chat("a", "b")}], "", "'prompt' ends with an assistant turn, which the model"),
        ([{"prompt": "a"}, {"prompt": chat("b")}], "", "row 1 has a text .* a chat; convert one"),
        ([{"prompt": chat(text)} for text in "ab"], REFUSES_B, r"row 2: .* render it \(no\)"),
    ],
)
def test_bad_rows(prepare, tokenizer, rows, template, message):
    tokenizer.chat_template = tokenizer.chat_template if template == "" else template
    with pytest.raises(ValueError, match=message):
        prepare(rows)


def test_columns_of_tables_that_json_cannot_hold(tokenizer, tmp_path):
    path = str(tmp_path / "d.parquet")
    Dataset.from_list([{"prompt": "a", "on": date(2026, 1, 2)}]).to_parquet(path)
    config = PromptDataConfig(path=path, eval_fraction=0)
    with pytest.raises(ValueError, match=r"row 1: a column is no JSON .*date.*; write it as"):
        prepare_prompts(config, tokenizer, num_new_tokens=1)
