"""Show examples as the model sees them, with the tokens it learns in colour."""

from itertools import groupby
from typing import TYPE_CHECKING

from pacatune.data.encode import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


def show_preview(
    data: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    num_examples: int,
    console: "Console",
) -> None:
    """Print the first examples; learned tokens are green, each second token underlined.

    Where there is no colour, learned tokens stand between [[ and ]].

    Args:
        data: Columns place, input_ids, labels and num_tokens, before any cut.
        tokenizer: Decodes the ids.
        num_examples: Number of examples to print.
        console: Where to print.
    """
    mark = "green" if console.color_system else "between [[ and ]]"
    for row in data.select(range(min(num_examples, len(data)))):
        num_learned = sum(label != IGNORED for label in row["labels"])
        num_tokens, num_kept = row["num_tokens"], len(row["input_ids"])
        cut = f" (cut from {num_tokens})" if num_kept < num_tokens else ""
        title = f"{row['place']}: {num_kept} tokens{cut}, {num_learned} learned"
        console.rule()
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        console.print(_render(row["input_ids"], row["labels"], tokenizer, console))
    console.rule()
    console.print(f"Learned tokens are {mark}; the others are context.", highlight=False)


def _render(
    ids: list[int], labels: list[int], tokenizer: "PreTrainedTokenizerBase", console: "Console"
) -> "Text":
    from rich.text import Text

    text = Text()
    pairs = zip(ids, labels, strict=True)
    for learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        pieces = _pieces([token for token, _ in run], tokenizer)
        if console.color_system is None:
            text.append(f"[[{''.join(pieces)}]]" if learned else "".join(pieces))
            continue
        for index, piece in enumerate(pieces):
            style = "bold green" if learned else "dim"
            text.append(piece, style=f"{style} underline" if index % 2 else style)
    return text


def _pieces(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Text that each token adds; a character made of several tokens belongs to the last."""
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            pieces.append("")
            continue
        pieces.append(whole[len(shown) :])
        shown = whole
    return pieces
