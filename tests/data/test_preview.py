import io
import re

from datasets import Dataset
from rich.console import Console

from pacatune.data import show_preview


def preview(tokenizer, rows, num_examples=3, **options):
    out = io.StringIO()
    show_preview(Dataset.from_list(rows), tokenizer, num_examples, Console(file=out, **options))
    return out.getvalue()


def row(tokenizer, prompt, completion, place="f.jsonl, row 1"):
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
    rows = [row(tiny_tokenizer, "Hi?", " Yes.</s>")]
    text = preview(tiny_tokenizer, rows, force_terminal=True, color_system="truecolor")
    styles = re.findall(r"\x1b\[([\d;]+)m([^\x1b]+)\x1b\[0m", text)
    learned = "".join(piece for style, piece in styles if style.startswith("1;") and "32" in style)
    context = "".join(piece for style, piece in styles if style.split(";")[0] == "2")
    assert learned == " Yes.</s>"
    assert context == "Hi?"
    assert "Learned tokens are green" in text


def test_brackets_where_there_is_no_colour(tiny_tokenizer):
    rows = [row(tiny_tokenizer, "Hi?", " Yes.</s>")]
    text = preview(tiny_tokenizer, rows)
    assert "Hi?[[ Yes.</s>]]" in text
    assert "f.jsonl, row 1: 8 tokens, 5 learned" in text


def test_shows_as_many_as_asked_and_there_are(tiny_tokenizer):
    rows = [row(tiny_tokenizer, "a", "b", f"row {i}") for i in range(3)]
    assert preview(tiny_tokenizer, rows, 2).count("tokens, 1 learned") == 2
    assert preview(tiny_tokenizer, rows, 9).count("tokens, 1 learned") == 3


def test_characters_of_several_tokens_are_whole(tiny_tokenizer):
    assert "[[é 你 👍]]" in preview(tiny_tokenizer, [row(tiny_tokenizer, "a", "é 你 👍")])


def test_brackets_in_data_are_no_markup(tiny_tokenizer):
    text = preview(
        tiny_tokenizer, [row(tiny_tokenizer, "[bold]x[/bold]", "y", "[red].jsonl, row 1")]
    )
    assert "[bold]x[/bold]" in text
    assert "[red].jsonl, row 1: " in text


def test_cut_examples_say_so(tiny_tokenizer):
    one = {**row(tiny_tokenizer, "a", "b"), "num_tokens": 9}
    assert "f.jsonl, row 1: 2 tokens (cut from 9), 1 learned" in preview(tiny_tokenizer, [one])
