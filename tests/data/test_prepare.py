import copy
import io
import json
import re

import pytest
from datasets import Dataset
from rich.console import Console

from pacatune.data import DataConfig, prepare_data, show_preview


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


def chat(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(tokenizer, max_length=200, num_processes=None, **options):
    return prepare_data(
        DataConfig(**options),
        tokenizer,
        max_length=max_length,
        stop_ids={2},
        num_processes=num_processes,
    )


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "data.jsonl", [chat(f"What is {i}?", f"It is {i}.") for i in range(20)])


def test_holds_out_a_seeded_fraction_in_order(tokenizer, path):
    data = prepare(tokenizer, path=path, eval_fraction=0.2)
    assert (len(data.train), len(data.evaluation)) == (16, 4)
    places = [int(place.rpartition(" ")[2]) for place in data.train["place"]]
    held_out = [int(place.rpartition(" ")[2]) for place in data.evaluation["place"]]
    assert places == sorted(places)
    assert held_out == sorted(held_out)
    assert sorted(places + held_out) == list(range(1, 21))
    again = prepare(tokenizer, path=path, eval_fraction=0.2)
    assert again.evaluation["place"][:] == data.evaluation["place"][:]
    other = prepare(tokenizer, path=path, eval_fraction=0.2, seed=1)
    assert other.evaluation["place"][:] != data.evaluation["place"][:]
    assert data.warnings == []


def test_fraction_holds_out_at_least_one(tokenizer, path):
    assert len(prepare(tokenizer, path=path, eval_fraction=0.001).evaluation) == 1


def test_nothing_held_out(tokenizer, path):
    data = prepare(tokenizer, path=path, eval_fraction=0)
    assert len(data.train) == 20
    assert data.evaluation is None


def test_separate_evaluation_data(tokenizer, path, tmp_path):
    eval_path = write(tmp_path / "held.jsonl", [chat("Hi?", "Yes.")])
    data = prepare(tokenizer, path=path, eval_path=eval_path)
    assert (len(data.train), len(data.evaluation)) == (20, 1)
    assert "held.jsonl, row 1" in data.evaluation["place"][0]


def test_columns_are_what_the_trainer_takes(tokenizer, path):
    data = prepare(tokenizer, path=path, eval_fraction=0)
    assert sorted(data.train.column_names) == ["input_ids", "labels", "num_tokens", "place"]
    row = data.train[0]
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "It is 0.</s>"
    assert data.longest == max(map(len, data.train["input_ids"]))


def test_several_processes_give_the_same(tokenizer, path):
    one = prepare(tokenizer, path=path)
    two = prepare(tokenizer, path=path, num_processes=2)
    assert one.train[:] == two.train[:]


def test_fraction_that_leaves_nothing(tokenizer, tmp_path):
    path = write(tmp_path / "one.jsonl", [chat("Hi?", "Yes.")])
    with pytest.raises(ValueError, match=r"`data.eval_fraction` \(0.5\) of 1 rows leaves none"):
        prepare(tokenizer, path=path, eval_fraction=0.5)


def test_chat_without_template(tokenizer, path):
    tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match=r"row 1: the chat template cannot render .*not set .*; give a `data"
    ):
        prepare(tokenizer, path=path)


def test_error_in_a_row_names_it(tokenizer, tmp_path):
    path = write(tmp_path / "bad.jsonl", [chat("Hi?", "Yes."), chat("Hi?", "")])
    with pytest.raises(ValueError, match=r"bad.jsonl, row 2: messages\[1\]: the content is ''"):
        prepare(tokenizer, path=path)


def test_cut_examples_are_reported(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [chat("Hi?", "Yes."), chat("Hi?", "It is so. " * 20)])
    data = prepare(tokenizer, path=path, eval_fraction=0, max_length=30)
    (warning,) = data.warnings
    assert warning.startswith(
        "1 of 2 training examples are cut at `training.max_length` (30) and never learn to stop: "
    )
    assert data.longest == 30
    assert len(data.train[1]["input_ids"]) == len(data.train[1]["labels"]) == 30


def test_examples_that_lose_their_completion_are_left_out_and_reported(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [chat("Hi?", "Yes."), chat("Hi? " * 40, "Yes.")])
    data = prepare(tokenizer, path=path, eval_fraction=0, max_length=30)
    assert len(data.train) == 1
    (warning,) = data.warnings
    assert warning.startswith("1 of 2 training examples do not fit into ")
    assert warning.endswith("a.jsonl, row 2.")


