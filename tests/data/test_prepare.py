"""From files to tokens: what is held out, cut, left out, warned about and refused."""

import io
import re

import pytest
from rich.console import Console

from pacatune.data import DataConfig, prepare_data, show_preview
from pacatune.data.read import Row
from tests.data.conftest import chat, write_lines


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def run(rows, max_length=200, num_processes=None, **options):
        config = DataConfig(path=write_lines(tmp_path / "data.jsonl", rows), **options)
        limits = {"max_length": max_length, "stop_ids": {2}, "num_processes": num_processes}
        return prepare_data(config, tokenizer, **limits)

    return run


def talk(question, answer):
    return {"messages": chat(question, answer)}


ROWS = [talk(f"What is {i}?", f"It is {i}.") for i in range(20)]


def test_holds_out_a_seeded_fraction_in_order(prepare):
    data = prepare(ROWS, eval_fraction=0.2)
    assert (len(data.train), len(data.evaluation), data.warnings) == (16, 4, [])
    parts = (data.train, data.evaluation)
    places = [[int(place.rpartition(" ")[2]) for place in part["place"]] for part in parts]
    assert places == [sorted(part) for part in places]
    assert sorted(places[0] + places[1]) == list(range(1, 21))
    again, other = prepare(ROWS, eval_fraction=0.2), prepare(ROWS, eval_fraction=0.2, seed=1)
    found = [one.evaluation["place"][:] for one in (data, again, other)]
    assert found[0] == found[1] != found[2]
    assert len(prepare(ROWS, eval_fraction=0.001).evaluation) == 1  # at least


def test_columns_are_what_the_trainer_takes(prepare, tokenizer):
    data = prepare(ROWS, eval_fraction=0)
    assert (len(data.train), data.evaluation) == (20, None)
    assert sorted(data.train.column_names) == ["input_ids", "labels", "num_tokens", "place"]
    row = data.train[0]
    learned = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "It is 0.</s>"
    assert data.longest == max(map(len, data.train["input_ids"]))
    whole = prepare(ROWS, eval_fraction=0, loss="all").train  # what is cached is of other options
    assert whole["labels"][:] == whole["input_ids"][:] == data.train["input_ids"][:]


def test_several_processes_give_the_same(prepare, tmp_path, monkeypatch):
    one = prepare(ROWS).train[:]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")  # encode anew
    assert prepare(ROWS, num_processes=2).train[:] == one
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 2


def test_rows_are_parsed_once(prepare, tmp_path, monkeypatch):
    """Beside the first, whose columns are looked at; and not at all where another did it."""
    parsed = []

    def count(*found):
        parsed.append(found)
        return Row(*found)

    monkeypatch.setattr("pacatune.data.read.Row", count)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    first = prepare(ROWS).train[:]
    assert len(parsed) == 20 + 1
    assert prepare(ROWS).train[:] == first
    assert len(parsed) == 20 + 2
    changed = [*ROWS[:-1], talk("What is 19?", "No more.")]  # in the last row alone
    assert prepare(changed).train[:] != first
    assert len(parsed) == 2 * (20 + 2) - 1


def test_separate_evaluation_data(prepare, tmp_path):
    held_out = write_lines(tmp_path / "held.jsonl", [talk("Hi?", "Yes."), *ROWS[2:6]])
    data = prepare(ROWS, eval_path=held_out)
    assert (len(data.train), len(data.evaluation)) == (20, 5)
    assert "held.jsonl, row 1" in data.evaluation["place"][0]
    (warning,) = data.warnings
    assert warning.startswith("4 of 5 evaluation examples are also in the training data (")
    assert "row 4 and 1 more" in warning


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


DOUBLED = [{"text": "a"}, {"text": "<s>b"}]
NOTHING_MARKED = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'tool' %}"
    "{% generation %}x{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS[:1], {"eval_fraction": 0.5}, r"`data.eval_fraction` \(0.5\) of 1 rows leaves none"),
        (ROWS, {"max_length": 5}, r"all 19 training examples are longer than .*\(5\)"),
        ([*ROWS[:1], talk("Hi?", "")], {}, r"data.jsonl, row 2: messages\[1\]: the content is ''"),
        (DOUBLED, {}, "row 2: begins with '<s>' twice, once from the tokenizer; remove"),
        (ROWS, {"template": None}, r"row 1: the chat template cannot .*not set .*; give a `data"),
        (ROWS, {"template": NOTHING_MARKED}, "row 1: nothing to learn, no token is .*; remove it"),
    ],
)
def test_what_is_refused(prepare, tokenizer, rows, options, message):
    tokenizer.chat_template = options.get("template", tokenizer.chat_template)
    with pytest.raises(ValueError, match=message):
        prepare(rows, **{name: value for name, value in options.items() if name != "template"})


def test_preview_marks_learned_tokens(prepare, tokenizer):
    """Brackets in data are no markup; as many are shown as asked for and there are."""
    rows = [{"prompt": "[bold]Hi?[/bold]", "completion": " It is so, or not."}] * 3
    data = prepare(rows, max_length=22, eval_fraction=0)

    def preview(num_examples, **options):
        out = io.StringIO()
        show_preview(data.train, tokenizer, num_examples, Console(file=out, **options))
        return out.getvalue()

    text = preview(1, force_terminal=True, color_system="truecolor")
    styles = re.findall(r"\x1b\[([\d;]+)m([^\x1b]+)\x1b\[0m", text)
    learned = "".join(piece for style, piece in styles if style.startswith("1;") and "32" in style)
    context = "".join(piece for style, piece in styles if style.split(";")[0] == "2")
    assert (context, learned) == ("<s>[bold]Hi?[/bold]", " It is s")
    assert "<s>[bold]Hi?[/bold][[ It is s]]" in preview(1)
    assert preview(2).count(": 22 tokens (cut from ") == 2
    assert preview(9).count(": 22 tokens (cut from ") == 3
