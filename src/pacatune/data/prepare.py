"""From rows to tokens: read, encode, split, check, before any model weight is loaded."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from pacatune.data.chat_images import ImageTokenizer
from pacatune.data.checks import find_overlap, keep_learnable
from pacatune.data.choices import CSV_COLUMNS
from pacatune.data.config import DataConfig, SourceConfig
from pacatune.data.encode import IGNORED, Encoder
from pacatune.data.formats import Example, to_examples
from pacatune.data.read import read_rows
from pacatune.data.rows import encode, stream

NUM_SAMPLED = 1000
"""Rows at the beginning of a stream that are checked before training."""

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
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


@dataclass(frozen=True)
class PreparedData:
    """Data as a trainer takes it, and what was found in it.

    In supervised fine-tuning: columns input_ids, labels (-100 where nothing is learned) and place.
    """

    train: "Dataset | IterableDataset"
    evaluation: "Dataset | None"
    longest: int
    """Tokens of the longest training example, after cutting."""
    warnings: list[str]
    """What is probably not meant, one sentence each."""
    sample: "Dataset | None" = None
    """The first training examples, where `train` is a stream of them without end."""
    processor: Any = None
    """What makes images into tensors, where chats have some: rows then have text and images too."""


def prepare_data(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    stop_ids: Collection[int],
    num_processes: int | None = None,
    load_processor: Callable[[], Any] | None = None,
) -> PreparedData:
    """Read, encode, split and check the data of a run.

    Examples are cut at `max_length` tokens, if it is given. `stop_ids` are the tokens that end a
    generation. `load_processor` is asked for the model's processor where chats have images.
    """
    sources = config.sources()
    read = partial(_read, config=config, tokenizer=tokenizer)
    number = NUM_SAMPLED if config.streaming else None
    examples = [list(islice(read(source), number)) for source in sources]
    processor = None
    if any(example.images for part in examples for example in part):
        processor = _find_processor(config, load_processor)
    encoder = Encoder(
        tokenizer if processor is None else ImageTokenizer(processor),
        stop_ids,
        config.loss == "all",
        special_tokens=config.special_tokens,
    )

    def to_rows(examples: list[Example], what: str) -> "Dataset":
        title = f"Tokenizing {what} data"
        return encode(examples, encoder, max_length, num_processes, title)

    parts = [to_rows(part, "training") for part in examples]
    if held_out := config.evaluation_source():
        path, split, option = held_out
        source = SourceConfig(path=path, name=config.name, split=split, format=config.format)
        evaluation: Dataset | None = to_rows(list(read(source, option)), "evaluation")
    else:
        pairs = [_split(part, config.eval_fraction, config.seed) for part in parts]
        parts = [part for part, _ in pairs]
        evaluation = _joined([part for _, part in pairs if part is not None])
    longest = max(max(part["num_tokens"][:]) for part in parts)
    parts, evaluation, warnings = _checked(
        parts, evaluation, config, max_length, tokenizer, has_images=processor is not None
    )
    found = PreparedData(
        _mixed(parts, config),
        evaluation,
        min(longest, max_length or longest),
        warnings,
        processor=processor,
    )
    if not config.streaming:
        return found
    streams = [stream(partial(read, source), encoder, max_length) for source in sources]
    train = _mixed(streams, config)
    if config.shuffle_buffer:
        train = train.shuffle(seed=config.seed, buffer_size=config.shuffle_buffer)
    return replace(found, train=train, sample=_joined(parts))


def _checked(
    parts: "list[Dataset]",
    evaluation: "Dataset | None",
    config: DataConfig,
    max_length: int | None,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    has_images: bool,
) -> "tuple[list[Dataset], Dataset | None, list[str]]":
    """Return the rows of each data set and of evaluation that teach something, and warnings."""
    warnings: list[str] = []
    names = [""] if config.datasets is None else [f"{one.path} " for one in config.sources()]
    parts = [
        keep_learnable(part, f"{name}training", max_length, tokenizer, warnings)
        for part, name in zip(parts, names, strict=True)
    ]
    if evaluation is None:
        return parts, None, warnings
    evaluation = keep_learnable(evaluation, "evaluation", max_length, tokenizer, warnings)
    for part in parts if not has_images else ():  # other images may have the same tokens
        warnings += find_overlap(part, evaluation)
    return parts, evaluation, warnings


def _find_processor(config: DataConfig, load: Callable[[], Any] | None) -> Any:
    if config.streaming:
        raise ValueError("`data.streaming` is for texts, and the data has images; set it to false.")
    if config.loss == "all":
        raise ValueError(
            "`data.loss` ('all') is for texts, and the data has images, which cannot be learned; "
            "set it to completion."
        )
    if load is None:
        raise ValueError("the data has images, and here only texts can be read; take them out.")
    return load()


def _read(
    source: SourceConfig,
    option: str | None = None,
    *,
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
) -> Iterator[Example]:
    """Yield the examples of one data set; `option` is where its path is from, for messages."""
    if option is None:
        option = "data.path" if config.datasets is None else "data.datasets"
    rows = read_rows(
        source.path,
        name=source.name,
        split=source.split,
        csv_columns=CSV_COLUMNS if source.format == "mmlu" else None,
        option=option,
        streaming=config.streaming,
    )
    has_template = bool(tokenizer.chat_template)
    for number, example in enumerate(to_examples(rows, source.format, has_template=has_template)):
        if number == 0:
            _check_chats(example, config, has_template)
        yield example


def _mixed(parts: list[Any], config: DataConfig) -> Any:
    """Put data sets together whole, or draw from them by their weights."""
    from datasets import interleave_datasets

    weights = [source.weight for source in config.sources() if source.weight is not None]
    if len(parts) == 1 or not weights:
        return _joined(parts)
    total = sum(weights)
    return interleave_datasets(
        parts,
        probabilities=[weight / total for weight in weights],
        seed=config.seed,
        stopping_strategy=config.mix_strategy,
    )


def _joined(parts: list[Any]) -> Any:
    from datasets import concatenate_datasets

    return concatenate_datasets(parts) if len(parts) > 1 else next(iter(parts), None)


def _check_chats(first: Example, config: DataConfig, has_template: bool) -> None:
    if not isinstance(first.completion, list):
        return
    if not config.special_tokens:
        raise ValueError(
            f"`data.special_tokens` (False) is for plain texts, and {first.place} is a chat, whose "
            "tokens are those of its template; drop the option."
        )
    check_template(first.place, has_template)


def check_template(place: str, has_template: bool) -> None:
    """Refuse a chat where the model's tokenizer cannot write one."""
    if not has_template:
        raise ValueError(
            f"{place} is a chat, but the model's tokenizer has no chat template; "
            "give `data.chat_template`, or use an instruction-tuned model."
        )


def _split(data: "Dataset", fraction: float, seed: int) -> "tuple[Dataset, Dataset | None]":
    rest, held_out = split_places(len(data), fraction, seed)
    if not held_out:
        return data, None
    return data.select(rest, keep_in_memory=True), data.select(held_out, keep_in_memory=True)


def split_places(number: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Hold out a fraction of the rows, at least one; return both parts, in their first order."""
    import torch

    if not fraction:
        return list(range(number)), []
    num_held_out = max(1, round(number * fraction))
    if num_held_out >= number:
        raise ValueError(
            f"`data.eval_fraction` ({fraction}) of {number} rows leaves none to train on; give "
            "more data, or set `data.eval_fraction` to 0, or give `data.eval_path`."
        )
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[num_held_out:]), sorted(order[:num_held_out])