def test_all_completions_lost(tokenizer, path):
    with pytest.raises(ValueError, match=r"all 19 training examples are longer than .*\(5\)"):
        prepare(tokenizer, path=path, max_length=5)


def test_nothing_to_learn(tokenizer, path):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'tool' %}"
        "{% generation %}x{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(
        ValueError, match=r"data.jsonl, row 1: nothing to learn, no token is an answer's; remove"
    ):
        prepare(tokenizer, path=path)


def test_double_bos(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "fine"}, {"text": "<s>twice"}])
    with pytest.raises(ValueError, match=r"a.jsonl, row 2: begins with '<s>' twice, once from the"):
        prepare(tokenizer, path=path, eval_fraction=0)


def test_double_bos_of_the_template(tokenizer, path):
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match="begins with '<s>' twice"):
        prepare(tokenizer, path=path)


def test_stop_token_that_is_never_trained(tokenizer, path):
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "")
    data = prepare(tokenizer, path=path)
    (warning,) = data.warnings
    assert warning.startswith("19 of 19 training examples do not end in a stop token, so the model")


def test_moved_boundary_is_reported(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "It ", "completion": "is so."}])
    (warning,) = prepare(tokenizer, path=path, eval_fraction=0).warnings
    assert warning.startswith("1 of 1 training examples have a prompt that is tokenized otherwise")


def test_evaluation_data_that_is_trained_on_is_reported(tokenizer, path):
    (warning,) = prepare(tokenizer, path=path, eval_path=path).warnings
    assert warning.startswith("20 of 20 evaluation examples are also in the training data (")
    assert "row 3 and 17 more" in warning


def preview(tokenizer, rows, num_examples=3, **options):
    out = io.StringIO()
    show_preview(Dataset.from_list(rows), tokenizer, num_examples, Console(file=out, **options))
    return out.getvalue()


def example(tokenizer, prompt, completion, place="f.jsonl, row 1"):
    first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    second = tokenizer(completion, add_special_tokens=False)["input_ids"]
    labels = [-100] * len(first) + second
    return {
        "place": place,
        "input_ids": first + second,
        "labels": labels,
        "num_tokens": len(labels),
    }


def test_colour_marks_learned_tokens(tiny_tokenizer):
    rows = [example(tiny_tokenizer, "Hi?", " Yes.</s>")]
    text = preview(tiny_tokenizer, rows, force_terminal=True, color_system="truecolor")
    styles = re.findall(r"\x1b\[([\d;]+)m([^\x1b]+)\x1b\[0m", text)
    learned = "".join(piece for style, piece in styles if style.startswith("1;") and "32" in style)
    context = "".join(piece for style, piece in styles if style.split(";")[0] == "2")
    assert learned == " Yes.</s>"
    assert context == "Hi?"
    assert "Learned tokens are green" in text


def test_brackets_where_there_is_no_colour(tiny_tokenizer):
    rows = [example(tiny_tokenizer, "Hi?", " Yes.</s>")]
    text = preview(tiny_tokenizer, rows)
    assert "Hi?[[ Yes.</s>]]" in text
    assert "f.jsonl, row 1: 8 tokens, 5 learned" in text


def test_shows_as_many_as_asked_and_there_are(tiny_tokenizer):
    rows = [example(tiny_tokenizer, "a", "b", f"row {i}") for i in range(3)]
    assert preview(tiny_tokenizer, rows, 2).count("tokens, 1 learned") == 2
    assert preview(tiny_tokenizer, rows, 9).count("tokens, 1 learned") == 3


def test_brackets_in_data_are_no_markup(tiny_tokenizer):
    text = preview(
        tiny_tokenizer, [example(tiny_tokenizer, "[bold]x[/bold]", "y", "[red].jsonl, row 1")]
    )
    assert "[bold]x[/bold]" in text
    assert "[red].jsonl, row 1: " in text


def test_cut_examples_say_so(tiny_tokenizer):
    one = {**example(tiny_tokenizer, "a", "b"), "num_tokens": 9}
    assert "f.jsonl, row 1: 2 tokens (cut from 9), 1 learned" in preview(tiny_tokenizer, [one])
