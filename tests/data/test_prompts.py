import copy
import json
from datetime import date

import pytest
from datasets import Dataset

from pacatune.data import PromptDataConfig
from pacatune.data.prompts import INDEX, prepare_prompts


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def run(rows, *, eval_fraction=0, **options):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = PromptDataConfig(path=str(path), eval_fraction=eval_fraction, **options)
        return prepare_prompts(config, tokenizer, num_new_tokens=5)

    return run


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_rows_come_back_as_they_are(prepare):
    """A table would make the numbers one type, and give both objects the fields of both."""
    rows = [
        {"prompt": "a", "answer": 1, "meta": {"x": [1, None]}},
        {"prompt": "b", "answer": "two", "meta": {"y": True}, "more": 0.5},
    ]
    data = prepare(rows).train
    for row, found in zip(rows, data, strict=True):
        assert found.pop("place").endswith(("row 1", "row 2"))
        assert found == {"more": None, **row}
    assert data[:]["answer"] == [1, "two"]


def test_longest_is_a_prompt_and_its_answer(prepare, tokenizer):
    data = prepare([{"prompt": "a"}, {"prompt": "a b c"}])
    assert data.longest == len(tokenizer("a b c")["input_ids"]) + 5


@pytest.mark.parametrize("prompt", ["a", chat("a")], ids=["text", "chat"])
def test_system_prompt(prepare, prompt):
    (row,) = prepare([{"prompt": prompt}], system_prompt="Be brief.").train
    assert row["prompt"] == [{"role": "system", "content": "Be brief."}, *chat("a")]
    other = [{"role": "system", "content": "No."}, *chat("a")]
    (row,) = prepare([{"prompt": other}], system_prompt="Be brief.").train
    assert row["prompt"] == other


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "place": 1}], "column 'place' has the name of an argument that every"),
        ([{"question": "a"}], r"row 1: field 'prompt' is missing \(columns \['question'\]\)"),
        ([{"prompt": "a"}, {"prompt": ""}], "row 2: 'prompt' is ''; it must be a text"),
        ([{"prompt": chat("a", "b")}], "'prompt' ends with an assistant turn, which the model"),
        ([{"prompt": "a"}, {"prompt": chat("b")}], "row 1 has a text as prompt, and .* a chat"),
        ([{"prompt": "a", "images": ["x"]}], "column 'images' has the name of an"),
    ],
)
def test_bad_rows(prepare, rows, message):
    with pytest.raises(ValueError, match=message):
        prepare(rows)


def test_columns_of_tables_that_json_cannot_hold(tokenizer, tmp_path):
    path = str(tmp_path / "d.parquet")
    Dataset.from_list([{"prompt": "a", "on": date(2026, 1, 2)}]).to_parquet(path)
    config = PromptDataConfig(path=path, eval_fraction=0)
    with pytest.raises(ValueError, match=r"a column .* is no JSON .*date.*; write it as"):
        prepare_prompts(config, tokenizer, num_new_tokens=1)


def test_a_chat_needs_a_template(prepare, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"row 1: the chat template cannot render it .Cannot"):
        prepare([{"prompt": chat("a")}])


def test_a_template_that_refuses_names_the_row(prepare, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0].content == 'b' else 'a' }}"
    with pytest.raises(ValueError, match=r"row 2: the chat template cannot render it \(no\)"):
        prepare([{"prompt": chat("a")}, {"prompt": chat("b")}])


def test_options_of_what_is_generated():
    for options in (
        {"path": "d.jsonl", "size": 3},
        {"path": "d.jsonl", "options": {"a": 1}},
        {"path": "reasoning-gym:chain_sum", "eval_path": "d.jsonl"},
    ):
        with pytest.raises(ValueError, match=r"`data\..*ignored where `data.path` is .*; drop it"):
            PromptDataConfig(**options)


class TestReasoningGym:
    @pytest.fixture(autouse=True)
    def is_installed(self):
        pytest.importorskip("reasoning_gym")

    def prepare(self, tokenizer, path="reasoning-gym:chain_sum", **options):
        config = PromptDataConfig(path=path, **{"size": 12, "eval_fraction": 0.25, **options})
        return prepare_prompts(config, tokenizer, num_new_tokens=5)

    def test_generated_prompts(self, tokenizer):
        first, again = self.prepare(tokenizer), self.prepare(tokenizer)
        assert list(first.train) == list(again.train)
        assert list(first.train) != list(self.prepare(tokenizer, seed=1).train)
        row = first.train[0]
        assert row["prompt"][0]["role"] == "user"
        assert row[INDEX] < 12
        assert (len(first.train), len(first.evaluation)) == (9, 3)

    def test_texts_without_a_template(self, tokenizer):
        tokenizer.chat_template = None
        assert isinstance(self.prepare(tokenizer).train[0]["prompt"], str)

    def test_what_is_generated_twice_is_in_one_part(self, tokenizer):
        options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
        data = self.prepare(tokenizer, size=300, options=options)
        parts = [{row["prompt"][0]["content"] for row in d} for d in (data.train, data.evaluation)]
        assert len(data.train) > len(parts[0])
        assert not parts[0] & parts[1]

    def test_bad_options(self, tokenizer):
        with pytest.raises(ValueError, match=r"`data.path` \('chain_sun'\) .* 'chain_sum'\?"):
            self.prepare(tokenizer, path="reasoning-gym:chain_sun")
        with pytest.raises(ValueError, match=r"does not make 'chain_sum' with `data.options`"):
            self.prepare(tokenizer, options={"nosuch": 1})
        with pytest.raises(ValueError, match=r"does not make 'chain_sum' with `data.options`"):
            self.prepare(tokenizer, options={"min_terms": 9, "max_terms": 3})


def test_without_reasoning_gym(tokenizer, monkeypatch):
    monkeypatch.setattr("pacatune.installation.find_spec", lambda name: None)
    config = PromptDataConfig(path="reasoning-gym:chain_sum")
    with pytest.raises(
        ValueError, match=r"needs packages that are not installed \(reasoning_gym\)"
    ):
        prepare_prompts(config, tokenizer, num_new_tokens=5)
