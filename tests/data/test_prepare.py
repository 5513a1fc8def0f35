"""From files to tokens: what is held out, mixed and refused."""

import io
import re
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from pacatune.data.prepare import show_preview
from pacatune.data.read import Row
from tests.data.conftest import chat, talk, write_lines

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


@pytest.fixture
def paths(tmp_path):
    chats = [{"messages": chat(f"Chat {i}?", f"It is {i}.")} for i in range(40)]
    orders = [{"instruction": f"Count {i}", "output": f"So {i}."} for i in range(10)]
    sources = {"chats": chats, "orders": orders}
    return [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in sources.items()]


def counts(data):
    return Counter(Path(place.partition(",")[0]).stem for place in data["place"])


def test_without_weights_all_is_put_together(prepare, paths):
    sources = [{"path": path} for path in paths]
    data = prepare(datasets=sources, eval_fraction=0.2)
    assert counts(data.train) == {"chats": 32, "orders": 8}
    assert counts(data.evaluation) == {"chats": 8, "orders": 2}
    assert not set(data.train["place"]) & set(data.evaluation["place"])
    assert data.warnings == []
    alone = prepare(path=paths[0], eval_fraction=0.2)
    assert data.train.select(range(32))[:] == alone.train[:]
    assert data.longest == max(map(len, data.train["input_ids"]))


def test_weights_are_proportions(prepare, paths):
    def mixed(strategy, weights, seed=0):
        sources = [{"path": p, "weight": w} for p, w in zip(paths, weights, strict=True)]
        options = {"datasets": sources, "mix_strategy": strategy, "seed": seed}
        return prepare(eval_fraction=0, **options).train

    until_one = mixed("first_exhausted", (2, 1))
    assert counts(until_one)["orders"] == 10
    assert 10 < counts(until_one)["chats"] < 40
    assert len(set(until_one["place"])) == len(until_one)
    assert mixed("first_exhausted", (0.6666, 0.3333))["place"] == until_one["place"]
    assert mixed("first_exhausted", (2, 1), seed=1)["place"] != until_one["place"]
    until_all = mixed("all_exhausted", (1, 1))
    assert counts(until_all)["chats"] == 40
    assert 25 < counts(until_all)["orders"] < 60
    assert len(set(until_all["place"])) == 50


def test_each_has_its_format_and_messages_name_it(prepare, paths):
    sources = [{"path": paths[0]}, {"path": paths[1], "format": "text"}]
    rule = r"orders.jsonl, row 1: the columns .* not those of format 'text'"
    with pytest.raises(ValueError, match=rule):
        prepare(datasets=sources)
    data = prepare(datasets=[{"path": p} for p in paths], max_length=22)
    cut = [w for w in data.warnings if "training examples are cut at `training.max_length`" in w]
    assert {warning.partition(" training")[0].rpartition(" ")[2] for warning in cut} <= set(paths)
    assert any(paths[0] in warning for warning in cut)


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
